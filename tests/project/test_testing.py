from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain import testing
from eventtrain.testing import FakeClock, RecordingSubscriber, ScriptedStep


class Ping(et.Event):
    number: int = 0


def test_the_module_exports_what_users_tests_need() -> None:
    assert testing.__all__ == ["FakeClock", "RecordingSubscriber", "ScriptedStep"]


# --- RecordingSubscriber ------------------------------------------------------------------------------------------


async def test_the_recorder_keeps_everything_in_order_and_finds_it_by_class(anyio_backend: object) -> None:
    recorder = RecordingSubscriber()
    async with et.EventBus() as bus:
        recorder.attach(bus)
        for number in range(3):
            bus.publish(Ping(number=number))
        bus.publish(et.AlertRaised(name="hot"))
    assert [event.number for event in recorder.of(Ping)] == [0, 1, 2]
    assert [event.name for event in recorder.of(et.AlertRaised)] == ["hot"]
    assert len(recorder.recorded) == 4


async def test_waiting_for_an_event_finds_it_before_and_after_the_call(anyio_backend: object) -> None:
    recorder = RecordingSubscriber(Ping | et.AlertRaised)
    async with et.EventBus() as bus:
        recorder.attach(bus)
        bus.publish(Ping(number=1))
        assert (await recorder.wait_for(Ping)).number == 1
        assert (await recorder.wait_for(Ping)).number == 1
        found: list[int] = []

        async def wait() -> None:
            found.append(
                (await recorder.wait_for(Ping, where=lambda event: event.number > 1, count=2)).number
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            for number in range(2, 5):
                bus.publish(Ping(number=number))
        assert found == [3]
        with pytest.raises(
            TimeoutError, match=r"0 of 1 AlertRaised were recorded within 0\.01 s, among 4 events"
        ):
            await recorder.wait_for(et.AlertRaised, timeout_s=0.01)
        with pytest.raises(TimeoutError, match="4 of 100 AlertRaised or Ping were recorded"):
            await recorder.wait_for(et.AlertRaised | Ping, count=100, timeout_s=0.01)
        assert await recorder.wait_for(et.AlertRaised | Ping) in recorder.of(Ping | et.AlertRaised)


def test_a_recorder_of_no_event_class_is_refused() -> None:
    with pytest.raises(et.ConfigurationError, match="expected an event class"):
        RecordingSubscriber(int)  # pyright: ignore[reportArgumentType]


# --- ScriptedStep -------------------------------------------------------------------------------------------------


def test_a_scripted_step_follows_its_script_under_jit_and_then_repeats_its_last_value() -> None:
    script = ScriptedStep({"loss": [3.0, float("nan"), 1.0], "count": [1, 2]})
    step, state, seen = jax.jit(script.step_fn), script.state, list[dict[str, Any]]()
    for batch in script.data * 4:
        state, metrics = step(state, batch)
        seen.append({name: value.item() for name, value in metrics.items()})
    np.testing.assert_array_equal([row["loss"] for row in seen], [3.0, np.nan, 1.0, 1.0])
    assert [row["count"] for row in seen] == [1, 2, 2, 2]


def test_the_evaluation_follows_its_script_by_epochs() -> None:
    script = ScriptedStep({}, eval_metrics={"loss": [0.5, 0.25]}, steps_per_epoch=3)
    step, evaluate, state, seen = (
        jax.jit(script.step_fn),
        jax.jit(script.eval_fn),
        script.state,
        list[float](),
    )
    for _ in range(3):
        for batch in script.data:
            state, _ = step(state, batch)
        seen.append(evaluate(state, script.eval_data[0])["loss"].item())
    assert seen == [0.5, 0.25, 0.25]


def test_a_policy_sees_the_script_and_its_change_shows_in_the_learning_rate(tmp_path: Path) -> None:
    script = ScriptedStep({"loss": [1.0, 0.5, 0.5, 0.5]}, steps_per_epoch=2, learning_rate=0.5)
    recorder = RecordingSubscriber()
    trainer = et.Trainer(script.step_fn, script.state, subscribers=[recorder], run_dir=tmp_path)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 2)
    async def halve(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    trainer.fit(script.data, epochs=2, progress=False)
    steps = recorder.of(et.StepCompleted)
    assert [event.metrics["loss"] for event in steps] == [1.0, 0.5, 0.5, 0.5]
    assert [event.metrics["learning_rate"] for event in steps] == [0.5, 0.5, 0.25, 0.25]
    assert recorder.of(et.HyperparamChanged)[0].step == 2


def test_restored_params_say_of_which_step_they_are(tmp_path: Path) -> None:
    script = ScriptedStep({"loss": [3.0, 1.0, 2.0, 2.0]})
    policy = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer = et.Trainer(script.step_fn, script.state, subscribers=[policy], run_dir=tmp_path)
    state = trainer.fit(script.data, epochs=4, progress=False).state
    assert (state["params"]["weight"], state["step"]) == (2, 4)


@pytest.mark.parametrize("values", [[], [[1.0]]])
def test_a_script_that_is_no_flat_sequence_is_refused_by_name(values: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=r"eval_metrics\['loss'\]"):
        ScriptedStep({}, eval_metrics={"loss": values})
    with pytest.raises(et.ConfigurationError, match="steps_per_epoch must be an integer >= 1, got 0"):
        ScriptedStep({}, steps_per_epoch=0)


# --- FakeClock ----------------------------------------------------------------------------------------------------


async def test_time_stands_still_until_advanced_and_sleepers_wake_in_the_order_of_their_moments(
    anyio_backend: object,
) -> None:
    clock, woken = FakeClock(), list[tuple[str, float]]()

    async def sleep(name: str, *durations_s: float) -> None:
        for duration_s in durations_s:
            await clock.sleep(duration_s)
            woken.append((name, clock.now_s()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep, "late", 3.0)
        tasks.start_soon(sleep, "twice", 1.0, 1.0)
        await clock.advance(0.5)
        assert woken == []
        await clock.advance(2.0)
        assert woken == [("twice", 1.0), ("twice", 2.0)]
        await clock.advance(0.5)
        assert woken[-1] == ("late", 3.0)
    assert clock.now_s() == 3.0


async def test_a_timeout_of_the_clock_cancels_its_scope_and_a_scope_left_in_time_is_forgotten(
    anyio_backend: object,
) -> None:
    clock, outcome = FakeClock(), list[bool]()

    async def wait(duration_s: float | None, sleep_s: float) -> None:
        with clock.timeout(duration_s) as scope:
            await clock.sleep(sleep_s)
        outcome.append(scope.cancelled_caught)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, 2.0, 5.0)
        tasks.start_soon(wait, 10.0, 4.0)
        tasks.start_soon(wait, None, 20.0)
        await clock.advance(30.0)
    assert outcome == [True, False, False]
    assert not clock._timers


async def test_sleepers_on_other_event_loops_are_woken_too(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    clock = FakeClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            anyio.to_thread.run_sync,
            lambda: anyio.run(clock.sleep, 5.0, backend=anyio_backend[0], backend_options=anyio_backend[1]),
        )
        while not clock._timers:
            await anyio.lowlevel.checkpoint()
        await clock.advance(5.0)
