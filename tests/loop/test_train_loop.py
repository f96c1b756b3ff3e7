"""The exact meaning of lag, and the waits of the loop: decisions, pauses, room."""

from __future__ import annotations

import random
import time
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from tests.support.models import batches, in_step, make_trainer, record


def rates(steps: list[Any]) -> dict[int, float]:
    """Step -> the learning rate it was computed with."""
    return {event.step: event.metrics["rate"] for event in steps}


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 7, 16])
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_command_of_lag_l_takes_effect_at_exactly_boundary_k_plus_l(tmp_path, lag, steps_per_call):
    trainer = make_trainer(tmp_path, steps_per_call=steps_per_call)
    seen = record(trainer, et.StepCompleted, et.CommandApplied, et.HyperparamChanged)

    @trainer.on(et.StepCompleted, every=5, lag=lag)
    async def halve(event: et.StepCompleted, control: et.Control) -> None:
        await anyio.sleep(random.random() * 0.01)
        control.scale_hyperparam("learning_rate", 0.5, reason="test")

    trainer.fit(batches(8), steps=30)
    applied = [event for event in seen if event.kind == "command_applied"]
    causes = [k for k in (5, 10, 15, 20, 25, 30) if k + lag <= 30]
    assert [event.step for event in applied] == [k + lag for k in causes]
    assert [event.command.cause.step for event in applied] == causes
    used = rates([event for event in seen if event.kind == "step_completed"])
    for step in range(1, 31):
        cuts = sum(k + lag < step for k in causes)
        assert used[step] == 0.5 * 0.5**cuts
    positions = {id(event): index for index, event in enumerate(seen)}
    for event in applied:  # behind its own step's event, before the next one's
        own = next(e for e in seen if e.kind == "step_completed" and e.step == event.step)
        assert positions[id(own)] < positions[id(event)]
        later = [e for e in seen if e.kind == "step_completed" and e.step == event.step + 1]
        assert not later or positions[id(event)] < positions[id(later[0])]


def test_a_command_that_arrives_early_waits_for_its_boundary(tmp_path):
    trainer = make_trainer(tmp_path)
    applied = record(trainer, et.CommandApplied)
    arrived: list[tuple[int, int]] = []

    @trainer.on(et.StepCompleted, every=10, lag=8)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)
        arrived.append((event.step, trainer.step))

    def slow(epoch: int) -> Any:
        for batch in batches(40):
            time.sleep(0.02)
            yield batch

    trainer.fit(slow, epochs=1)
    assert [event.step for event in applied] == [18, 28, 38]
    assert any(now < step + 8 for step, now in arrived[:3])  # the fault was there: some came early


def test_lag_0_on_an_epoch_takes_effect_before_its_next_step(tmp_path):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepCompleted)

    @trainer.on(et.EpochCompleted, lag=0)
    async def decide(event: et.EpochCompleted, control: et.Control) -> None:
        await anyio.sleep(0.02)
        control.set_hyperparam("learning_rate", 0.25 / (event.epoch + 1))

    result = trainer.fit(batches(4), epochs=3)
    used = rates(steps)
    assert [used[step] for step in (4, 5, 8, 9)] == [0.5, 0.25, 0.25, 0.125]
    assert [epoch.hyperparams["learning_rate"] for epoch in result.history] == [0.5, 0.25, 0.125]


def test_a_stop_with_a_lag_ends_the_run_at_exactly_that_boundary(tmp_path):
    trainer = make_trainer(tmp_path)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 9, lag=4)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.stop("seen enough")

    result = trainer.fit(batches(100), epochs=1)
    assert (result.step, result.stop_reason) == (13, "seen enough")


def test_commands_still_due_when_the_run_ends_are_rejected_with_that_reason(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.CommandRejected, et.RunCompleted)

    @trainer.on(et.StepCompleted, every=10, lag=5)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    trainer.fit(batches(10), steps=20)
    assert [event.kind for event in seen] == ["command_rejected", "run_completed"]
    assert seen[0].command.cause.step == 20
    assert "ended" in seen[0].reason


