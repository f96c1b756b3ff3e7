"""How a run waits and ends when things come at awkward moments."""

from __future__ import annotations

import threading
import time
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, make_trainer, record


def test_a_stop_that_comes_too_late_for_a_run_does_not_end_the_next(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(batches(2), epochs=1)
    trainer._plane.queue.ask_to_stop("interrupted")  # as a signal in the final drain does
    assert trainer.fit(batches(2), epochs=1).stop_reason == "completed"


def test_a_run_that_was_stopped_while_its_first_batch_was_made_is_not_reproducible(tmp_path):
    trainer = make_trainer(tmp_path)
    ends = record(trainer, et.RunCompleted)
    stopped = threading.Event()

    @trainer.on(et.RunStarted)
    async def stop(event: et.RunStarted, control: et.Control) -> None:
        control.stop("no time")
        stopped.set()

    def late(epoch: int) -> Any:
        assert stopped.wait(30)
        time.sleep(0.5)
        yield from batches(2)

    assert trainer.fit(late, epochs=1).step == 0
    assert [(end.reason, end.deterministic) for end in ends] == [("no time", False)]


async def test_cancelling_an_evaluation_does_not_end_the_next_fit(tmp_path):
    trainer = make_trainer(tmp_path)

    def slow(epoch: int) -> Any:
        for batch in batches(3):
            time.sleep(0.1)
            yield batch

    with anyio.move_on_after(0.05) as scope:
        await trainer.evaluate_async(slow)
    assert scope.cancelled_caught
    assert (await trainer.fit_async(batches(2), epochs=1)).step == 2


def test_an_evaluation_that_fails_at_the_last_boundary_fails_the_run_and_leaves_the_trainer_whole(tmp_path):
    trainer = make_trainer(tmp_path)
    failed = record(trainer, et.RunFailed)

    def broken(epoch: int) -> Any:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), trainer.session(eval_data=broken) as session:  # noqa: PT012
        session.step(batches(1)[0])
        session.control.evaluate()
    assert "no such file" in failed[0].error
    assert trainer.fit(batches(2), epochs=1).step == 3


@pytest.mark.allow_blocking
def test_a_failure_that_must_end_the_run_is_raised_even_in_the_final_drain(tmp_path):
    trainer = make_trainer(tmp_path)
    ends = record(trainer, et.RunCompleted, et.RunFailed)

    @trainer.on(et.EpochCompleted, on_error="fail")
    async def strict(event: et.EpochCompleted) -> None:
        await anyio.sleep(0.05)
        raise ValueError("not good enough")

    with pytest.raises(et.SubscriberError, match="not good enough"):
        trainer.fit(batches(2), epochs=1)
    assert [event.kind for event in ends] == ["run_failed"]


def test_a_pause_that_arrives_while_the_loop_waits_for_data_holds_before_the_next_step(tmp_path):
    trainer = make_trainer(tmp_path, flush_interval_s=0.005)
    log: list[Any] = []
    asked = threading.Event()

    @trainer.on(et.StepCompleted)
    async def watch(event: et.StepCompleted, control: et.Control) -> None:
        log.append(event.step)
        if event.step == 2:
            control.pause()
            asked.set()

    @trainer.on(et.CommandApplied, where=lambda event: event.command.kind == "pause")
    async def resume_later(event: et.CommandApplied) -> None:
        log.append(f"paused at {event.step}")
        await anyio.sleep(0.6)  # long enough for the slow batch and those behind it
        log.append("resume")
        trainer.control.resume()

    def slow_third(epoch: int) -> Any:
        for index in range(6):
            if index == 2:
                assert asked.wait(60)
            yield {"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}

    trainer.fit(slow_third, epochs=1)
    assert log == [1, 2, "paused at 2", "resume", 3, 4, 5, 6]


def test_a_stop_while_an_evaluation_waits_for_its_data_gives_no_false_result(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.EvalStarted, et.EvalStepCompleted, et.EvalCompleted)
    stopping = threading.Event()

    @trainer.on(et.EvalStarted)
    async def stop(event: et.EvalStarted) -> None:
        trainer.control.stop("enough")
        stopping.set()

    def slow(epoch: int) -> Any:
        for batch in batches(3):
            yield {name: np.asarray(values) for name, values in batch.items()}
            stopping.wait(5)
            time.sleep(0.2)

    result = trainer.fit(batches(2), epochs=3, eval_data=slow)
    assert result.stop_reason == "enough"
    assert "eval_completed" not in [event.kind for event in seen]


def test_a_resume_from_a_handler_with_a_lag_applies_at_once(tmp_path):
    trainer = make_trainer(tmp_path, flush_interval_s=0.002)

    @trainer.on(et.StepCompleted, where=lambda event: event.step in (2, 4), lag=6)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 2:
            control.pause()
        else:
            await anyio.sleep(0.2)  # by now the loop is held at boundary 8
            control.resume()

    assert trainer.fit(batches(20), epochs=1).step == 20


def test_snapshots_on_the_host_keep_the_extensions_too(tmp_path):
    trainer = make_trainer(tmp_path, snapshot="host", step_extensions=[et.EMA(0.5)])

    @trainer.on(et.StepCompleted, where=lambda event: event.step in (3, 8), lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot("early") if event.step == 3 else control.restore("early")

    assert trainer.fit(batches(20), epochs=1).step == 20
    assert jnp.isfinite(trainer.extension_states()["ema"]["w"]).all()


def test_a_session_that_has_ended_refuses_to_step(tmp_path):
    trainer = make_trainer(tmp_path)
    with trainer.session() as session:
        session.step(batches(1)[0])
    with pytest.raises(et.ConfigurationError, match="ended"):
        session.step(batches(1)[0])
    assert np.isfinite(np.asarray(trainer.state["params"]["w"])).all()


async def test_a_blocking_call_on_the_loop_that_serves_the_bus_is_refused_instead_of_hanging(tmp_path):
    async with et.EventBus() as bus:
        trainer = make_trainer(tmp_path, bus=bus)
        for call in (lambda: trainer.fit(batches(1), epochs=1), lambda: trainer.evaluate(batches(1))):
            with pytest.raises(et.ConfigurationError, match="_async"):
                call()
        assert (await trainer.fit_async(batches(1), epochs=1)).step == 1


def test_evaluate_without_anything_to_evaluate_on_is_rejected(tmp_path):
    trainer = make_trainer(tmp_path)
    rejected = record(trainer, et.CommandRejected)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, lag=1)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.evaluate()

    trainer.fit(batches(3), epochs=1)
    assert "eval_data" in rejected[0].reason


def test_epochs_of_a_session_after_a_stop_are_not_said(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.EpochStarted, et.EpochCompleted)
    with trainer.session() as session:
        for _ in range(3):
            session.begin_epoch()
            for batch in batches(3):
                session.step(batch)
            session.control.stop("enough")
            session.end_epoch()
    assert [event.kind for event in seen] == ["epoch_started", "epoch_completed"]
    assert trainer.epoch == 1
