"""When a Checkpointer writes, which ones it keeps, what it calls them, and what it does while it cannot keep up."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.device import pinned_memory
from eventtrain.device.snapshot import Snapshot
from eventtrain.subscribers.checkpointing import writer as checkpoint_writer
from eventtrain.subscribers.checkpointing.store import CheckpointStore
from tests.subscribers.checkpointing.writing import Writing
from tests.support.accelerator import as_on_an_accelerator
from tests.support.models import batches, make_trainer, record


def losing(losses: list[float], steps: int = 2, **options: Any) -> et.Trainer:
    """A trainer whose loss in each epoch is the one given, also when it goes on from somewhere."""
    table = jnp.asarray(losses, jnp.float32)

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return {"params": state["params"] + batch, "n": state["n"] + 1}, {"loss": table[state["n"] // steps]}

    def evaluate(state: Any, batch: Any) -> dict[str, Any]:
        return {"loss": table[(state["n"] - 1) // steps]}

    return et.Trainer(step, {"params": jnp.zeros(3), "n": jnp.int32(0)}, evaluate, **options)


DATA = [np.float32(1)] * 2


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def committed(seen: list[Any]) -> list[int]:
    return [event.step for event in seen if isinstance(event, et.CheckpointCommitted)]


# --- the best ---------------------------------------------------------------------------------------------------


def test_save_best_only_writes_exactly_the_epochs_that_beat_all_before(tmp_path: Path) -> None:
    losses = [5.0, 6.0, 4.0, np.nan, 4.0, 3.0, 9.0]
    best = subs.Checkpointer("best", max_to_keep=None, monitor="val_loss", save_best_only=True)
    trainer = losing(losses, subscribers=[best], run_dir=tmp_path)
    seen = record(trainer, et.CheckpointCommitted, et.CommandApplied)
    trainer.fit(DATA, epochs=7, eval_data=DATA)
    assert committed(seen) == [2, 6, 12]
    asked = [event for event in seen if isinstance(event, et.CommandApplied)]
    assert [event.step for event in asked] == [2, 6, 12]  # at once, before the next epoch
    for step in (2, 6, 12):
        assert et.load_state(tmp_path / f"best/step-{step:08d}")["['n']"] == step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initial_value_threshold": 4.5}, [6, 12]),
        ({"initial_value_threshold": 1.0}, []),
        ({"every_epochs": 2}, [4, 12]),
        ({"mode": "max"}, [2, 4, 8, 14]),
        ({"at_end": True}, [2, 6, 12, 14]),
        ({"monitor": "loss"}, [2, 6, 12]),
    ],
)
def test_what_counts_as_best_can_be_chosen(
    tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    options = {"monitor": "val_loss", **options}
    best = subs.Checkpointer("best", max_to_keep=None, save_best_only=True, **options)
    trainer = losing([5.0, 6.0, 4.0, 7.0, 4.0, 3.0, 9.0], subscribers=[best], run_dir=tmp_path)
    seen = record(trainer, et.CheckpointCommitted)
    trainer.fit(DATA, epochs=7, eval_data=DATA)
    assert committed(seen) == expected


def test_the_best_evaluation_counts_also_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    best = subs.Checkpointer(
        "best", max_to_keep=None, monitor="val_loss", monitor_unit="evaluations", save_best_only=True
    )
    trainer = losing(
        [5.0, 6.0, 4.0, 3.0], steps=1, subscribers=[best, subs.EvaluateEvery(steps=1)], run_dir=tmp_path
    )
    seen = record(trainer, et.CheckpointCommitted)
    trainer.fit([np.float32(1)] * 4, epochs=1, eval_data=DATA)
    assert committed(seen) == [1, 3, 4]


def test_commands_and_schedules_leave_the_best_alone(tmp_path: Path) -> None:
    best = subs.Checkpointer("best", monitor="loss", save_best_only=True)
    best.name = "best"
    usual = subs.Checkpointer("usual", every=3)
    trainer = losing([5.0, 6.0, 4.0], subscribers=[best, usual], run_dir=tmp_path)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 4)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.checkpoint("asked")

    trainer.fit(DATA, epochs=3)
    assert names(tmp_path / "best") == ["step-00000002", "step-00000006"]
    assert names(tmp_path / "usual") == ["step-00000003", "step-00000004-asked", "step-00000006"]


def test_a_lone_best_checkpointer_serves_commands(tmp_path: Path) -> None:
    best = subs.Checkpointer("best", monitor="loss", save_best_only=True, initial_value_threshold=0.0)
    trainer = losing([5.0], subscribers=[best], run_dir=tmp_path)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 1)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.checkpoint("asked")

    trainer.fit(DATA, epochs=1)
    assert names(tmp_path / "best") == ["step-00000001-asked"]


def test_a_best_one_that_could_not_be_written_is_not_to_be_beaten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointStore.write

    def failing(self: Any, name: str, parts: Any, manifest: Any, **options: Any) -> Any:
        if manifest.step == 4:
            raise OSError("no")
        return write(self, name, parts, manifest, **options)

    monkeypatch.setattr(CheckpointStore, "write", failing)
    best = subs.Checkpointer("best", max_to_keep=None, monitor="loss", save_best_only=True, retries=0)
    trainer = losing([5.0, 1.0, 2.0, 3.0], subscribers=[best], run_dir=tmp_path)
    seen = record(trainer, et.CheckpointFailed, et.CheckpointCommitted)
    failed = anyio.Event()

    @trainer.on(et.CheckpointFailed)
    async def note(event: et.CheckpointFailed) -> None:
        failed.set()

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 5)
    async def wait(event: et.StepCompleted, control: et.Control) -> None:
        await failed.wait()

    trainer.fit(DATA, epochs=4)
    assert committed(seen) == [2, 6]
    assert best.state_dict()["best"]["value"] == 2.0


def test_a_best_one_that_was_still_being_written_at_a_kill_is_written_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other Checkpointer committed at that step says that it is the best, and it is not on disk."""
    losses = [5.0, 1.0, 2.0, 3.0]

    def make() -> et.Trainer:
        best = subs.Checkpointer(
            "best",
            monitor="loss",
            save_best_only=True,
            max_to_keep=None,
            retries=0,
            template="{step}-{loss:.1f}",
        )
        best.name = "best"
        usual = subs.Checkpointer("usual", every_epochs=1, max_to_keep=None)
        return losing(losses, subscribers=[best, usual], run_dir=tmp_path)

    write = CheckpointStore.write

    def killed(self: Any, name: str, parts: Any, manifest: Any, **options: Any) -> Any:
        if manifest.owner == "best" and manifest.step == 4:
            raise OSError("no")
        return write(self, name, parts, manifest, **options)

    monkeypatch.setattr(CheckpointStore, "write", killed)
    make().fit(DATA, epochs=2)
    assert names(tmp_path / "best") == ["2-5.0"]
    monkeypatch.undo()
    make().fit(DATA, epochs=4, resume=4)
    assert names(tmp_path / "best") == ["2-5.0", "4-1.0"]
    path = tmp_path / "best/4-1.0"
    assert np.array_equal(
        et.load_state(path)["['params']"], et.load_state(tmp_path / "usual/step-00000004")["['params']"]
    )
    make().fit(DATA, epochs=4, resume=4)
    assert names(tmp_path / "best") == ["2-5.0", "4-1.0"]


