"""Reads and checks the files that a killed job writes (``file_loggers``)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from benchmarks.killing.job import EPOCHS, STEPS
from benchmarks.killing.jobs import LEFT_OUT, require, undisturbed

Row = dict[str, Any]
ALL_STEPS = list(range(1, EPOCHS * STEPS + 1))
PART = "metrics/.part-*.unfinished"
UNFINISHED = (PART, ".*.wider", ".*.cutting", "tensorboard/.*.cutting")
"""Temporary files of the loggers, before they get their final name."""


@dataclass(frozen=True)
class Log:
    """One log: how to read its rows from a file or a folder, and whether it has one per step or per epoch."""

    read: Callable[[Path], list[Row]]
    per_epoch: bool = False
    all_kinds: bool = False
    """Whether it also has rows of other events."""


def read_json(path: Path) -> list[Row]:
    return [json.loads(line) for line in whole_lines(path)]


def read_csv(path: Path) -> list[Row]:
    return list(csv.DictReader(io.StringIO("\n".join(whole_lines(path))), strict=True))


def read_parquet(path: Path) -> list[Row]:
    return parquet.read_table(path).to_pylist() if any(path.glob("part-*.parquet")) else []


def whole_lines(path: Path) -> list[str]:
    """Returns the lines that have a line end; a kill may leave one without."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


LOGS = {
    "events.jsonl": Log(read_json, all_kinds=True),
    "windows.jsonl": Log(read_json, all_kinds=True),
    "steps.csv": Log(read_csv),
    "epochs.csv": Log(read_csv, per_epoch=True),
    "metrics": Log(read_parquet),
}
CURVES = "tensorboard"


class Kept:
    """Contents of the logs of a folder when its run was killed, and their cut-off tails."""

    def __init__(self, folder: Path) -> None:
        self._rows = {name: log.read(folder / name) for name, log in LOGS.items()}
        self._beside = {name: tails(folder, name) for name in LOGS}
        for name, rows in self._rows.items():
            steps = steps_of(LOGS[name], rows)
            require(steps == sorted({*steps}), f"when it was killed {name} had the steps {steps}")

    def check(self, folder: Path) -> None:
        """Checks that each row is still in its place, or in a tail that was cut off since.

        Raises:
            AssertionError: a row is missing.
        """
        for name, before in self._rows.items():
            now, kept = LOGS[name].read(folder / name), len(before)
            for tail in tails(folder, name)[len(self._beside[name]) :]:
                cut = LOGS[name].read(tail)
                kept = len(before) - len(cut)
                require(before[kept:] == cut, f"{tail.name} is not the end of what {name} was")
            require(
                before[:kept] == now[:kept],
                f"of {kept} rows of {name} that were not cut off, some are missing",
            )


def tails(folder: Path, name: str) -> list[Path]:
    """Returns the cut-off tails, oldest first."""
    return sorted(folder.glob(f"{name}.cut-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def steps_of(log: Log, rows: Sequence[Row]) -> list[int]:
    """Returns the step of each row of a step, or of an epoch."""
    kinds = {"step_completed"} if log.all_kinds else {None}
    return [int(row["step"]) for row in rows if row.get("kind") in kinds]


def check_logs(folder: Path) -> None:
    """Checks that each log has each step exactly once, equal to the undisturbed run, and so has each cut-off tail.

    Raises:
        AssertionError: a log or a tail differs.
    """
    whole = undisturbed("files").folder
    for name, log in LOGS.items():
        expected, found = (comparable(log, log.read(where / name)) for where in (whole, folder))
        steps = ALL_STEPS[STEPS - 1 :: STEPS] if log.per_epoch else ALL_STEPS
        require(steps_of(log, found) == steps, f"rows in {name} are of the steps {steps_of(log, found)}")
        require(found == expected, f"{name} differs from the undisturbed run's")
        for tail in tails(folder, name):
            for row in comparable(log, log.read(tail)):
                require(row in expected, f"{tail.name} has {row}, which the undisturbed run does not have")
    require((folder / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes(), "steps.csv differs")
    left = [path.name for pattern in UNFINISHED for path in folder.glob(pattern)]
    require(not left, f"temporary files are left: {left}")
    check_curves(folder, whole)


def comparable(log: Log, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows without ``LEFT_OUT``, steps first, because other rows have no fixed place among windows."""
    found = [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in rows]
    return sorted(found, key=lambda row: row.get("kind") != "step_completed") if log.all_kinds else found


def check_curves(folder: Path, whole: Path) -> None:
    """Checks that each curve of TensorBoard has each step once, equal to the undisturbed run; also the cut-off files.

    Raises:
        AssertionError: a curve or a file differs.
    """
    expected, found = curves(whole / CURVES), curves(folder / CURVES)
    require(
        [step for step, _ in found["step/loss"]] == ALL_STEPS,
        f"step/loss has the points {found['step/loss']}",
    )
    require(found == expected, "the curves differ from the undisturbed run's")
    for path in (folder / CURVES).glob("events.out.cut.*"):
        loader: Any = LegacyEventFileLoader(str(path))
        for event in loader.Load():
            for value in event.summary.value:
                if value.tag in expected:
                    point = (event.step, value.simple_value)
                    require(point in expected[value.tag], f"{path.name} has {point} in {value.tag}")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns tag -> step and value of each point."""
    found: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }
