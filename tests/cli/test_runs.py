"""`eventtrain ls`, `show` and `tail` tell of every kind of run what its folder holds."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.filesize import decimal
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli.main import app
from eventtrain.runs.owner import ATTEMPTS, LOCK, Owner
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
    trainer(folder / "checkpoints", subs.Checkpointer("checkpoints", every=4)).fit(
        DATA, steps=8, progress=False
    )
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
        "checkpoints": ("unknown", 8, None),
    }
    assert found["stopped"]["reason"] == "enough\x1b"
    assert found["failed"]["reason"].startswith("ZeroDivisionError")
    assert "no log" in found["nothing"]["problem"]
    table = command("ls", runs)
    assert {"STATE", "STEP", "TIME"} <= set(table.stdout.split())
    assert "killed" in table.stdout
    assert "\x1b" not in table.stdout


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_ls_never_breaks_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics: dict[str, Any] = dict.fromkeys(
        ("accuracy", "loss", "val_accuracy", "val_loss", "val_error"), 0.9979166666
    )
    row = et.EpochCompleted(epoch=37, step=1710, metrics=metrics, hyperparams={}, steps=45, duration_s=1.0)
    for name in ("k", "a-longer-name-of-a-run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ATTEMPTS).write_text("1")
        (tmp_path / name / "events.jsonl").write_text(row.model_dump_json() + "\n")
    monkeypatch.chdir(tmp_path)
    shown = command("ls", ".").stdout
    for name in list(metrics)[:4]:
        assert len(re.findall(rf"(?<!\S){name}=0\.997917(?!\S)", shown)) == 2
    assert shown.count("+1 more") == 2
    assert "..." not in shown
    assert max(map(len, shown.splitlines())) <= columns
    assert len(shown.splitlines()) == (3 if columns == 160 else 9 if columns == 80 else 11)


def test_ls_says_once_what_a_run_without_a_log_needs(runs: Path) -> None:
    lines = command("ls", runs).stdout.splitlines()
    assert sum("no log " in line and "unknown" in line for line in lines) == 2
    assert [line for line in lines if "JSONLLogger" in line] == [
        f"{runs / 'checkpoints'}; {runs / 'nothing'}: has no log that can be read back. Add "
        "subscribers.JSONLLogger('events.jsonl'), ParquetLogger or CSVLogger to the run."
    ]
    shown = command("show", runs / "checkpoints").stdout
    assert re.search(r"^step +8 *$", shown, re.MULTILINE)
    assert "attempt" not in shown


def test_the_size_of_a_checkpoint_is_that_of_its_folder(runs: Path) -> None:
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in (runs / "checkpoints" / "checkpoints").iterdir()
    }
    found = json.loads(command("show", runs / "checkpoints", "--json").stdout)["checkpoints"]
    assert {Path(each["path"]).name: each["size_bytes"] for each in found} == sizes
    assert decimal(sizes["step-00000008"]) in command("checkpoints", "ls", runs / "checkpoints").stdout


def test_the_time_of_a_run_is_that_of_its_attempts(tmp_path: Path) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    (tmp_path / ATTEMPTS).write_text("4")
    # Seconds after the beginning, of each attempt; the third has left no row.
    rows = {1: (0, 1, 3), 2: (1000, 1010), 4: (5000, 5000.5, 5001)}
    events = [
        et.StepStarted(step=n, epoch=0, batch=n, time=begin + timedelta(seconds=second), attempt=attempt)
        for attempt, seconds in rows.items()
        for n, second in enumerate(seconds)
    ]
    log = tmp_path / "events.jsonl"
    log.write_text("".join(event.model_dump_json() + "\n" for event in events) + '{"torn')
    assert summarise(tmp_path).duration_s == 3 + 10 + 1
    assert re.search(r"^time +14", command("show", tmp_path).stdout, re.MULTILINE)


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
    assert not re.search(r"=(\{\}|\[\]|None)?( |$)", done.stdout, re.MULTILINE), (
        "a field that has nothing in it"
    )
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
