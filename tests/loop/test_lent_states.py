"""Functions of ``trainer.on(..., with_state=True)``."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain.device.compiled_step import CompiledStep
from tests.support.models import batches, make_trainer, new_state, record, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer
from tests.trainer.test_resume_interrupted import Heard, interrupt, until


def weights(state: Any) -> np.ndarray:
    return np.asarray(state["params"]["w"])


def weights_after(steps: int, size: int) -> list[np.ndarray]:
    """The weights after each of ``steps`` steps over ``size`` batches, by a plain loop."""
    state, data, found = new_state(), batches(size), []
    for step in range(steps):
        state, _ = jax.jit(step_fn)(state, data[step % size])
        found.append(weights(state))
    return found


@pytest.mark.parametrize("options", [{}, {"snapshot": "copy"}, {"snapshot": "host"}, {"steps_per_call": 4}])
def test_a_function_is_given_the_state_of_exactly_its_step_of_the_last_epoch_too(
    tmp_path: Path, options: Any
) -> None:
    trainer, seen = make_trainer(tmp_path, **options), []

    @trainer.on(et.StepCompleted | et.EpochStarted | et.EpochCompleted, every=2, with_state=True)
    async def keep(event: Any, state: Any) -> None:
        seen.append((event.kind, event.step, weights(state)))

    trainer.fit(batches(4), epochs=4)
    expected = dict(enumerate(weights_after(16, 4), 1))
    assert [(kind, step) for kind, step, _ in seen] == [
        *(("step_completed", 2), ("step_completed", 4), ("epoch_started", 4), ("step_completed", 6)),
        *(("step_completed", 8), ("epoch_completed", 8), ("step_completed", 10), ("step_completed", 12)),
        *(("epoch_started", 12), ("step_completed", 14), ("step_completed", 16), ("epoch_completed", 16)),
    ]
    for _, step, found in seen:
        np.testing.assert_array_equal(found, expected[step])


def test_the_state_is_released_when_the_function_returns_or_fails(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    given: dict[str, list[tuple[int, weakref.ref[Any]]]] = {"fails_once": [], "tries_again": []}

    @trainer.on(et.EpochCompleted, with_state=True)
    async def fails_once(event: et.EpochCompleted, state: Any) -> None:
        given["fails_once"].append((event.epoch, weakref.ref(state["params"]["w"])))
        if event.epoch == 0:
            raise OSError

    @trainer.on(et.EpochCompleted, with_state=True, on_error="retry", retries=1, retry_delay_s=0.001)
    async def tries_again(event: et.EpochCompleted, state: Any) -> None:
        given["tries_again"].append((event.epoch, weakref.ref(state["params"]["w"])))
        if [epoch for epoch, _ in given["tries_again"]] == [0, 1]:
            raise OSError

    trainer.fit(batches(2), epochs=3)
    gc.collect()
    assert [epoch for epoch, _ in given["fails_once"]] == [0, 1, 2]
    assert [epoch for epoch, _ in given["tries_again"]] == [0, 1, 1, 2]
    earlier = [
        ref() for refs in given.values() for epoch, ref in refs if epoch < 2
    ]  # the trainer has the last one
    assert earlier == [None] * 5
    assert not any(map(len, trainer._plane.held_states))


def test_training_goes_on_with_one_state_and_waits_at_the_next(tmp_path: Path) -> None:
    trainer, reached = make_trainer(tmp_path), []

    @trainer.on(et.EpochCompleted, with_state=True)
    def slow(event: et.EpochCompleted, state: Any) -> None:
        if event.epoch == 0:
            while trainer.step < 4:
                time.sleep(0.001)
            time.sleep(0.05)
            reached.append(trainer.step)

    trainer.fit(batches(2), epochs=40)
    assert reached == [4]


def test_a_decision_with_the_state_takes_effect_before_the_next_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    changed: list[et.HyperparamChanged] = []
    trainer.on(et.HyperparamChanged)(changed.append)

    @trainer.on(et.StepCompleted, every=3, lag=0, with_state=True)
    async def decide(event: et.StepCompleted, state: Any, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", float(np.abs(weights(state)).sum()))

    trainer.fit(batches(6), epochs=1)
    first = weights_after(3, 6)[2]
    assert [event.step for event in changed] == [3, 6]
    assert changed[0].new == np.float32(np.abs(first).sum())


def test_a_decision_that_a_signal_overtakes_is_made_with_its_state_in_the_run_that_resumes(
    tmp_path: Path,
) -> None:
    def run(cuts: bool, checkpointer: MemoryCheckpointer, **options: Any) -> tuple[Any, list[Any]]:
        heard, seen = Heard(), []
        checkpointer.name = "memory"
        trainer = et.Trainer(
            step_fn, new_state(), subscribers=[heard, checkpointer], run_dir=tmp_path / str(cuts)
        )

        @trainer.on(
            et.StepCompleted | et.EpochCompleted,
            lag={et.StepCompleted: None, et.EpochCompleted: 0},
            with_state=True,
            name="decide",
        )
        async def decide(event: Any, state: Any, control: et.Control) -> None:
            if event.kind == "epoch_completed":
                seen.append((event.step, weights(state).tolist()))
                control.scale_hyperparam("learning_rate", 0.5)
            elif cuts and event.step == 2:
                interrupt()
                await until(lambda: 2 in heard.marked)

        trainer.fit(batches(2), epochs=2, **options)
        return weights(trainer.state), seen

    whole, decisions = run(False, MemoryCheckpointer(at_end=True))
    checkpointer = MemoryCheckpointer(at_end=True)
    with pytest.raises(KeyboardInterrupt):
        run(True, checkpointer)
    resumed, repeated = run(False, checkpointer, resume=2)
    np.testing.assert_array_equal(resumed, whole)
    assert repeated == decisions


def test_a_device_without_room_for_a_second_state_costs_the_call_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = CompiledStep._call_keeping, []

    def no_room(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:  # the first is the copy of the owner's state
            raise et.SnapshotError("RESOURCE_EXHAUSTED")
        return real(self, *args)

    monkeypatch.setattr(CompiledStep, "_call_keeping", no_room)
    trainer, called = make_trainer(tmp_path), []
    refused = record(trainer, et.CheckpointFailed)

    @trainer.on(et.EpochCompleted, with_state=True, name="keep")
    async def keep(event: et.EpochCompleted, state: Any) -> None:
        called.append(event.step)

    assert trainer.fit(batches(2), epochs=3).step == 6
    assert [(event.step, event.requested_by) for event in refused] == [(2, "keep"), (4, "keep")]
    assert called[-1] == 6  # no step follows


@pytest.mark.parametrize(
    ("events", "options", "words"),
    [
        (et.EvalCompleted, {}, "EvalCompleted"),
        (et.Event, {}, "only StepCompleted"),
        (et.EpochCompleted, {"where": lambda event: True}, "where="),
        (et.EpochCompleted, {"once": True}, "once="),
        (et.EpochCompleted, {"every_s": 1.0}, "every_s="),
        (et.EpochCompleted, {"lag": 3}, "lag=0"),
        (et.EpochCompleted, {"queue": et.KeepLatest()}, "Lossless"),
        (et.EpochCompleted, {"concurrency": 2}, "concurrency=1"),
    ],
)
def test_what_cannot_be_given_the_state_is_refused(
    tmp_path: Path, events: Any, options: Any, words: str
) -> None:
    async def keep(event: Any, state: Any) -> None: ...

    with pytest.raises(et.ConfigurationError, match=words):
        make_trainer(tmp_path).on(events, with_state=True, **options)(keep)


def test_a_function_without_a_parameter_for_the_state_or_subscribed_too_late_is_refused(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path)

    async def of_event(event: Any) -> None: ...
    async def of_both(event: Any, state: Any) -> None: ...

    with pytest.raises(et.ConfigurationError, match=r"\(event, state\)"):
        trainer.on(et.EpochCompleted, with_state=True)(of_event)  # type: ignore[arg-type]
    with trainer.session(), pytest.raises(et.AlreadyRunning, match="before"):
        trainer.on(et.EpochCompleted, with_state=True)(of_both)