def test_commands_due_together_are_applied_in_the_order_of_cause_subscription_and_issue(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.CommandApplied, et.CommandConflict)

    def decider(name: str, sleep_s: float) -> None:
        @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, lag=4, name=name)
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            await anyio.sleep(sleep_s)
            control.set_hyperparam("learning_rate", 0.1, reason=f"{name} 1")
            control.set_hyperparam("learning_rate", 0.2, reason=f"{name} 2")

    decider("first", 0.05)
    decider("second", 0.0)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 5, lag=2, name="later")
    async def later(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.3, reason="later")

    trainer.fit(batches(10), epochs=1)
    reasons = [event.command.reason for event in seen if event.kind == "command_applied"]
    assert reasons == ["first 1", "first 2", "second 1", "second 2", "later"]
    conflicts = [event.subscribers for event in seen if event.kind == "command_conflict"]
    assert conflicts == [("first", "second"), ("second", "later")]
    assert trainer.fit(batches(1), epochs=1).history[0].hyperparams["learning_rate"] == pytest.approx(0.3)


@pytest.mark.allow_blocking  # failures are logged with their traceback
def test_commands_of_a_failed_attempt_are_dropped_and_those_of_the_retry_sent(tmp_path):
    trainer = make_trainer(tmp_path)
    applied = record(trainer, et.CommandApplied)
    attempts: list[int] = []

    @trainer.on(et.StepCompleted, where=lambda e: e.step == 2, lag=3, on_error="retry", retry_delay_s=0.01)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        attempts.append(event.step)
        control.scale_hyperparam("learning_rate", 0.5, reason=f"attempt {len(attempts)}")
        if len(attempts) < 3:
            raise ValueError("not yet")

    trainer.fit(batches(8), epochs=1)
    assert [event.command.reason for event in applied] == ["attempt 3"]
    assert applied[0].step == 5


def test_control_of_a_finite_lag_handler_closes_when_it_returns_and_awaiting_a_result_raises_at_once(
    tmp_path,
):
    trainer = make_trainer(tmp_path)
    kept: list[et.Control] = []
    reasons: list[str] = []

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, lag=2)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        kept.append(control)
        try:
            await control.scale_hyperparam("learning_rate", 0.5).result()
        except et.CommandRejectedError as error:
            reasons.append(error.reason)

    trainer.fit(batches(4), epochs=1)
    assert reasons == ["awaited inside a handler with a finite lag"]
    with pytest.raises(et.CommandRejectedError, match="closes"):
        kept[0].stop()


@pytest.mark.allow_blocking
def test_a_decider_that_exceeds_its_timeout_counts_as_through_and_the_run_says_so(tmp_path):
    trainer = make_trainer(tmp_path)
    ends = record(trainer, et.RunCompleted)

    @trainer.on(et.StepCompleted, every=5, lag=1, timeout_s=0.05)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        await anyio.sleep(30 if event.step == 5 else 0)
        control.scale_hyperparam("learning_rate", 0.5)

    assert trainer.fit(batches(12), epochs=1).step == 12
    assert not ends[0].deterministic


def test_a_run_decided_with_finite_lags_only_is_deterministic_and_one_with_lag_none_is_not(tmp_path):
    def ends(lag: int | None) -> bool:
        trainer = make_trainer(tmp_path / str(lag))
        seen = record(trainer, et.RunCompleted)

        @trainer.on(et.StepCompleted, every=3, lag=lag)
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            control.scale_hyperparam("learning_rate", 0.99)

        def paced(epoch: int) -> Any:  # long enough for a command without a lag to arrive
            for batch in in_step(trainer, batches(40)):
                time.sleep(0.005)
                yield batch

        trainer.fit(paced, epochs=1)
        return seen[0].deterministic

    assert ends(2)
    assert not ends(None)


