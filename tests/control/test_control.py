"""Commands from services and handlers without a lag, and what is refused."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

import anyio
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, make_trainer, record


def endless(epoch: int) -> Any:
    while True:
        for batch in batches(4):
            time.sleep(0.001)
            yield batch


async def test_a_service_sets_a_hyperparameter_and_awaits_the_answer(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepCompleted)
    applied: list[et.CommandApplied] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
        await trainer.bus.wait_for(et.StepCompleted, timeout_s=20)
        applied.append(
            await trainer.control.set_hyperparam("learning_rate", 0.125, reason="by hand").result()
        )
        assert trainer.control.hyperparams["learning_rate"] == 0.125
        boundary = applied[0].step
        await trainer.bus.wait_for(et.StepCompleted, where=lambda e: e.step > boundary, timeout_s=20)
        await trainer.control.stop("done").result()
    used = {event.step: event.metrics["rate"] for event in steps}
    assert used[boundary] == 0.5
    assert used[boundary + 1] == 0.125
    assert applied[0].command.cause is None


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), 1])
def test_a_value_of_any_number_type_is_taken_without_recompiling(tmp_path, value):
    trainer = make_trainer(tmp_path)
    changed = record(trainer, et.HyperparamChanged)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 2, lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", value, reason="why not")

    trainer.fit(batches(6), epochs=1)
    (event,) = changed
    assert (event.step, event.old, event.new) == (3, 0.5, float(value))
    assert event.cause == et.Cause(event="step_completed", step=2, subscriber=event.cause.subscriber)
    assert event.reason == "why not"
    assert trainer._model.compiled.compilations == 1


@pytest.mark.parametrize("value", ["fast", None, [0.1], float("nan"), float("inf")])
def test_a_value_that_is_no_finite_number_is_refused_where_the_command_is_made(tmp_path, value):
    trainer = make_trainer(tmp_path)
    with pytest.raises(et.ConfigurationError):
        trainer.control.set_hyperparam("learning_rate", value)


def test_scale_clips_and_reads_the_value_in_effect_when_it_is_applied(tmp_path):
    trainer = make_trainer(tmp_path)
    changed = record(trainer, et.HyperparamChanged)

    @trainer.on(et.StepCompleted, where=lambda event: event.step <= 3, lag=4)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5, minimum=0.1)

    trainer.fit(batches(10), epochs=1)
    assert [event.new for event in changed] == [0.25, 0.125, pytest.approx(0.1)]


async def test_commands_before_and_after_a_run_are_rejected_at_once_and_say_why(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    for _ in range(2):
        with pytest.raises(et.CommandRejectedError) as refused:
            await trainer.control.set_hyperparam("learning_rate", 0.1).result()
        assert "run" in refused.value.reason
        await trainer.fit_async(batches(2), epochs=1)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (lambda control: control.set_hyperparam("learning_rte", 0.1), "learning_rate"),
        (lambda control: control.set_hyperparam("learning_rate", 0.1, path="nowhere"), "nowhere"),
        (lambda control: control.restore("never taken"), "never taken"),
        (lambda control: control.checkpoint("x"), "Checkpointer"),
    ],
)
async def test_a_command_that_cannot_work_is_rejected_with_the_remedy(tmp_path, command, reason):
    trainer = make_trainer(tmp_path)
    rejected = record(trainer, et.CommandRejected)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
        await trainer.bus.wait_for(et.StepCompleted, timeout_s=20)
        with pytest.raises(et.CommandRejectedError) as refused:
            await command(trainer.control).result()
        assert reason in refused.value.reason
        trainer.control.stop()
    assert [event.reason for event in rejected] == [refused.value.reason]


def test_a_handler_that_errs_at_every_step_does_not_flood_the_log_and_is_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    rejected = record(trainer, et.CommandRejected)

    @trainer.on(et.StepCompleted, lag=1, name="misspelt")
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("lr", 0.1)

    trainer.fit(batches(20), epochs=1)
    assert len(rejected) == 20
    lines = [line for line in caplog.messages if "rejected" in line]
    assert [line.partition(": ")[0] for line in lines] == [
        "Command set_hyperparam of misspelt was rejected at step 2",
        *(
            f"Command set_hyperparam of misspelt was rejected at step {n + 1} (no. {n})"
            for n in (2, 4, 8, 16)
        ),
    ]
    assert lines[0].partition(": ")[2] == rejected[0].reason
    assert rejected[0].reason.startswith("No hyperparameter 'lr'")


async def test_one_event_decided_twice_without_a_lag_is_a_conflict_too(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    conflicts = record(trainer, et.CommandConflict)

    for name in ("a", "b"):

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, name=name)
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            control.set_hyperparam("learning_rate", 0.1)

    @trainer.on(et.CommandApplied)
    async def stop(event: et.CommandApplied) -> None:
        await anyio.sleep(0.05)
        trainer.control.stop()

    await trainer.fit_async(endless, epochs=1)
    assert [sorted(event.subscribers) for event in conflicts] == [["a", "b"]]
    assert conflicts[0].cause_step == 3


async def test_the_answer_to_a_command_is_stamped_and_never_changes(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path, run_id="mine")
    published = record(trainer, et.CommandApplied)
    began = datetime.now(UTC)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
        await trainer.bus.wait_for(et.StepCompleted, timeout_s=20)
        answer = await trainer.control.set_hyperparam("learning_rate", 0.25).result()
        text = answer.model_dump_json()
        assert (answer.run_id, answer.attempt, answer.stream) == ("mine", 1, "training")
        assert began <= answer.time <= datetime.now(UTC)
        await trainer.control.stop("done").result()
    assert published[0].seq > 0  # the bus has stamped the event by now
    assert answer.model_dump_json() == text
    same = {"run_id", "attempt", "stream", "step", "command"}
    assert published[0].model_dump(include=same) == answer.model_dump(include=same)


async def test_a_snapshot_by_a_service_is_read_and_released(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
        await trainer.bus.wait_for(et.StepCompleted, timeout_s=20)
        applied = await trainer.control.snapshot("now").result()
        kept = trainer.control.snapshots["now"]
        assert kept.step == applied.step
        state = await kept.to_host()
        assert state["params"]["w"].shape == (3,)
        kept.release()
        with pytest.raises(et.SnapshotError, match="released"):
            await kept.to_host()
        assert dict(trainer.control.snapshots) == {}
        trainer.control.stop()


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_value_for_a_later_step_is_used_from_exactly_that_step_on(
    tmp_path: Any, steps_per_call: int
) -> None:
    trainer = make_trainer(tmp_path, steps_per_call=steps_per_call)
    seen = record(trainer, et.StepCompleted, et.HyperparamChanged)

    @trainer.on(et.RunStarted | et.StepCompleted, lag={et.RunStarted: 0, et.StepCompleted: 3}, every=5)
    async def plan(event: et.Event, control: et.Control) -> None:
        if isinstance(event, et.RunStarted):
            for step in (7, 2, 0):
                control.set_hyperparam("learning_rate", 1.0 / (step + 1), at_step=step)
        elif event.step == 5:
            control.set_hyperparam("learning_rate", 0.75, at_step=6)  # its lag says 8

    trainer.fit(batches(12), epochs=1)
    rates = [event.metrics["rate"] for event in seen if isinstance(event, et.StepCompleted)]
    assert rates == [np.float32(r) for r in [1.0] * 2 + [1 / 3] * 5 + [1 / 8] + [0.75] * 4]
    changes = [event.step for event in seen if isinstance(event, et.HyperparamChanged)]
    assert changes == [0, 2, 7, 8]


def test_a_later_step_without_a_finite_lag_is_refused(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(et.ConfigurationError, match="without a finite lag"):
        trainer.control.set_hyperparam("learning_rate", 0.1, at_step=5)


def test_a_limit_stops_a_scaling_and_draws_nothing_towards_it(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path)
    changes = record(trainer, et.HyperparamChanged)

    @trainer.on(et.StepCompleted, lag=0, every=2)
    async def cut(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5, minimum=0.25 if event.step <= 4 else 1.0)

    trainer.fit(batches(6), epochs=1)
    assert [(event.step, event.new) for event in changes] == [(2, 0.25)]  # what changes nothing is no change


@pytest.mark.parametrize(("count", "in_a_run"), [(50_000, False), (20_000, True)])
async def test_rejected_commands_pass_no_limit_and_their_counts_are_exact(
    tmp_path: Any, anyio_backend: object, caplog: pytest.LogCaptureFixture, count: int, in_a_run: bool
) -> None:
    caplog.set_level(logging.CRITICAL, "eventtrain")
    opened, seen = anyio.Event(), list[et.CommandRejected]()
    async with et.EventBus() as bus, anyio.create_task_group() as tasks:
        trainer = make_trainer(tmp_path, bus=bus)

        async def slow(event: et.CommandRejected) -> None:
            await opened.wait()
            seen.append(event)

        reader = bus.subscribe(et.CommandRejected, slow, queue=et.Lossless(50))
        await bus.drain()  # it has joined
        if in_a_run:
            tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
            await bus.wait_for(et.StepCompleted, timeout_s=20)
        command = trainer.control.set_hyperparam("nope", 0.5)
        for number in range(1, count):
            command = trainer.control.set_hyperparam("nope", 0.5)
            if number % 1_000 == 0:
                await anyio.sleep(0.001)
        with anyio.fail_after(60), pytest.raises(et.CommandRejectedError):
            await command.result()
        with anyio.fail_after(10):
            while reader.statistics().pending < 50:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        opened.set()
        await bus.drain()
        if in_a_run:
            trainer.control.stop()
    assert 50 <= len(seen) <= 55
    assert sum(event.count for event in seen) == count