def test_a_best_one_that_was_removed_is_not_to_be_beaten(tmp_path: Path) -> None:
    def make() -> et.Trainer:
        best = subs.Checkpointer("best", monitor="loss", save_best_only=True, max_to_keep=None)
        best.name = "best"
        usual = subs.Checkpointer("usual", every_epochs=1, max_to_keep=None)
        return losing([5.0, 1.0, 4.0, 3.0], subscribers=[best, usual], run_dir=tmp_path)

    make().fit(DATA, epochs=3)
    assert names(tmp_path / "best") == ["step-00000002", "step-00000004"]
    shutil.rmtree(tmp_path / "best/step-00000004")
    make().fit(DATA, epochs=4, resume=True)
    assert names(tmp_path / "best") == ["step-00000002", "step-00000008"]


def test_a_name_that_would_be_too_long_gives_way_to_the_default(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer("ck", every_epochs=1, template="{step}-{loss:.1f}" + "x" * 190)
    losing([1.0, 1e30], subscribers=[checkpointer], run_dir=tmp_path).fit(DATA, epochs=2)
    assert names(tmp_path / "ck") == ["2-1.0" + "x" * 190, "step-00000004"]


# --- which ones are kept ----------------------------------------------------------------------------------------


def test_the_newest_the_best_every_nth_and_the_named_are_kept(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer(
        "ck", every_epochs=1, max_to_keep=2, keep_best=2, keep_every=8, monitor="loss"
    )
    losses = [9.0, 2.0, 8.0, 5.0, 3.0, 6.0, 7.0, 4.0, 8.0, 9.0]
    trainer = losing(losses, subscribers=[checkpointer], run_dir=tmp_path)

    @trainer.on(et.EpochCompleted, lag=0, where=lambda event: event.epoch == 2)
    async def ask(event: et.EpochCompleted, control: et.Control) -> None:
        control.checkpoint("named")

    trainer.fit(DATA, epochs=10)
    assert names(tmp_path / "ck") == [
        "step-00000004",  # loss 2
        "step-00000006-named",
        "step-00000008",
        "step-00000010",  # loss 3
        "step-00000016",
        "step-00000018",
        "step-00000020",
    ]


def test_a_resumed_run_counts_what_the_runs_before_it_wrote(tmp_path: Path) -> None:
    def make(run_id: str) -> et.Trainer:
        return losing(
            [4.0, 1.0, 3.0, 2.0, 5.0, 6.0],
            subscribers=[subs.Checkpointer("ck", every_epochs=1, max_to_keep=2, keep_best=1, monitor="loss")],
            run_dir=tmp_path,
            run_id=run_id,
        )

    make("first").fit(DATA, epochs=3)
    assert names(tmp_path / "ck") == ["step-00000004", "step-00000006"]
    make("second").fit(DATA, epochs=5, resume=True)
    assert names(tmp_path / "ck") == ["step-00000004", "step-00000008", "step-00000010"]
    make("third").fit(DATA, epochs=6, resume=True)
    assert names(tmp_path / "ck") == ["step-00000004", "step-00000010", "step-00000012"]
    make("fourth").fit(DATA, epochs=1)  # another run: what is not its own is not its to delete
    assert names(tmp_path / "ck") == ["step-00000002", "step-00000004", "step-00000010", "step-00000012"]


def test_after_going_back_the_newest_is_what_was_committed_last(tmp_path: Path) -> None:
    def make() -> et.Trainer:
        return losing(
            [4.0] * 9, subscribers=[subs.Checkpointer("ck", every_epochs=1, max_to_keep=3)], run_dir=tmp_path
        )

    make().fit(DATA, epochs=5)
    assert names(tmp_path / "ck") == ["step-00000006", "step-00000008", "step-00000010"]
    trainer = make()
    seen = record(trainer, et.RunResumed)
    trainer.fit(DATA, epochs=4, resume=6)
    assert names(tmp_path / "ck") == ["step-00000008", "step-00000008-2", "step-00000010"]
    again = make()
    seen = record(again, et.RunResumed)
    again.fit(DATA, epochs=6, resume=True)
    assert Path(seen[0].path).name == "step-00000008-2"


# --- at the end -------------------------------------------------------------------------------------------------


def test_the_last_state_is_written_once_however_the_run_ends(tmp_path: Path) -> None:
    def fit(name: str, every: int, at_end: bool, **how: Any) -> list[int]:
        checkpointer = subs.Checkpointer("ck", every=every, at_end=at_end, max_to_keep=None)
        trainer = make_trainer(tmp_path / name, subscribers=[checkpointer])
        seen = record(trainer, et.CheckpointCommitted)

        @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == how.get("stop_at"))
        async def stop(event: et.StepCompleted, control: et.Control) -> None:
            control.stop("enough")

        trainer.fit(how.get("data", batches(5)), epochs=1)
        return committed(seen)

    assert fit("at its aim", 2, True) == [2, 4, 5]
    assert fit("at its aim, served by the schedule", 5, True) == [5]
    assert fit("stopped", 2, True, stop_at=3) == [2, 3]
    assert fit("stopped, served by the schedule", 3, True, stop_at=3) == [3]
    assert fit("without", 2, False) == [2, 4]

    def failing() -> Any:
        yield from batches(3)
        raise RuntimeError("the data ends badly")

    checkpointer = subs.Checkpointer("ck", every=2, max_to_keep=None)
    trainer = make_trainer(tmp_path / "failed", subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointCommitted)
    with pytest.raises(RuntimeError, match="badly"):
        trainer.fit(lambda epoch: failing(), epochs=1)
    assert committed(seen) == [2, 3]


@pytest.mark.parametrize("changed", [False, True])
def test_the_final_one_is_left_out_only_where_the_state_is_the_one_written_before(
    tmp_path: Path, changed: bool
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    done = record(trainer, et.CommandApplied)
    with trainer.session() as session:
        for batch in batches(3):
            session.step(batch)
        trainer.control.checkpoint("asked")
        assert session.wait(lambda: len(done) == 1)
        if changed:
            trainer.control.set_hyperparam("learning_rate", 0.125)
            assert session.wait(lambda: len(done) == 2)
    found = names(tmp_path / "run/ck")
    assert found == (["step-00000003", "step-00000003-asked"] if changed else ["step-00000003-asked"])
    rates = [
        float(et.load_state(tmp_path / "run/ck" / name)["['opt_state'].hyperparams['learning_rate']"])
        for name in found
    ]
    assert rates == ([0.125, 0.5] if changed else [0.5])


# --- names ------------------------------------------------------------------------------------------------------


def test_folders_are_called_by_the_template_where_its_metrics_were_measured(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer(
        "ck", every=3, every_epochs=1, max_to_keep=None, template="e{epoch:02d}-{val_loss:.2f}"
    )
    trainer = losing([5.0, 6.25], subscribers=[checkpointer], run_dir=tmp_path)
    trainer.fit(DATA, epochs=2, eval_data=DATA)
    assert names(tmp_path / "ck") == ["e01-5.00", "e02-6.25", "step-00000003"]


# --- weights only -----------------------------------------------------------------------------------------------


def test_weights_only_holds_the_params_and_fills_params_or_a_whole_state(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer("ck", save_weights_only=True)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    trainer.fit(batches(4), epochs=1)
    path = tmp_path / "run/ck/step-00000004"
    params = trainer.state["params"]
    assert list(et.load_state(path)) == ["['params']['w']"]
    assert np.array_equal(et.load_state(path, like=params)["w"], params["w"])
    fresh = make_trainer(tmp_path / "other").state
    filled = et.load_state(path, like=fresh)
    assert np.array_equal(filled["params"]["w"], params["w"])
    assert filled["opt_state"].count == fresh["opt_state"].count == 0
    whole = subs.Checkpointer("whole")
    make_trainer(tmp_path / "third", subscribers=[whole]).fit(batches(4), epochs=1)
    from_whole = et.load_state(tmp_path / "third/run/whole/step-00000004", like=fresh["params"])
    assert np.array_equal(from_whole["w"], params["w"])
    with pytest.raises(et.SnapshotError, match="holds weights only"):
        make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")]).fit(
            batches(4), epochs=2, resume="step-4"
        )
    with pytest.raises(et.ConfigurationError, match="requires a Checkpointer"):
        make_trainer(tmp_path, subscribers=[checkpointer]).fit(batches(4), epochs=2, resume=True)


def test_weights_only_of_computed_params_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        params=lambda state: state["params"]["w"] * 2,
        subscribers=[subs.Checkpointer("ck", save_weights_only=True)],
    )
    with pytest.raises(et.ConfigurationError, match="not leaves of the state"):
        trainer.fit(batches(2), epochs=1)


# --- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_best_only": True}, "requires a metric"),
        ({"keep_best": 2}, "requires a metric"),
        ({"save_best_only": True, "monitor": "loss", "every": 5}, "every=5"),
        ({"save_best_only": True, "monitor": "loss", "every_s": 5}, "every_s=5"),
        ({"save_best_only": True, "monitor": "thing"}, "mode="),
        ({"initial_value_threshold": 1.0}, "save_best_only"),
        (
            {"initial_value_threshold": "x", "save_best_only": True, "monitor": "loss"},
            "initial_value_threshold",
        ),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"when_full": "never"}, "when_full"),
        ({"on_failure": "cry"}, "on_failure"),
        ({"monitor_unit": "steps"}, "monitor_unit"),
        ({"marker_timeout_s": 0}, "marker_timeout_s"),
        ({"retries": -1}, "retries"),
        ({"retry_delay_s": -1}, "retry_delay_s"),
        ({"keep_every": 0}, "keep_every"),
        ({"template": "same"}, "must contain {step} or {epoch}"),
        ({"template": "../{step}"}, "folder's name"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Checkpointer("ck", **options)
    assert said in str(caught.value)


# --- while it cannot keep up ------------------------------------------------------------------------------------


class HeldUp:
    """Lets the writer begin a checkpoint and go on only when released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        write = CheckpointStore.write

        def later(store: Any, *args: Any, **options: Any) -> Any:
            assert self.released.wait(60)
            return write(store, *args, **options)

        monkeypatch.setattr(CheckpointStore, "write", later)


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> HeldUp:
    return HeldUp(monkeypatch)


@pytest.mark.parametrize("when_full", ["skip", "fail"])
def test_at_the_limit_one_is_left_out_and_that_said(tmp_path: Path, held_up: HeldUp, when_full: Any) -> None:
    checkpointer = subs.Checkpointer(
        "ck", every=1, max_to_keep=None, max_in_flight=2, when_full=when_full, at_end=False
    )
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointSkipped, et.CheckpointFailed, et.CheckpointCommitted)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 6)
    async def release(event: et.StepCompleted) -> None:
        held_up.released.set()

    trainer.fit(batches(6), epochs=1)
    left_out = [event for event in seen if not isinstance(event, et.CheckpointCommitted)]
    assert sorted([*committed(seen), *(event.step for event in left_out)]) == [1, 2, 3, 4, 5, 6]
    assert {1, 2} <= set(committed(seen))
    assert {3, 4} <= {event.step for event in left_out}
    kind = et.CheckpointSkipped if when_full == "skip" else et.CheckpointFailed
    assert all(isinstance(event, kind) and event.requested_by == "Checkpointer" for event in left_out)
    steps = sorted(int(name[5:13]) for name in names(tmp_path / "run/ck"))
    assert steps == sorted(committed(seen))


def test_at_the_limit_training_waits_and_commands_are_served_meanwhile(
    tmp_path: Path, held_up: HeldUp
) -> None:
    """A handler that awaits a command while the loop waits for the writer, which waits for that handler's state."""

    class Asking(et.Subscriber):
        events = et.StepCompleted

        async def handle(self, event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 3:
                while not (trainer.step == 4 and trainer._plane.queue._waiting):  # noqa: ASYNC110  of another thread
                    await anyio.sleep(0.001)
                await control.snapshot("mine").result()
                held_up.released.set()

        def state_dict(self) -> dict[str, Any]:
            return {}

    checkpointer = subs.Checkpointer(
        "ck", every=1, max_to_keep=None, max_in_flight=1, at_end=False, marker_timeout_s=20
    )
    trainer = make_trainer(tmp_path, subscribers=[checkpointer, Asking()], flush_interval_s=0.001)
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed, et.LoopStalled)
    held_up.released.set()
    trainer.fit(batches(6), epochs=1)
    assert committed(seen) == [1, 2, 3, 4, 5, 6], seen


def test_a_wait_for_the_writer_is_reported_while_training_waits(tmp_path: Path, held_up: HeldUp) -> None:
    checkpointer = subs.Checkpointer("ck", every=1, max_to_keep=None, max_in_flight=1, at_end=False)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)
    stalls: list[et.LoopStalled] = []

    @trainer.on(et.LoopStalled)
    async def release(event: et.LoopStalled) -> None:
        stalls.append(event)
        if len(stalls) == 2:  # of the same wait, which has doubled
            held_up.released.set()

    trainer.fit(batches(3), epochs=1)
    assert committed(seen) == [1, 2, 3], seen
    assert [(stall.step, stall.subscriber) for stall in stalls[:2]] == [(2, "Checkpointer")] * 2
    assert stalls[0].waited_s >= 0.1


