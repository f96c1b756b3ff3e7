"""Rows per second of the file loggers: whole windows, against one row built and written for each step.

"Row by row" is the hand-written alternative: for each step, a row of the metrics' ``.item()``, passed to
``csv.writer``, or to ``json.dumps`` and an open file. The loggers receive the same windows as events, and are timed
until every row is in the file. Each figure is the median of pairs that run in alternating order in this process.

    python -m benchmarks.sinks [--pairs 15] [--json PATH]
"""

from __future__ import annotations

import csv
import json as json_format
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import anyio
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json
from eventtrain import subscribers as subs

WINDOW = 512
"""Steps per window: about 40 ms of the 70 us loop."""
WINDOWS = 200
ROWS = WINDOW * WINDOWS
METRICS = ("accuracy", "grad_norm", "loss")
LOOP_ROWS_PER_S = 14_300
"""Steps per second of the loop with a step of 70 us."""
TARGET_RATIO = 5.0


def make_windows() -> list[et.StepsCompleted]:
    rng = np.random.default_rng(0)
    return [
        et.StepsCompleted(
            run_id="20260101-120000-abcdef",
            step=first + WINDOW - 1,
            first_step=first,
            last_step=first + WINDOW - 1,
            epoch=0,
            first_batch=first - 1,
            metrics={name: rng.normal(size=WINDOW).astype(np.float32) for name in METRICS},
        )
        for first in range(1, ROWS, WINDOW)
    ]


def csv_by_rows(path: Path, windows: list[et.StepsCompleted]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "batch", *METRICS])
        for window in windows:
            columns = list(window.metrics.values())
            for row in range(WINDOW):
                step = window.first_step + row
                writer.writerow([step, 0, step - 1, *(column[row].item() for column in columns)])


def json_by_rows(path: Path, windows: list[et.StepsCompleted]) -> None:
    """Returns the fields of a row of JSONLLogger."""
    with open(path, "w", encoding="utf-8") as file:
        for window in windows:
            time = window.time.isoformat()
            for row in range(WINDOW):
                step = window.first_step + row
                values = {
                    "kind": "step_completed",
                    "run_id": window.run_id,
                    "seq": 0,
                    "time": time,
                    "step": step,
                    "schema_version": 1,
                    "epoch": window.epoch,
                    "batch": step - 1,
                    "metrics": {name: column[row].item() for name, column in window.metrics.items()},
                }
                file.write(json_format.dumps(values) + "\n")


def steps_of(windows: list[et.StepsCompleted]) -> list[et.Event]:
    return [
        et.StepCompleted(
            run_id=window.run_id,
            step=window.first_step + row,
            epoch=0,
            batch=window.first_batch + row,
            metrics={name: column[row].item() for name, column in window.metrics.items()},
        )
        for window in windows
        for row in range(WINDOW)
    ]


async def write_events(logger: Any, folder: Path, events: list[Any]) -> float:
    control: Any = None
    await logger.start(et.RunContext("run", folder, control, lambda event: None))
    began_s = perf_counter()
    for event in events:
        await logger.handle(event)
        await anyio.lowlevel.checkpoint()
    await logger.stop()
    return perf_counter() - began_s


def time_logger(logger: Any, folder: Path, events: list[Any]) -> float:
    return anyio.run(write_events, logger, folder, events)


def time_rows(way: Callable[[Path, list[et.StepsCompleted]], None], path: Path, windows: Any) -> float:
    began_s = perf_counter()
    way(path, windows)
    return perf_counter() - began_s


def same_rows(path: Path, by_hand: Path) -> bool:
    """Returns whether both files have the same content."""
    if path.suffix == ".csv":
        read = [list(csv.reader(file.read_text().splitlines())) for file in (path, by_hand)]
        numbers = [[[float(field) for field in row] for row in rows[1:]] for rows in read]
        return read[0][0] == read[1][0] and numbers[0] == numbers[1]
    rows = [
        [et.parse_event(line) for line in file.read_text().splitlines()[:: ROWS // 100]]
        for file in (path, by_hand)
    ]
    return rows[0] == rows[1]


def measure(pairs: int) -> dict[str, dict[str, float]]:
    windows = make_windows()
    ways: dict[str, tuple[str, Callable[[str], Any], Callable[..., None]]] = {
        "CSVLogger": ("csv", subs.CSVLogger, csv_by_rows),
        "JSONLLogger by window": ("jsonl", lambda path: subs.JSONLLogger(path, by="window"), json_by_rows),
    }
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, (suffix, make, by_rows) in ways.items():
            found: list[tuple[float, float]] = []
            for pair in range(pairs + 1):
                path, by_hand = folder / f"{pair}.{suffix}", folder / f"{pair}-rows.{suffix}"
                took: dict[bool, float] = {}
                for ours in (True, False) if pair % 2 else (False, True):
                    took[ours] = (
                        time_logger(make(path.name), folder, windows)
                        if ours
                        else time_rows(by_rows, by_hand, windows)
                    )
                if pair:  # the first one is the warm-up
                    found.append((took[True], took[False]))
                elif not same_rows(path, by_hand):
                    raise AssertionError(f"{what} and row by row wrote different rows")
                path.unlink()
                by_hand.unlink()
            figures[what] = {
                "rows/s": ROWS / median(ours for ours, _ in found),
                "row by row, rows/s": ROWS / median(by_hand for _, by_hand in found),
                "ratio": median(by_hand / ours for ours, by_hand in found),
            }
        parquet: list[float] = []
        by_step: list[float] = []
        events = steps_of(windows)
        for pair in range(pairs + 1):
            parquet.append(time_logger(subs.ParquetLogger(f"parts-{pair}"), folder, windows))
            by_step.append(time_logger(subs.JSONLLogger(f"{pair}.jsonl"), folder, events))
            (folder / f"{pair}.jsonl").unlink()
        figures["ParquetLogger"] = {"rows/s": ROWS / median(parquet[1:])}
        figures["JSONLLogger by step, of events that are built"] = {"rows/s": ROWS / median(by_step[1:])}
    return figures


def main(
    pairs: Annotated[int, typer.Option(help="alternating runs, of which the median is taken")] = 15,
    json: Annotated[Path | None, typer.Option(help="file to write the figures to")] = None,
) -> None:
    """Measures and prints the table."""
    figures = measure(pairs)
    table = Table(
        title=f"File loggers (medians of {pairs} pairs, {ROWS} rows of {len(METRICS)} float32 metrics)"
    )
    for column in ("logger", "figure", "measured", "target"):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for logger, rows in figures.items():
        for figure, value in rows.items():
            target = ""
            if figure == "ratio":
                target = f">= {TARGET_RATIO:g}"
            elif figure == "rows/s":
                target = f">= {LOOP_ROWS_PER_S:,}"
            table.add_row(logger, figure, f"{value:,.1f}" if figure == "ratio" else f"{value:,.0f}", target)
    Console().print(table)
    if json is not None:
        write_json(json, "sinks", figures)


if __name__ == "__main__":
    typer.run(main)