def test_cancelling_or_disabling_a_decider_opens_its_gate(tmp_path):
    trainer = make_trainer(tmp_path)

    @trainer.on(et.StepCompleted, lag=1, name="stuck")
    async def decide(event: et.StepCompleted) -> None:
        if event.step == 3:
            await anyio.sleep(60)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3)
    async def release(event: et.StepCompleted) -> None:
        next(s for s in trainer.bus.subscriptions if s.name == "stuck").cancel()

    began_s = time.monotonic()
    result = trainer.fit(batches(6), epochs=1)
    assert result.step == 6
    assert time.monotonic() - began_s < 25


def test_pause_holds_the_loop_delivers_what_was_published_and_resume_lets_it_go(tmp_path):
    trainer = make_trainer(tmp_path)
    log: list[Any] = []

    @trainer.on(et.StepCompleted)
    async def watch(event: et.StepCompleted) -> None:
        log.append(event.step)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 5, lag=0)
    async def pause(event: et.StepCompleted, control: et.Control) -> None:
        control.pause(reason="look")

    @trainer.on(et.CommandApplied, where=lambda event: event.command.kind == "pause")
    async def look(event: et.CommandApplied) -> None:
        while log[-1:] != [5]:  # noqa: ASYNC110
            await anyio.sleep(0.005)
        await anyio.sleep(0.1)  # time in which a loop that went on would be seen
        log.append("resume")
        trainer.control.resume()

    trainer.fit(batches(10), epochs=1)
    assert log == [1, 2, 3, 4, 5, "resume", 6, 7, 8, 9, 10]


def test_at_a_lossless_limit_training_runs_at_that_subscribers_pace_says_so_and_loses_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    stalls = record(trainer, et.LoopStalled)
    handled: list[int] = []
    ahead: list[int] = []

    @trainer.on(et.StepCompleted, queue=et.Lossless(limit=8), name="slow")
    async def slow(event: et.StepCompleted) -> None:
        ahead.append(trainer.step - event.step)
        await anyio.sleep(0.01)
        handled.append(event.step)

    trainer.fit(batches(60), epochs=1)
    assert handled == list(range(1, 61))
    assert max(ahead) <= 2 * 8 + 1
    assert {event.subscriber for event in stalls} == {"slow"}
    assert sum(event.waited_s for event in stalls) > 0.1


@pytest.mark.allow_blocking
def test_a_subscriber_that_stalls_training_past_its_timeout_is_disabled_and_named(tmp_path):
    trainer = make_trainer(tmp_path)
    disabled = record(trainer, et.SubscriberDisabled)

    @trainer.on(et.StepCompleted, queue=et.Lossless(limit=4, stall_timeout_s=0.3), name="dead")
    async def dead(event: et.StepCompleted) -> None:
        await anyio.sleep(60)

    trainer._options.__dict__.update(drain_timeout_s=0.5)
    assert trainer.fit(batches(30), epochs=1).step == 30
    assert [event.subscriber for event in disabled] == ["dead"]


def test_evaluate_on_command_happens_at_the_boundary(tmp_path):
    trainer = make_trainer(tmp_path)
    evals = record(trainer, et.EvalCompleted)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 4, lag=2)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.evaluate()

    trainer.fit(batches(10), epochs=1, eval_data=batches(2))
    assert [event.step for event in evals] == [6, 10]