def test_a_stop_ends_the_wait_for_the_writer(tmp_path: Path, held_up: HeldUp) -> None:
    checkpointer = subs.Checkpointer("ck", every=1, max_to_keep=None, max_in_flight=1)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointCommitted, et.RunCompleted)

    @trainer.on(et.SnapshotTaken)
    async def stop(event: et.SnapshotTaken, control: et.Control) -> None:
        control.stop("now")

    @trainer.on(et.RunCompleted)
    async def release(event: et.RunCompleted) -> None:
        held_up.released.set()

    result = trainer.fit(batches(50), epochs=1)
    assert result.stop_reason == "now"
    assert result.step < 4
    assert committed(seen)[-1] == result.step


def test_the_last_state_needs_no_room(tmp_path: Path, held_up: HeldUp) -> None:
    checkpointer = subs.Checkpointer("ck", every=2, max_in_flight=1, when_full="fail")
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)

    @trainer.on(et.RunCompleted)
    async def release(event: et.RunCompleted) -> None:
        held_up.released.set()

    trainer.fit(batches(3), epochs=1)
    assert [(event.kind, event.step) for event in seen] == [
        ("checkpoint_committed", 2), ("checkpoint_committed", 3)
    ]  # fmt: skip


def test_a_subscriber_that_does_not_reach_its_marker_fails_the_checkpoint_by_name(tmp_path: Path) -> None:
    class Slow(et.Subscriber):
        events = et.StepCompleted

        async def handle(self, event: et.StepCompleted) -> None:
            if event.step == 1:
                await failed.wait()

        def state_dict(self) -> dict[str, Any]:
            return {}

    failed = anyio.Event()
    checkpointer = subs.Checkpointer("ck", every=2, marker_timeout_s=0.2, retries=3)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer, Slow()])
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)

    @trainer.on(et.CheckpointFailed)
    async def note(event: et.CheckpointFailed) -> None:
        failed.set()

    trainer.fit(batches(3), epochs=1)
    assert isinstance(seen[0], et.CheckpointFailed)
    assert seen[0].step == 2
    assert "Slow did not reach its marker within 0.2 s" in seen[0].error
    assert committed(seen) == [3]
    assert names(tmp_path / "run/ck") == ["step-00000003"]


