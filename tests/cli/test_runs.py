"""`eventtrain ls`, `show` and `tail` tell of every kind of run what its folder holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli.main import app
from eventtrain.runs.owner import LOCK, Owner
from eventtrain.runs.summary import Extremes, summarise


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": (state["w"] - 7) ** 2}


def trainer(run_dir: Path, *subscribers: et.Subscriber) -> et.Trainer[Any]:
    loggers = subscribers or (subs.JSONLLogger("events.jsonl"), subs.Checkpointer("checkpoints", every=4))
    return et.Trainer(step_fn, {"w": np.float32(0)}, subscribers=loggers, run_dir=run_dir)


DATA = [np.float32(n) for n in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trainer(folder / "finished").fit(DATA, steps=12, progress=False)

    stopped = trainer(folder / "stopped")
    stopped.on(et.StepCompleted, lag=0)(
        lambda event, control: control.stop("enough\x1b") if event.step == 5 else None
    )
    stopped.fit(DATA, steps=12, progress=False)

    failed = trainer(folder / "failed")
    with pytest.raises(ZeroDivisionError):
        failed.fit(lambda epoch: DATA if epoch == 0 else iter([1 / 0]), steps=12, progress=False)

    trainer(folder / "killed").fit(DATA, steps=8, progress=False)
    log = folder / "killed" / "events.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(row for row in rows if '"run_completed"' not in row) + '{"torn')
    hold(folder / "killed", pid=2**22 + 1)

    trainer(folder / "running").fit(DATA, steps=8, progress=False)
    log = folder / "running" / "events.jsonl"
    log.write_text("".join(row for row in rows if '"run_completed"' not in row))
    hold(folder / "running")

    trainer(folder / "tables", subs.CSVLogger("steps.csv")).fit(DATA, steps=8, progress=False)
    trainer(folder / "nothing", subs.History()).fit(DATA, steps=8, progress=False)
    return folder


def hold(run_dir: Path, **fields: Any) -> None:
    (run_dir / LOCK).write_text(Owner(run_id="held", **fields).model_dump_json())


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_ls_lists_the_runs_of_a_folder_with_their_states(runs: Path) -> None:
    done = command("ls", runs, "--json")
    assert done.exit_code == 0, done.output
    found = {Path(run["path"]).name: run for run in map(json.loads, done.stdout.splitlines())}
    assert {name: (run["state"], run["step"], run["epoch"]) for name, run in found.items()} == {
        "finished": ("finished", 12, 3),
        "stopped": ("stopped", 5, 1),
        "failed": ("failed", 4, 1),
        "killed": ("killed", 8, 2),
        "running": ("running", 8, 2),
        "tables": ("unknown", 8, None),
        "nothing": ("unknown", 0, None),
    }
    assert found["stopped"]["reason"] == "enough\x1b"
    assert found["failed"]["reason"].startswith("ZeroDivisionError")
    assert "no log" in found["nothing"]["problem"]
    table = command("ls", runs)
    assert {"STATE", "STEP", "TIME"} <= set(table.stdout.split())
    assert "killed" in table.stdout
    assert "\x1b" not in table.stdout


def test_show_has_the_extremes_of_each_metric(runs: Path) -> None:
    summary = summarise(runs / "finished", thorough=True)
    epochs = list(et.read_events(runs / "finished", kinds=et.EpochCompleted))
    losses = {event.step: event.metrics["loss"] for event in epochs}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    assert summary.best == {"loss": Extremes(losses[low], low, losses[high], high)}
    shown = command("show", runs / "finished")
    assert shown.exit_code == 0
    assert f"{losses[low]:.6g}" in shown.stdout
    assert "step-00000012" in shown.stdout
    assert "enough?" in command("show", runs / "stopped").stdout
    assert (
        json.loads(command("show", runs / "finished", "--json").stdout)["best"]["loss"]["minimum_step"] == low
    )


def test_tail_prints_the_newest_events(runs: Path) -> None:
    done = command("tail", runs / "finished", "-n", 2)
    assert [line.split()[1:3] for line in done.stdout.splitlines()] == [
        ["12", "epoch_completed"],
        ["12", "run_completed"],
    ]
    assert not re.search(r"=(\{\}|\[\]|None)?( |$)", done.stdout, re.MULTILINE), "a field that has nothing in it"
    done = command("tail", runs / "finished", "-n", 3, "--kind", "step_completed", "--json")
    assert [et.parse_event(line).step for line in done.stdout.splitlines()] == [10, 11, 12]
    assert len(command("tail", runs / "tables", "-n", 5).stdout.splitlines()) == 5
    assert command("tail", runs / "finished", "--follow", "-n", 1).stdout.count("\n") == 1


def test_tail_needs_no_class_of_the_user(runs: Path, tmp_path: Path) -> None:
    class Note(et.Event):
        text: str

    (tmp_path / "events.jsonl").write_text(Note(text="a\x1bb", step=3).model_dump_json() + "\n")
    assert command("tail", tmp_path).stdout.split()[1:] == ["3", "note", "text=a?b"]


@pytest.mark.parametrize("arguments", [("ls",), ("show",), ("tail",)])
def test_a_folder_that_is_missing_is_named(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = command(*arguments, tmp_path / "missing")
    assert done.exit_code == 2
    assert "missing" in done.stderr
    empty = command(*arguments, tmp_path)
    assert empty.exit_code == (0 if arguments == ("show",) else 2)
