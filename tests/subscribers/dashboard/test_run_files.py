"""RunFiles: finished runs, growing ones and killed ones are shown from their logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.events.commands import SetHyperparam
from eventtrain.subscribers.dashboard import frames, run_files
from eventtrain.subscribers.dashboard.frames import Frames
from eventtrain.subscribers.dashboard.run_files import GONE, RunFiles
from tests.subscribers.dashboard.test_frames import Reader
from tests.support.dashboards import Training, wait_until
from tests.support.models import batches, new_state, step_fn

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "INTERVAL_S", 0.0)
    monkeypatch.setattr(run_files, "LOOK_S", 0.01)


@contextmanager
def shown(*run_dirs: Path) -> Iterator[list[Any]]:
    """What is shown of each run."""
    runs = RunFiles(run_dirs)
    try:
        yield runs.shown()
    finally:
        runs.close()


def status(shown: Any) -> Any:
    with shown.up_to_date() as observed:
        return observed.status


def step(number: int, **more: Any) -> et.StepCompleted:
    time = BEGAN + timedelta(seconds=number)
    return et.StepCompleted(
        step=number, epoch=0, batch=number - 1, metrics={"loss": 1 / number}, time=time, run_id="r", attempt=1,
        stream="training", seq=number + 1, **more,
    )  # fmt: skip


def written(path: Path, *events: et.Event) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.writelines(f"{event.model_dump_json()}\n" for event in events)


def began() -> et.RunStarted:
    return et.RunStarted(run_id="r", attempt=1, stream="training", seq=1, time=BEGAN)


def test_finished_runs_are_shown_side_by_side_with_every_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        logs = [subs.JSONLLogger("events.jsonl")] if name == "one" else [subs.CSVLogger("log.csv")]
        trainer = et.Trainer(step_fn, new_state(), subscribers=logs, run_dir=tmp_path / name)
        trainer.fit(batches(20), epochs=2, progress=False)
        trainer.close()
    with shown(tmp_path / "one", tmp_path / "two" / "log.csv") as (first, second):
        wait_until(lambda: (status(first).step, status(second).step) == (40, 40))
        wait_until(lambda: (status(first).state, status(second).state) == ("completed",) * 2)
        reader = Reader(Frames(lambda: [first]))
        reader.read()
        steps, losses = reader.curves["steps", "loss"]
        assert steps == list(range(1, 41))
        assert min(losses) > 0
        assert reader.sections["can_control"] is False
        assert [first.title, second.title] == ["one", "log.csv"]


def test_a_log_is_followed_as_it_grows_until_the_run_has_ended(tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    written(log, began(), *map(step, range(1, 11)))
    with shown(tmp_path / "run") as (run,):
        wait_until(lambda: status(run).step == 10)
        written(log, *map(step, range(11, 3001)))
        wait_until(lambda: status(run).step == 3000)
        assert status(run).rate == pytest.approx(1.0)
        changed = et.HyperparamChanged(
            name="rate", path="p", old=1, new=2, step=3000, run_id="r", attempt=1, stream="training", seq=3002
        )
        ended = et.RunCompleted(
            reason="enough", step=3000, run_id="r", attempt=1, stream="training", seq=3003
        )
        written(log, changed, ended)
        wait_until(lambda: status(run).state == "stopped")
        assert run.observed.changes[0].new == 2
        assert run.observed.series.steps["loss"].points().steps[-1] <= 3000


def test_a_killed_run_is_shown_as_interrupted(tmp_path: Path) -> None:
    written(tmp_path / "run" / "events.jsonl", began(), *map(step, range(1, 11)))
    runs = RunFiles([tmp_path / "run"])
    (run,) = runs.shown()
    wait_until(lambda: status(run).step == 10 and status(run).state == "interrupted")
    assert status(run).reason == GONE
    runs.close()


def test_a_log_that_is_damaged_is_reported_on_the_page(tmp_path: Path) -> None:
    written(tmp_path / "run" / "events.jsonl", began(), step(1))
    with (tmp_path / "run" / "events.jsonl").open("a") as log:
        log.write('{"kind": "step_completed", "nonsense": 1}\n')
    with shown(tmp_path / "run") as (run,):
        wait_until(lambda: status(run).state == "failed")
        assert "its log cannot be read" in status(run).reason


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name / "run" / "events.jsonl", began())
    with shown(tmp_path / "a" / "run", tmp_path / "b" / "run") as runs:
        assert [run.title for run in runs] == ["a/run", "b/run"]


def test_a_folder_without_a_log_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigurationError, match=str(tmp_path)):
        RunFiles([tmp_path])


def test_a_run_in_progress_is_steered_through_its_control_socket(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(None)  # Training expects one
    with Training(tmp_path / "run", dashboard, subs.JSONLLogger("events.jsonl")) as training:
        runs = RunFiles([tmp_path / "run"])
        (run,) = runs.shown()
        wait_until(lambda: run.can_control and status(run).state == "running")
        key = run.observed.run_id
        command = SetHyperparam(name="learning_rate", value=0.25)
        step = anyio.run(runs.send, key, command)
        wait_until(lambda: len(training.steps) > step + 5)
        assert (training.steps[step - 1], training.steps[step]) == (np.float32(0.05), 0.25)
        wait_until(lambda: _changes(run))
        assert _changes(run)[0].reason == "dashboard"
        with pytest.raises(et.CommandRejectedError, match="nope"):
            anyio.run(runs.send, key, SetHyperparam(name="nope", value=1))
        with pytest.raises(et.CommandRejectedError, match="No such run"):
            anyio.run(runs.send, "another", command)
    wait_until(lambda: status(run).state == "stopped")
    assert run.can_control is False
    with pytest.raises(et.CommandRejectedError, match="No such run"):
        anyio.run(runs.send, key, command)
    runs.close()


def _changes(run: Any) -> Any:
    with run.up_to_date() as observed:
        return observed.changes