class Odd(et.Subscriber):
    """Counts epochs; what it saves, and whether that works, is given."""

    events = et.EpochCompleted

    def __init__(self, given: Any, *, flush_fails: bool = False) -> None:
        self.given = given
        self.flush_fails = flush_fails
        self.loaded: Any = None

    async def handle(self, event: et.EpochCompleted) -> None:
        pass

    async def flush(self) -> None:
        if self.flush_fails:
            raise OSError("the disk is gone")

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.given, Exception):
            raise self.given
        return {"it": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (np.float32(1), "state_dict\\(\\) must return plain JSON data: .*float32"),
        ({1, 2}, "state_dict\\(\\) must return plain JSON data: .*set"),
        (b"bytes", "state_dict\\(\\) must return plain JSON data: .*bytes"),
        (CIRCLE, "state_dict\\(\\) must return plain JSON data: "),
        ([{"a": {1: 2}}], "the key 1 is not text, and would come back as text"),
        (RuntimeError("broken"), "RuntimeError: broken"),
    ],
)
def test_a_subscriber_that_cannot_give_its_state_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: Any, error: str
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), Odd(given)])
    seen = record(trainer, et.CheckpointFailed, et.CheckpointCommitted, et.SubscriberFailed)
    trainer.fit(batches(2), epochs=1)
    failed, saved = seen
    assert (failed.kind, failed.subscriber, failed.event_kind, failed.step) == (
        "subscriber_failed", "Odd", "state_dict", 2,
    )  # fmt: skip
    assert re.search(error, failed.error)
    assert saved.kind == "checkpoint_committed"
    assert "The checkpoint of step 2 is written without the state of Odd" in caplog.text
    caplog.clear()
    odd = Odd(1)
    again = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), odd])
    assert again.fit(batches(2), epochs=2, resume=True).step == 4
    assert odd.loaded is None
    assert "Odd failed when the checkpoint was taken, and starts with the events after it" in caplog.text


