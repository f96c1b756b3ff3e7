"""``replay`` gives fresh subscribers what a finished run has logged, as the run would have done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli.main import app
from eventtrain.runs.owner import LOCK, Owner
from eventtrain.testing import RecordingSubscriber


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": state["w"], "count": np.int32(3)}


def trainer(run_dir: Path, *subscribers: et.Subscriber) -> et.Trainer[Any]:
    return et.Trainer(step_fn, {"w": np.float32(0)}, subscribers=subscribers, run_dir=run_dir)


DATA = [np.float32(n) for n in range(4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordingSubscriber]:
    run_dir, recorder = tmp_path_factory.mktemp("run"), RecordingSubscriber()
    logger = subs.JSONLLogger("events.jsonl", events=et.Event)
    trainer(run_dir, logger, subs.CSVLogger("steps.csv"), recorder).fit(DATA, epochs=3, progress=False)
    return run_dir, recorder


def of_training(recorder: RecordingSubscriber) -> list[et.Event]:
    return [e for e in recorder.recorded if e.stream == "training" and not isinstance(e, et.StepsCompleted)]


def steps_of(windows: list[et.StepsCompleted]) -> dict[str, list[Any]]:
    return {name: [v for w in windows for v in w.metrics[name].tolist()] for name in windows[0].metrics}


def test_events_come_as_the_run_has_published_them(run: tuple[Path, RecordingSubscriber]) -> None:
    run_dir, live = run
    again, files = RecordingSubscriber(), subs.CSVLogger("again.csv")
    assert et.replay(run_dir, into=[again, files]) == sum(1 for _ in et.read_events(run_dir))
    assert of_training(again) == of_training(live)
    assert steps_of(again.of(et.StepsCompleted)) == steps_of(live.of(et.StepsCompleted))
    assert [w.last_step for w in again.of(et.StepsCompleted)] == [4, 8, 12]
    assert (run_dir / "again.csv").read_bytes() == (run_dir / "steps.csv").read_bytes()


def test_a_command_is_rejected_by_name_and_the_rest_is_given(run: tuple[Path, RecordingSubscriber]) -> None:
    recorder = RecordingSubscriber()
    et.replay(run[0], into=[subs.EarlyStopping(monitor="count", mode="min", patience=1), recorder])
    rejected = recorder.of(et.CommandRejected)
    assert [(e.command.kind, e.step) for e in rejected] == [("stop", 8), ("stop", 12)]
    assert "replayed" in rejected[0].reason
    assert recorder.of(et.RunCompleted)


@pytest.mark.parametrize(
    "subscriber",
    [
        lambda: subs.Checkpointer("checkpoints", every=4),
        lambda: subs.ReduceLROnPlateau(monitor="loss"),
        lambda: subs.EvaluateEvery(steps=2),
        lambda: subs.Profiler(((1, 2),)),
    ],
)
def test_what_needs_a_state_or_a_loop_is_refused_by_name(
    subscriber: Any, run: tuple[Path, RecordingSubscriber]
) -> None:
    one = subscriber()
    with pytest.raises(et.ConfigurationError, match=r"replayed|nothing to evaluate") as raised:
        et.replay(run[0], into=[one])
    assert type(one).__name__ in str(raised.value) + "".join(raised.value.__notes__)


def test_each_call_of_fit_is_a_run_of_its_own(tmp_path: Path) -> None:
    class Counting(RecordingSubscriber):
        started = 0

        async def start(self, run: et.RunContext) -> None:
            self.started += 1
            self.start_step = run.start_step

    once = trainer(tmp_path, subs.JSONLLogger("events.jsonl"))
    once.fit(DATA, epochs=1, progress=False)
    once.fit(DATA, epochs=2, progress=False)
    counting = Counting(et.RunStarted | et.RunCompleted)
    et.replay(tmp_path / "events.jsonl", into=[counting], out_dir=tmp_path / "elsewhere")
    assert (counting.started, counting.start_step) == (2, 4)
    assert [e.step for e in counting.recorded] == [0, 4, 4, 12]


def test_a_run_that_cannot_be_replayed_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, subs.CSVLogger("steps.csv")).fit(DATA, epochs=1, progress=False)
    with pytest.raises(et.ConfigurationError, match="requires a log of JSONLLogger"):
        et.replay(tmp_path, into=[RecordingSubscriber()])
    log = tmp_path / "events.jsonl"
    log.touch()
    with pytest.raises(et.ConfigurationError, match="is empty"):
        et.replay(tmp_path, into=[RecordingSubscriber()])
    with pytest.raises(et.ConfigurationError, match="is the log that is replayed"):
        et.replay(tmp_path, into=[subs.JSONLLogger("events.jsonl")])
    (tmp_path / LOCK).write_text(Owner(run_id="running").model_dump_json())
    with pytest.raises(et.errors.RunDirInUse, match="in use by the run running"):
        et.replay(tmp_path, into=[RecordingSubscriber()])


def test_a_failing_subscriber_that_must_not_fail_ends_it(run: tuple[Path, RecordingSubscriber]) -> None:
    class Failing(et.Subscriber):
        on_error = "fail"

        async def on_epoch_completed(self, event: et.EpochCompleted) -> None:
            raise OSError("no space")

    recorder = RecordingSubscriber()
    with pytest.raises(et.SubscriberError, match="no space"):
        et.replay(run[0], into=[Failing(), recorder])
    assert len(recorder.of(et.EpochCompleted)) == 1


def test_the_command_replays_into_the_subscribers_of_a_file(
    run: tuple[Path, RecordingSubscriber], tmp_path: Path
) -> None:
    config = tmp_path / "sinks.toml"
    config.write_text('[[subscribers]]\ntype = "csv_logger"\npath = "again.csv"\n')
    arguments = ["replay", str(run[0]), "--config", str(config), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "CSVLogger" in done.output
    assert (tmp_path / "again.csv").read_bytes() == (run[0] / "steps.csv").read_bytes()
    config.write_text('[[subscribers]]\ntype = "checkpointer"\ndirectory = "c"\nevery = 2\n')
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "Checkpointer" in refused.output
