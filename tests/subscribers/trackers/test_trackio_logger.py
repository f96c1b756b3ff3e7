"""TrackioLogger: a module that stands for Trackio's, and runs of the real one, whose database is read back."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.trackers import trackio_logger
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers.trackers.tracked_runs import (
    Lowering,
    context,
    curves_of,
    data,
    failures,
    run_and_kill,
    scripted_run,
    window,
)

TOKEN = "5ec7e7-write-token"


class Fake:
    """Stands for the module and, since there is one at a time, for its run."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails: Exception | None = None
        self._next_step = 0

    def init(self, **options: Any) -> Fake:
        if self.fails is not None:
            raise self.fails
        self.options.append(options)
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))
        self._next_step = max(self._next_step, step + 1)

    def finish(self) -> None:
        self.finished += 1

    @property
    def curves(self) -> dict[str, dict[int, Any]]:
        return curves_of(self.rows)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(trackio_logger, "trackio", fake)
    return fake


def test_curves_and_config_are_those_of_the_run(tmp_path: Path, fake: Fake) -> None:
    tracker = subs.TrackioLogger("digits", group="small", every=2, hparams={"batch_size": 8, "_odd": 1})
    trainer = scripted_run(tmp_path, tracker, run_id="run-7")
    failed = failures(trainer)
    trainer.subscribe(Lowering())
    trainer.fit(data(), epochs=2, eval_data=data(1))
    assert failed == []
    assert fake.options == [
        {
            "project": "digits", "group": "small", "space_id": None, "server_url": None, "name": "run-7",
            "config": {"learning_rate": 0.5, "batch_size": 8, "odd": 1}, "resume": "never", "embed": False,
            "auto_log_gpu": False, "auto_log_cpu": False,
        }
    ]  # fmt: skip
    found = fake.curves
    assert found["step/loss"] == {step: pytest.approx(1 / step) for step in (2, 4, 6, 8, 10)}
    assert found["epoch/val_loss"] == {5: 2.0, 10: 3.0} == found["eval/loss"]
    assert found["hyperparams/learning_rate"] == {1: 0.5, 5: 0.5, 6: 0.25, 10: 0.25}
    assert fake.finished == 1


async def test_a_resumed_run_continues_and_repeats_only_what_was_not_written(
    tmp_path: Path, fake: Fake
) -> None:
    tracker = subs.TrackioLogger("digits")
    await tracker.start(context(tmp_path))
    await tracker.handle(window(1, 6))
    await tracker.flush()
    state = json.loads(json.dumps(tracker.state_dict()))
    await tracker.handle(window(7, 8))
    await tracker.stop()
    fake.rows, fake._next_step = fake.rows[:4], 5  # a kill: the last rows were in memory
    again = subs.TrackioLogger("digits")
    again.load_state_dict(state)
    await again.start(context(tmp_path, resumed=True, start_step=6))
    await again.handle(window(7, 9))
    await again.stop()
    assert fake.curves["step/loss"].keys() == set(range(1, 10))
    assert [options["resume"] for options in fake.options] == ["never", "allow"]
    assert {options["name"] for options in fake.options} == {"run"} == {again.run_name}

    fresh = subs.TrackioLogger("digits")
    await fresh.start(context(tmp_path, restarts=True))
    await fresh.stop()
    assert fake.options[-1]["resume"] == "never"


def test_a_run_that_cannot_be_opened_is_reported_without_the_token(tmp_path: Path, fake: Fake) -> None:
    fake.fails = ValueError(f"https://host?write_token={TOKEN}")
    tracker = subs.TrackioLogger("digits", server_url=f"https://host?write_token={TOKEN}")
    trainer = scripted_run(tmp_path, tracker)
    failed = failures(trainer)
    trainer.fit(data(), epochs=2)
    assert failed[0].error == "Trackio: Trackio failed: ValueError"
    assert "rows were lost" in failed[-1].error
    assert tracker.statistics.lost >= 12
    assert TOKEN not in repr(vars(tracker)) + repr(failed) + json.dumps(tracker.state_dict())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"project": ""}, "project must be a name"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"space_id": "a/b", "server_url": "https://host"}, "space_id and server_url exclude each other"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(
    fake: Fake, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(et.ConfigurationError, match=text):
        subs.TrackioLogger(**{"project": "digits", **options})


def test_without_trackio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'trackio'"), "trackio", "TrackioLogger")
    monkeypatch.setattr(trackio_logger, "trackio", missing)
    with pytest.raises(et.ConfigurationError, match=r"No module named 'trackio'.*'eventtrain\[trackio\]'"):
        subs.TrackioLogger("digits")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.allow_blocking
@pytest.mark.skipif(find_spec("trackio") is None, reason="not installed: pip install 'eventtrain[trackio]'")
def test_after_kill_and_resume_every_step_is_in_the_database_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_and_kill(tmp_path, 'subs.TrackioLogger("digits")', 12)
    said = run_and_kill(tmp_path, 'subs.TrackioLogger("digits")', None)
    (database,) = (tmp_path / "trackio").glob("digits*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    connection.close()
    steps = Counter(step for step, metrics in rows if "step/loss" in json.loads(metrics))
    assert steps == dict.fromkeys(range(1, 31), 1), said