def test_a_subscriber_that_cannot_write_still_gives_its_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), Odd(7, flush_fails=True)])
    seen = record(trainer, et.CheckpointFailed, et.CheckpointCommitted, et.SubscriberFailed)
    trainer.fit(batches(2), epochs=1)
    assert [event.kind for event in seen] == ["subscriber_failed", "checkpoint_committed"]
    assert seen[0].error == "OSError: the disk is gone"
    odd = Odd(1)
    again = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), odd])
    again.fit(batches(2), epochs=2, resume=True)
    assert odd.loaded == {"it": 7}
    assert "Odd failed when the checkpoint was taken, and may lack output of steps before it" in caplog.text


SINKS: dict[str, Callable[[Path], et.Subscriber]] = {
    "jsonl": lambda path: subs.JSONLLogger(path / "e.jsonl", flush_interval_s=0.05),
    "csv": lambda path: subs.CSVLogger(path / "e.csv", flush_interval_s=0.05),
    "parquet": lambda path: subs.ParquetLogger(path / "parts", flush_interval_s=0.05),
    "tensorboard": lambda path: subs.TensorBoardLogger(path / "tb", program=False, flush_interval_s=0.05),
    "checkpoints": lambda path: subs.Checkpointer(path / "more", every=5, retries=0),
    "curves": lambda path: subs.PlotCurves(path / "curves.png"),
    "report": lambda path: subs.Report(path / "r.html", path / "r.md"),
}