def test_a_snapshot_is_bit_equal_to_its_step_and_restore_puts_it_back(tmp_path):
    trainer = make_trainer(tmp_path)
    host: dict[str, Any] = {}

    @trainer.on(et.StepCompleted, where=lambda event: event.step in (5, 12), lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 5:
            control.snapshot("best")
        else:
            control.restore("best")

    @trainer.on(et.SnapshotTaken)
    async def keep(event: et.SnapshotTaken, control: et.Control) -> None:
        snapshot = control.snapshots["best"]
        host["step"], host["state"] = snapshot.step, await snapshot.to_host()

    result = trainer.fit(batches(20), steps=13)
    assert host["step"] == 6
    other = make_trainer(tmp_path / "other").fit(batches(20), steps=6)
    jax.tree.map(np.testing.assert_array_equal, host["state"], jax.tree.map(np.asarray, other.state))
    assert result.step == 13
    np.testing.assert_array_equal(result.state["params"]["w"], other.state["params"]["w"])


@pytest.mark.parametrize("snapshot", ["keep", "copy"])
def test_many_snapshots_survive_donation_while_training_goes_on(tmp_path, snapshot):
    trainer = make_trainer(tmp_path, snapshot=snapshot)
    taken: dict[int, Any] = {}

    @trainer.on(et.StepCompleted, every=10, lag=3)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot(f"at {event.step}")

    @trainer.on(et.SnapshotTaken)
    async def keep(event: et.SnapshotTaken, control: et.Control) -> None:
        await anyio.sleep(0.005)
        taken[event.step] = await control.snapshots[event.tag].to_host()
        control.snapshots[event.tag].release()

    data = batches(100)
    trainer.fit(data, epochs=1)
    state, expected = make_trainer(tmp_path / "x").state, {}
    jitted = jax.jit(trainer._model.step_fn)
    for step, batch in enumerate(data, 1):
        state, _ = jitted(state, batch)
        expected[step] = np.asarray(state["params"]["w"])
    assert sorted(taken) == [13, 23, 33, 43, 53, 63, 73, 83, 93]
    for step, host in taken.items():
        np.testing.assert_array_equal(host["params"]["w"], expected[step])


def test_the_device_having_no_room_for_a_snapshot_is_said_and_training_goes_on(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.CheckpointFailed)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, lag=1)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot("too big")

    from eventtrain.device.compiled_step import CompiledStep

    real = CompiledStep._call_keeping
    calls: list[int] = []

    def no_room(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:  # the first is the copy of the owner's state
            raise et.SnapshotError("RESOURCE_EXHAUSTED")
        return real(self, *args)

    monkeypatch.setattr(CompiledStep, "_call_keeping", no_room)
    assert trainer.fit(batches(8), epochs=1).step == 8
    assert [event.step for event in seen] == [4]


def test_a_scheduled_hyperparameter_is_refused_and_its_value_follows_the_schedule(tmp_path):
    import optax

    schedule = optax.linear_schedule(1.0, 0.0, 10)
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)

    def step_fn(state: Any, batch: Any) -> Any:
        updates, opt = optimiser.update({"w": jnp.ones(3)}, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"one": jnp.ones(())}

    params = {"w": jnp.zeros(3)}
    trainer = et.Trainer(step_fn, {"params": params, "opt": optimiser.init(params)}, run_dir=tmp_path)
    rejected = record(trainer, et.CommandRejected)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 2, lag=1)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.1)
        control.set_hyperparam("learning_rat", 0.1)

    result = trainer.fit([jnp.zeros(())] * 5, epochs=1)
    assert "schedule" in rejected[0].reason
    assert "learning_rate" in rejected[1].reason
    assert result.history[0].hyperparams["learning_rate"] == pytest.approx(float(schedule(4)))


@pytest.mark.parametrize("lag", [0, 2])
def test_step_started_can_be_decided_on_and_takes_effect_where_its_lag_says(tmp_path, lag):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepStarted, et.StepCompleted, et.CommandApplied)

    @trainer.on(et.StepStarted, where=lambda event: event.step == 4, lag=lag)
    async def decide(event: et.StepStarted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.25)

    trainer.fit(batches(10), epochs=1)
    used = rates([event for event in steps if event.kind == "step_completed"])
    assert [used[step] for step in (4 + lag, 5 + lag)] == [0.5, 0.25]
    assert [e.step for e in steps if e.kind == "step_started"] == list(range(10))