@pytest.mark.parametrize("sink", SINKS)
def test_a_directory_that_was_removed_is_made_again(tmp_path: Path, sink: str) -> None:
    folder = tmp_path / "scratch" / "deep"
    trainer = make_trainer(tmp_path, subscribers=[SINKS[sink](folder), subs.Checkpointer("ck", every=5)])
    seen = record(trainer, et.CheckpointFailed, et.CheckpointCommitted, et.SubscriberFailed)

    def data(epoch: int) -> Iterator[Any]:
        if epoch == 2:
            assert folder.exists()
            (tmp_path / "scratch").rename(tmp_path / "moved")  # in one step, while something is being written
        yield from batches(5)

    result = trainer.fit(data, epochs=4)
    assert result.undelivered == {}
    assert seen[-1].kind == "checkpoint_committed"
    assert seen[-1].step == 20
    assert [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert not [event for event in seen if event.kind == "subscriber_failed" and event.step > 15]


# --- a writer that is late --------------------------------------------------------------------------------------


def test_what_a_late_writer_saves_is_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the state from the device only when training is 20 donating steps further."""
    copy_to_host = checkpoint_writer.CheckpointWriter._parts
    gone_on = threading.Event()

    def late(self: Any, claimed: Any) -> Any:
        assert gone_on.wait(60)
        return copy_to_host(self, claimed)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_parts", late)
    data = batches(40)
    checkpointer = subs.Checkpointer("ck", every=4, max_to_keep=None, max_in_flight=5)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])

    @trainer.on(et.SnapshotTaken, where=lambda event: event.step == 20)
    async def note(event: et.SnapshotTaken) -> None:
        gone_on.set()

    trainer.fit(data, epochs=1)
    plain = make_trainer(tmp_path / "plain")
    for step in range(4, 41, 4):
        plain.fit(data[step - 4 : step], epochs=1)
        saved = et.load_state(tmp_path / f"run/ck/step-{step:08d}", like=plain.state)
        pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(plain.state), strict=True)
        assert all(np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs)


# --- the thread -------------------------------------------------------------------------------------------------


def test_a_pause_that_comes_while_training_waits_for_the_writer_holds_at_once(
    tmp_path: Path, held_up: HeldUp
) -> None:
    checkpointer = subs.Checkpointer("ck", every=1, max_to_keep=None, max_in_flight=1)
    trainer = make_trainer(tmp_path, subscribers=[checkpointer])
    steps: list[int] = []

    @trainer.on(et.SnapshotTaken, where=lambda event: event.step == 1)
    async def pause(event: et.SnapshotTaken, control: et.Control) -> None:
        inbox = trainer._plane.queue
        while not (trainer.step == 2 and inbox._waiting):  # noqa: ASYNC110  of another thread
            await anyio.sleep(0.001)
        await control.pause().result()
        held_up.released.set()

    @trainer.on(et.CheckpointCommitted, where=lambda event: event.step == 2)
    async def resume(event: et.CheckpointCommitted, control: et.Control) -> None:
        steps.append(trainer.step)
        control.resume()

    assert trainer.fit(batches(5), epochs=1).step == 5
    assert steps == [2]


def test_the_device_gets_its_memory_back_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    claims: list[Any] = []
    copy_to_host = checkpoint_writer.CheckpointWriter._parts
    write = CheckpointStore.write

    def copying(self: Any, claimed: Any) -> Any:
        claims.append(claimed)
        return copy_to_host(self, claimed)

    def writing(self: Any, *args: Any, **options: Any) -> Any:
        released.append(claims[-1].snapshot.device.released)
        return write(self, *args, **options)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_parts", copying)
    monkeypatch.setattr(CheckpointStore, "write", writing)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2)])
    trainer.fit(batches(4), epochs=1)
    assert released == [True, True]


def test_an_event_that_a_full_queue_does_not_take_is_published_once_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writing = Writing(tmp_path)
    heard: list[str] = []
    refusals = 5

    def publish(event: et.Event) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals % 3:
            raise et.QueueFull("full")
        if event.step == 2:
            raise et.BusClosed("closed")
        heard.append(event.kind)

    writing.writer._publish = publish
    writing.writer.submit(writing.job(1))
    writing.writer.submit(writing.job(2))
    writing.close()
    assert heard == ["checkpoint_started", "checkpoint_committed"]
    assert "checkpoint_committed of step 2 was not published" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


# --- what there is to measure -------------------------------------------------------------------------------------


def test_a_metric_that_only_evaluations_have_is_not_missed_in_the_epochs_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(monitor: str, name: str) -> list[str]:
        caplog.clear()
        checkpointer = subs.Checkpointer(
            name, monitor=monitor, keep_best=1, mode="min", every_epochs=1,
            template=f"{{step:03d}}-{{{monitor}:.1f}}", max_to_keep=None,
        )  # fmt: skip
        evaluate = subs.EvaluateEvery(epochs=2)
        trainer = losing([5.0, 6.0, 4.0, 7.0], subscribers=[checkpointer, evaluate], run_dir=tmp_path)
        trainer.fit(DATA, epochs=4, eval_data=DATA)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert fit("val_loss", "ck") == []
    assert names(tmp_path / "ck") == ["004-6.0", "008-7.0", "step-00000002", "step-00000006"]
    with pytest.raises(
        et.ConfigurationError, match=r"Checkpointer monitors 'val_lost', .* \(val_loss, loss\)"
    ):
        fit("val_lost", "wrong")


def test_a_checkpointer_that_waited_for_an_evaluation_in_vain_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = subs.Checkpointer("best", monitor="val_loss", save_best_only=True)
    evaluate = subs.EvaluateEvery(epochs=5)
    trainer = losing([5.0, 6.0], subscribers=[best, evaluate], run_dir=tmp_path)
    trainer.fit(DATA, epochs=2, eval_data=DATA)
    assert "the run ended before an epoch with an evaluation" in caplog.text


# --- where a state waits ------------------------------------------------------------------------------------------


def saved_as_trained(tmp_path: Path, steps: range) -> bool:
    """Whether each checkpoint is, bit for bit, the state of a run that was trained as far as its step."""
    plain, trained, same = make_trainer(tmp_path / "plain"), 0, []
    for step in steps:
        plain.fit(batches(8)[trained:step], epochs=1)
        trained = step
        saved = et.load_state(tmp_path / f"run/ck/step-{step:08d}", like=plain.state)
        pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(plain.state), strict=True)
        same += [np.asarray(one).tobytes() == np.asarray(other).tobytes() for one, other in pairs]
    return all(same)


def test_states_that_wait_on_the_host_are_written_as_they_were(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_up: HeldUp,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on an accelerator, whose states are moved while the first of them is being written."""
    as_on_an_accelerator(monkeypatch)
    moved: list[int] = []
    move_to_host = Snapshot.move_to_host

    def noting(self: Snapshot) -> bool:
        there = move_to_host(self)
        if threading.current_thread().name.startswith("eventtrain staging"):
            moved.append(self.step)
        if len(moved) == 4:
            held_up.released.set()
        return there

    monkeypatch.setattr(Snapshot, "move_to_host", noting)
    checkpointer = subs.Checkpointer("ck", every=2, max_to_keep=None, max_in_flight=4)
    make_trainer(tmp_path, subscribers=[checkpointer]).fit(batches(8), epochs=1)
    assert moved == [2, 4, 6, 8]
    assert saved_as_trained(tmp_path, range(2, 9, 2))
    assert "in batches" not in caplog.text


def test_the_room_of_a_checkpoint_is_free_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One state at a time has room on the host, and none is written in batches."""
    as_on_an_accelerator(monkeypatch)
    checkpointer = subs.Checkpointer("ck", every=1, max_to_keep=None, max_in_flight=1)
    make_trainer(tmp_path, subscribers=[checkpointer]).fit(batches(8), epochs=1)
    assert saved_as_trained(tmp_path, range(1, 9))
    assert "in batches" not in caplog.text


@pytest.mark.parametrize("room", ["none", "one leaf", "no such memory"])
def test_a_state_that_does_not_fit_on_the_host_is_written_in_batches_and_that_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: str
) -> None:
    as_on_an_accelerator(monkeypatch)
    if room == "no such memory":
        monkeypatch.setattr(pinned_memory, "has_pinned_host", lambda leaf: False)
    else:
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(make_trainer(tmp_path / "size").state))
        monkeypatch.setattr(pinned_memory, "free_host_bytes", lambda: 0 if room == "none" else 2 * largest)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2, max_to_keep=None)])
    seen = record(trainer, et.CheckpointCommitted)
    limited = record(trainer, et.StagingLimited)
    trainer.fit(batches(4), epochs=1)
    assert committed(seen) == [2, 4]
    assert saved_as_trained(tmp_path, range(2, 5, 2))
    assert caplog.text.count("writes checkpoints in batches") == 1
    assert [(event.step, event.subscriber) for event in limited] == [(2, "Checkpointer"), (4, "Checkpointer")]
    assert all(event.limit_bytes < event.size_bytes for event in limited)


def test_of_weights_alone_nothing_else_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    to_pinned_host, staged = pinned_memory.to_pinned_host, []

    def noting(leaf: jax.Array) -> jax.Array:
        if threading.current_thread().name.startswith("eventtrain"):  # not the one that warms the pool
            staged.append(leaf.nbytes)
        return to_pinned_host(leaf)

    monkeypatch.setattr(pinned_memory, "to_pinned_host", noting)
    trainer = make_trainer(
        tmp_path, subscribers=[subs.Checkpointer("ck", every=2, save_weights_only=True, at_end=False)]
    )
    seen = record(trainer, et.CheckpointCommitted, et.StagingLimited)
    trainer.fit(batches(4), epochs=1)
    assert committed(seen) == [2, 4], seen
    weights = jax.tree.leaves(trainer.state["params"])
    assert sum(leaf.nbytes for leaf in weights) < sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state))
    assert sum(staged) == 2 * sum(leaf.nbytes for leaf in weights)
    assert len(staged) == 2 * len(weights)


def test_a_state_that_waits_on_the_device_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_up: HeldUp, caplog: pytest.LogCaptureFixture
) -> None:
    """The host has room for one state of the two that may be in flight."""
    as_on_an_accelerator(monkeypatch)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=1, at_end=False)])
    size_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state))
    monkeypatch.setattr(pinned_memory, "free_host_bytes", lambda: 3 * size_bytes)
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)
    limited: list[et.StagingLimited] = []

    @trainer.on(et.StagingLimited)
    async def release(event: et.StagingLimited) -> None:
        limited.append(event)
        held_up.released.set()

    trainer.fit(batches(2), epochs=1)
    assert committed(seen) == [1, 2], seen
    assert [event.step for event in limited] == [2]
    assert "in batches" not in caplog.text


def test_a_device_that_fails_in_the_middle_of_a_transfer_fails_that_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_an_accelerator(monkeypatch)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2, max_to_keep=None)])
    seen = record(trainer, et.CheckpointCommitted, et.CheckpointFailed)
    move_to_host = Snapshot.move_to_host

    def failing(self: Snapshot) -> bool:
        if self.step == 2:
            calls: list[Any] = []

            def to_pinned_host(leaf: jax.Array) -> jax.Array:
                calls.append(leaf)
                if len(calls) == 2:
                    raise RuntimeError("INTERNAL: the device is gone")
                return original(leaf)

            original = pinned_memory.to_pinned_host
            with monkeypatch.context() as patch:
                patch.setattr(pinned_memory, "to_pinned_host", to_pinned_host)
                return move_to_host(self)
        return move_to_host(self)

    monkeypatch.setattr(Snapshot, "move_to_host", failing)
    assert trainer.fit(batches(4), epochs=1).step == 4
    failed = [event for event in seen if isinstance(event, et.CheckpointFailed)]
    assert [event.step for event in failed] == [2]
    assert "the device is gone" in failed[0].error
    assert [event.step for event in seen if isinstance(event, et.CheckpointCommitted)] == [4]


@pytest.mark.gpu
def test_an_accelerator_gets_its_memory_back_while_the_states_wait_on_the_host(
    tmp_path: Path, held_up: HeldUp
) -> None:
    checkpointer = subs.Checkpointer("ck", every=2, max_to_keep=None, max_in_flight=6)
    trainer = et.Trainer(
        lambda state, batch: (state + batch, {}),
        jnp.zeros(1_000_003),
        subscribers=[checkpointer],
        run_dir=tmp_path,
    )
    on_device: list[int] = []

    def states() -> int:
        arrays = [array for array in jax.live_arrays() if array.shape == (1_000_003,)]
        return sum(array.sharding.memory_kind == "device" for array in arrays)

    def data(epoch: int) -> Any:
        for step in range(1, 12):
            yield np.float32(step)
        deadline_s = time.monotonic() + 60
        while states() > 2 and time.monotonic() < deadline_s:  # the newest, and its owner's
            time.sleep(0.01)
        on_device.append(states())
        held_up.released.set()

    trainer.fit(data, epochs=1)
    assert on_device[0] <= 2
    for step in (2, 4, 6, 8, 10):
        saved = et.load_state(tmp_path / f"ck/step-{step:08d}")["."]
        assert float(saved[0]) == step * (step + 1) / 2