def test_an_evaluation_step_can_be_decided_on_at_its_boundary(tmp_path):
    trainer = make_trainer(tmp_path)
    applied = record(trainer, et.CommandApplied)

    @trainer.on(et.EvalStepCompleted, where=lambda event: event.batch == 1, lag=0)
    async def decide(event: et.EvalStepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    trainer.fit(batches(4), epochs=2, eval_data=batches(3))
    assert [event.step for event in applied] == [4, 8]


def test_a_decider_that_joins_a_running_run_decides_from_the_next_window_on(tmp_path):
    trainer = make_trainer(tmp_path, flush_interval_s=0.001)
    applied = record(trainer, et.CommandApplied)
    joined: list[int] = []

    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        joined.append(event.step)
        control.scale_hyperparam("learning_rate", 0.9)

    def data(epoch: int) -> Any:
        for index, batch in enumerate(in_step(trainer, batches(40))):
            time.sleep(0.002)
            if index == 7:
                trainer.bus.subscribe(et.StepCompleted, decide, every=2, lag=3)
                while not core_of(trainer.bus).deciders:
                    time.sleep(0.001)
            yield batch

    trainer.fit(data, epochs=1)
    assert 8 <= joined[0] < 20
    assert joined == list(range(joined[0], 41, 2))
    assert [event.step for event in applied] == [step + 3 for step in joined if step + 3 <= 40]


async def test_a_bus_that_stops_under_a_run_fails_the_run_by_name(tmp_path):
    closing = et.EventBus()

    def endless(epoch: int) -> Any:
        while True:
            yield from batches(4)

    async def train(trainer: et.Trainer, errors: list[Exception]) -> None:
        try:
            await trainer.fit_async(endless, epochs=1)
        except et.EventTrainError as error:
            errors.append(error)

    errors: list[Exception] = []
    async with anyio.create_task_group() as tasks, closing.serve():
        trainer = make_trainer(tmp_path, bus=closing)

        @trainer.on(et.StepCompleted, every=10, lag=2)
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            control.scale_hyperparam("learning_rate", 0.99)

        tasks.start_soon(train, trainer, errors)
        await closing.wait_for(et.StepCompleted, timeout_s=20)
    assert [type(error) for error in errors] == [et.BusClosed]
    assert np.isfinite(np.asarray(trainer.state["params"]["w"])).all()


def test_snapshots_in_pinned_host_memory_are_bit_equal_too(tmp_path):
    trainer = make_trainer(tmp_path, snapshot="host")
    taken: dict[int, Any] = {}

    @trainer.on(et.StepCompleted, every=5, lag=1)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshot(f"at {event.step}")

    @trainer.on(et.SnapshotTaken)
    async def keep(event: et.SnapshotTaken, control: et.Control) -> None:
        taken[event.step] = await control.snapshots[event.tag].to_host()

    trainer.fit(batches(20), epochs=1)
    expected = make_trainer(tmp_path / "other").fit(batches(20), steps=16).state
    np.testing.assert_array_equal(taken[16]["params"]["w"], expected["params"]["w"])


@pytest.mark.slow
def test_subscribers_cost_the_training_thread_nothing_however_many_they_are(tmp_path):
    """One decides with a lag of 100, so that something is counted at every step."""
    batch, steps = batches(1)[0], 3_000

    def cpu_s_of_training(subscribers: int) -> float:
        trainer = make_trainer(tmp_path / str(time.monotonic_ns()))
        for index in range(subscribers):

            @trainer.on(et.StepCompleted, lag=100 if index == 0 else None, every=1 if index == 0 else 1_000)
            async def take(event: et.StepCompleted) -> None: ...

        with trainer.session() as session:
            session.step(batch)
            began_s = time.thread_time()
            for _ in range(steps):
                session.step(batch)
            return time.thread_time() - began_s

    few, many = (min(cpu_s_of_training(number) for _ in range(3)) for number in (1, 200))
    assert many < 2 * few  # 4 times, when every queue was looked at before every step
