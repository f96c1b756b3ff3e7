"""LearningRateScheduler and HyperparamScheduler in real runs, against the same schedules inside of the optimiser."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.errors import HyperparamError
from eventtrain.testing import RecordingSubscriber
from tests.subscribers.policies.test_schedules import SCHEDULES
from tests.support.saved_in_memory import MemoryCheckpointer

LENGTH = 50
"""Steps of an epoch: no multiple of a block, so that epochs and blocks end at different steps."""
DATA = [
    jnp.asarray(row) for row in np.random.default_rng(0).normal(size=(LENGTH, 4, 3)).astype(np.float32) * 0.5
]


def make_trainer(
    optimiser: optax.GradientTransformation,
    subscribers: Sequence[et.Subscriber] = (),
    *,
    backend: str = "asyncio",
    **options: Any,
) -> tuple[et.Trainer, RecordingSubscriber]:
    """A trainer whose metrics are the hyperparameters that each step was computed with."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}

    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            return jnp.mean((jnp.tanh(batch @ params["w"] + params["b"]) - batch[:, :2]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        metrics = {"loss": loss, **opt_state.hyperparams}
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics

    state = {"params": params, "opt_state": optimiser.init(params)}
    recorder = RecordingSubscriber(
        et.StepCompleted | et.HyperparamChanged | et.CommandRejected | et.RunStarted | et.SubscriberFailed
    )
    trainer = et.Trainer(step, state, subscribers=[*subscribers, recorder], backend=backend, **options)
    return trainer, recorder


def adamw(learning_rate: Any = 0.5) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.adamw)(learning_rate=learning_rate)


def sgd(learning_rate: Any = 0.5) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate)


def used(recorder: RecordingSubscriber, name: str = "learning_rate") -> list[float]:
    """What each step was computed with; every step must be there."""
    events = recorder.of(et.StepCompleted)
    assert [event.step for event in events] == list(range(1, len(events) + 1))
    return [float(event.metrics[name]) for event in events]


def changes(recorder: RecordingSubscriber) -> list[tuple[int, float]]:
    return [(event.step, float(event.new)) for event in recorder.of(et.HyperparamChanged)]


# --- by step: the schedule compiled into the optimiser is the reference --------------------------------------

CASES = [(name, "asyncio", 1) for name in SCHEDULES] + [(name, "trio", 8) for name in SCHEDULES]


@pytest.mark.parametrize(("name", "backend", "steps_per_call"), CASES)
def test_by_step_every_step_has_the_rate_of_the_same_schedule_in_the_optimiser(
    name: str, backend: str, steps_per_call: int
) -> None:
    schedule = SCHEDULES[name][0]
    steps = 118 if name == "polynomial" else 170  # compiled, a fractional power is NaN at its end
    compiled, expected = make_trainer(adamw(schedule), steps_per_call=steps_per_call)
    wanted = compiled.fit(DATA, steps=steps).state
    trainer, recorder = make_trainer(
        adamw(),
        [subs.LearningRateScheduler(schedule, by="step")],
        backend=backend,
        steps_per_call=steps_per_call,
    )
    result = trainer.fit(DATA, steps=steps)
    assert len(used(recorder)) == steps
    # XLA rounds the one-cycle schedule otherwise where it compiles it into the loop of a group of steps.
    tolerance = 1e-8 if (name, steps_per_call) == ("one cycle", 8) else 0.0
    np.testing.assert_allclose(used(recorder), used(expected), rtol=0, atol=tolerance)
    for got, want in zip(
        jax.tree.leaves(result.state["params"]), jax.tree.leaves(wanted["params"]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("lag", [0, 1, 5, 64])
def test_the_lag_changes_no_value_and_no_step_is_left_out(lag: int, backend: str) -> None:
    scheduler = subs.LearningRateScheduler(lambda step: 1 / (step + 1), by="step", lag=lag)
    trainer, recorder = make_trainer(sgd(), [scheduler], backend=backend)
    trainer.fit(DATA, epochs=2)
    assert used(recorder) == [np.float32(1 / (step + 1)) for step in range(2 * LENGTH)]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 20), st.integers(1, 4))
def test_however_a_run_is_cut_into_fits_its_rates_are_those_of_the_whole(
    fits: list[int], lag: int, steps_per_call: int
) -> None:
    scheduler = subs.LearningRateScheduler(lambda step: 2.0 ** -(step // 3), by="step", lag=lag)
    script = et.testing.ScriptedStep({"loss": [1.0]}, steps_per_epoch=7, learning_rate=9.0)
    recorder = RecordingSubscriber(et.StepCompleted)
    trainer = et.Trainer(
        script.step_fn, script.state, subscribers=[scheduler, recorder], steps_per_call=steps_per_call
    )
    for steps in fits:
        trainer.fit(script.data, steps=steps)
        saved = json.loads(json.dumps(scheduler.state_dict()))
        scheduler.load_state_dict(saved)
    assert used(recorder) == [np.float32(2.0 ** -(step // 3)) for step in range(sum(fits))]


def test_only_changes_are_sent() -> None:
    scheduler = subs.LearningRateScheduler(
        optax.piecewise_constant_schedule(0.5, {30: 0.5, 120: 0.5}), by="step"
    )
    trainer, recorder = make_trainer(sgd(), [scheduler])
    trainer.fit(DATA, epochs=3)
    assert changes(recorder) == [(30, 0.25), (120, 0.125)]
    assert recorder.of(et.HyperparamChanged)[0].reason == "schedule, step 30"


def test_a_table_of_values_may_end_with_the_run() -> None:
    table = [1 / (step + 1) for step in range(2 * LENGTH)]
    scheduler = subs.LearningRateScheduler(lambda step: table[step], by="step")
    trainer, recorder = make_trainer(sgd(), [scheduler])
    trainer.fit(DATA, epochs=2)
    assert used(recorder) == [np.float32(value) for value in table]
    with pytest.raises(et.SubscriberError, match=r"schedule\(100\) raised IndexError"):
        trainer.fit(DATA, epochs=1)


@pytest.mark.parametrize(("kind", "backend"), [("cosine", "trio"), ("piecewise", "asyncio")])
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(kind: str, backend: str) -> None:
    def make(checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, RecordingSubscriber]:
        by_step = subs.LearningRateScheduler(SCHEDULES[kind][0], by="step", lag=10)
        by_epoch = subs.HyperparamScheduler("b1", lambda epoch: 0.75 - epoch / 8)
        optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=0.5, b1=0.5)
        return make_trainer(optimiser, [by_step, by_epoch, checkpointer], backend=backend)

    def sequence(recorder: RecordingSubscriber, after: int = 0) -> list[Any]:
        events = [e for e in recorder.recorded if isinstance(e, et.StepCompleted | et.HyperparamChanged)]
        return [e.model_dump(exclude={"run_id", "attempt", "seq", "time"}) for e in events if e.seq > after]

    kept = MemoryCheckpointer(every=1)
    trainer, whole = make(kept)
    wanted = trainer.fit(DATA[:25], epochs=4).state
    for step in (1, 19, 20, 25, 31, 88, 99):
        resumed, again = make(kept)
        state = resumed.fit(DATA[:25], epochs=4, resume=step).state
        assert sequence(again) == sequence(whole, kept.saved[step].facts.stream.seq)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, wanted))


def test_a_resumed_run_that_is_to_go_further_than_planned_follows_the_schedule_further() -> None:
    def make(checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, RecordingSubscriber]:
        scheduler = subs.LearningRateScheduler(SCHEDULES["cosine"][0], by="step")
        return make_trainer(sgd(), [scheduler, checkpointer])

    kept = MemoryCheckpointer(every=20)
    trainer, _ = make(kept)
    trainer.fit(DATA, steps=20)
    resumed, recorder = make(kept)
    resumed.fit(DATA, steps=90, resume=20)
    expected, reference = make(MemoryCheckpointer(every=1000))
    expected.fit(DATA, steps=90)
    rates = [float(event.metrics["learning_rate"]) for event in recorder.of(et.StepCompleted)]
    assert rates == used(reference)[20:]


def test_a_scheduler_by_step_that_a_checkpoint_does_not_know_is_refused_at_the_resumption() -> None:
    kept = MemoryCheckpointer(every=5)
    trainer, _ = make_trainer(sgd(), [kept])
    trainer.fit(DATA, steps=10)
    scheduler = subs.LearningRateScheduler(lambda step: 0.1, by="step")
    trainer, _ = make_trainer(sgd(), [kept, scheduler])
    with pytest.raises(et.StateError, match="LearningRateScheduler was missing"):
        trainer.fit(DATA, steps=20, resume=10)


@pytest.mark.parametrize("part", ["all", "params"])
def test_after_a_restore_of_everything_the_value_of_the_schedule_is_sent_again(part: Any) -> None:
    scheduler = subs.LearningRateScheduler(lambda step: 0.5 if step < 10 else 0.25, by="step", lag=4)
    trainer, recorder = make_trainer(sgd(), [scheduler])

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step in (5, 20))
    async def go_back(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 5:
            control.snapshot("early")
        else:
            control.restore("early", part=part)

    trainer.fit(DATA, epochs=1)
    stale = 6 if part == "all" else 0  # the event of step 22 says it, for boundary 26
    assert used(recorder) == [0.5] * 10 + [0.25] * 10 + [0.5] * stale + [0.25] * (30 - stale)
    assert changes(recorder) == [(10, 0.25), *([(26, 0.25)] if part == "all" else [])]


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(11, 200), st.sampled_from([0, 1, 5, 64]), st.integers(1, 4))
def test_wherever_a_state_is_put_back_the_schedule_is_back_a_lag_and_a_block_later_at_most(
    step: int, lag: int, steps_per_call: int
) -> None:
    scheduler = subs.LearningRateScheduler(lambda step: 0.5 if step < 10 else 0.25, by="step", lag=lag)
    script = et.testing.ScriptedStep({"loss": [1.0]}, steps_per_epoch=320, learning_rate=9.0)
    recorder = RecordingSubscriber(et.StepCompleted)
    trainer = et.Trainer(
        script.step_fn, script.state, subscribers=[scheduler, recorder], steps_per_call=steps_per_call
    )

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step in (5, step))
    async def go_back(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 5:
            control.snapshot("early")
        else:
            control.restore("early")

    trainer.fit(script.data, epochs=1)
    block = max(1, lag // 2)
    back = (step // block + 1) * block + lag  # the next step that brings a block, and its lag
    assert back <= step + lag + block
    assert used(recorder) == [0.5] * 10 + [0.25] * (step - 10) + [0.5] * (back - step) + [0.25] * (320 - back)


@pytest.mark.parametrize("bad", [49, 60])
def test_after_a_rollback_the_rest_of_the_run_has_the_rates_of_the_schedule(bad: int) -> None:
    def step(state: Any, batch: jax.Array) -> Any:
        rate = state["opt_state"].hyperparams["learning_rate"]
        return {**state, "w": state["w"] + batch}, {"loss": state["w"], "learning_rate": rate}

    policies = [
        subs.LearningRateScheduler(optax.piecewise_constant_schedule(0.5, {40: 0.5}), by="step"),
        subs.TerminateOnNaN("rollback", snapshot_every=32, lag=4, lr_factor=1.0),
    ]
    recorder = RecordingSubscriber(et.StepCompleted | et.CheckpointRestored)
    state = {"w": jnp.zeros(()), "opt_state": sgd().init(jnp.zeros(()))}
    trainer = et.Trainer(step, state, subscribers=[*policies, recorder])
    trainer.fit([np.float32(math.nan if k == bad else 1.0) for k in range(1, 201)], epochs=1)
    back = bad + 1 + 4  # the loss shows it a step later
    assert [(e.step, e.restored_step) for e in recorder.of(et.CheckpointRestored)] == [(back, 32)]
    block = 64 if back < 64 else 96  # the event of the next block's step says it, for 64 steps later
    assert used(recorder) == [0.5] * 40 + [0.25] * (back - 40) + [0.5] * (block + 64 - back) + [0.25] * (
        136 - block
    )


# --- by epoch: Keras -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_by_epoch_each_epoch_has_its_rate_from_its_first_step_on(steps_per_call: int, backend: str) -> None:
    scheduler = subs.LearningRateScheduler(lambda epoch: 0.5 / (epoch // 2 + 1))
    trainer, recorder = make_trainer(sgd(), [scheduler], backend=backend, steps_per_call=steps_per_call)
    trainer.fit(DATA[:5], epochs=3)
    trainer.fit(DATA[:5], epochs=2)
    rates = [np.float32(0.5 / (epoch // 2 + 1)) for epoch in range(5) for _ in range(5)]
    assert used(recorder) == rates
    assert changes(recorder) == [(10, np.float32(0.25)), (20, np.float32(0.5 / 3))]
    assert recorder.of(et.HyperparamChanged)[0].cause == et.Cause(
        event="epoch_started", step=10, subscriber="LearningRateScheduler"
    )


def test_a_schedule_of_epoch_and_value_gets_the_value_in_effect_as_in_keras() -> None:
    got: list[tuple[int, float]] = []

    def schedule(epoch: int, lr: float) -> float:
        got.append((epoch, lr))
        return lr if epoch < 2 else lr * math.exp(-0.1)

    trainer, recorder = make_trainer(sgd(0.5), [subs.LearningRateScheduler(schedule)])
    trainer.fit(DATA[:2], epochs=4)
    first = float(np.float32(0.5 * math.exp(-0.1)))
    second = float(np.float32(first * math.exp(-0.1)))
    assert got == [(0, 0.5), (1, 0.5), (2, 0.5), (3, first)]
    assert all(type(lr) is float for _, lr in got)
    assert used(recorder) == [0.5, 0.5, 0.5, 0.5, first, first, second, second]


def test_by_epoch_the_schedule_wins_over_what_others_did_meanwhile() -> None:
    trainer, recorder = make_trainer(sgd(0.5), [subs.LearningRateScheduler(lambda epoch: 0.5)])

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 1)
    async def interfere(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.125)

    trainer.fit(DATA[:3], epochs=2)
    assert used(recorder) == [0.5, 0.125, 0.125, 0.5, 0.5, 0.5]


def test_a_value_that_is_the_same_in_float32_is_no_change() -> None:
    trainer, recorder = make_trainer(sgd(0.1), [subs.LearningRateScheduler(lambda epoch: 0.1)])
    trainer.fit(DATA[:3], epochs=2)
    assert changes(recorder) == []


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_a_run_continued_after_an_interruption_has_the_rates_of_the_whole(by: Any) -> None:
    def make() -> subs.LearningRateScheduler:
        return subs.LearningRateScheduler(lambda at: 0.9**at, by=by)

    whole, expected = make_trainer(sgd(), [make()])
    wanted = whole.fit(DATA[:9], epochs=6).state
    trainer, recorder = make_trainer(sgd(), [make()])

    @trainer.on(et.EpochCompleted, lag=0, where=lambda event: event.epoch == 3)
    async def interrupt(event: et.EpochCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    assert trainer.fit(DATA[:9], epochs=6).stop_reason == "interrupted"
    result = trainer.fit(DATA[:9], epochs=2)
    assert used(recorder) == used(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), result.state, wanted))


# --- other hyperparameters -----------------------------------------------------------------------------------


def test_several_hyperparameters_follow_several_schedules() -> None:
    optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, b1=0.9, weight_decay=0.0)
    policies = [
        subs.HyperparamScheduler("weight_decay", optax.linear_schedule(0.0, 0.25, 64), by="step"),
        subs.HyperparamScheduler("b1", lambda epoch, b1: b1 - 0.125),
        subs.LearningRateScheduler(optax.cosine_decay_schedule(0.1, 80), by="step"),
    ]
    policies[1].name = "momentum"
    trainer, recorder = make_trainer(optimiser, policies)
    trainer.fit(DATA, epochs=2)
    assert used(recorder, "weight_decay") == [min(step, 64) / 256 for step in range(100)]
    assert used(recorder, "learning_rate")[:2] == [np.float32(0.1), np.float32(0.09996145)]
    b1 = np.float32(np.float32(0.9) - 0.125)
    assert used(recorder, "b1") == [b1] * 50 + [np.float32(b1 - 0.125)] * 50
    causes = {event.name: event.cause for event in recorder.of(et.HyperparamChanged)}
    assert causes["b1"] is not None
    assert causes["b1"].subscriber == "momentum"


def test_the_path_decides_where_a_name_stands_in_several_places() -> None:
    params = {"w": jnp.ones(2)}
    optimiser = optax.chain(
        optax.inject_hyperparams(optax.scale)(step_size=1.0), optax.inject_hyperparams(optax.scale)(step_size=2.0)
    )  # fmt: skip
    state = {"params": params, "opt_state": optimiser.init(params)}

    def step(state: Any, batch: Any) -> Any:
        first, second = state["opt_state"]
        return state, {"first": first.hyperparams["step_size"], "second": second.hyperparams["step_size"]}

    recorder = RecordingSubscriber(et.StepCompleted)
    policies = [
        subs.HyperparamScheduler("step_size", lambda epoch: 3.0, path="[1]"),
        subs.LearningRateScheduler(lambda step: 4.0 + step, by="step", hyperparam="step_size", path="[0]"),
    ]
    trainer = et.Trainer(step, state, subscribers=[*policies, recorder])
    trainer.fit([np.float32(0)] * 2, epochs=1)
    assert [dict(event.metrics) for event in recorder.of(et.StepCompleted)] == [
        {"first": 4.0, "second": 3.0},
        {"first": 5.0, "second": 3.0},
    ]


# --- what goes wrong -----------------------------------------------------------------------------------------


def fails_at(index: int, result: Any) -> Callable[[int], Any]:
    def schedule(at: int) -> Any:
        if at >= index and isinstance(result, Exception):
            raise result
        return result if at >= index else 0.25

    return schedule


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("by", ["epoch", "step"])
@pytest.mark.parametrize("result", [math.nan, math.inf, None, "0.1", ValueError("no such epoch")])
def test_a_schedule_that_gives_no_number_fails_the_run_and_leaves_the_value(
    tmp_path: Path, result: Any, by: Any, backend: str
) -> None:
    index = 2 if by == "epoch" else 120
    scheduler = subs.LearningRateScheduler(fails_at(index, result), by=by)
    trainer, recorder = make_trainer(sgd(), [scheduler], backend=backend, run_dir=tmp_path)
    with pytest.raises(et.SubscriberError) as caught:
        trainer.fit(DATA, epochs=10)
    text = str(caught.value)
    assert f"LearningRateScheduler: schedule({index})" in text
    assert "ValueError: no such epoch" in text or repr(result) in text
    assert isinstance(caught.value.__cause__, HyperparamError)
    assert set(used(recorder)) == {0.25}
    assert float(trainer.state["opt_state"].hyperparams["learning_rate"]) == 0.25


@pytest.mark.parametrize(
    ("optimiser", "error", "words"),
    [
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), et.UnknownHyperparam, "learning_rate"),
        (
            optax.inject_hyperparams(optax.adamw)(
                learning_rate=0.1, weight_decay=optax.constant_schedule(0.1)
            ),
            et.ScheduledHyperparam,
            "follows a schedule",
        ),
    ],
)
def test_an_optimiser_whose_hyperparameter_cannot_be_set_is_refused_at_the_start(
    optimiser: Any, error: type[Exception], words: str
) -> None:
    trainer, recorder = make_trainer(optimiser, [subs.HyperparamScheduler("weight_decay", lambda epoch: 0.1)])
    with pytest.raises(error, match=words):
        trainer.fit(DATA, epochs=1)
    assert recorder.of(et.RunStarted) == []


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": 0.1},
        {"by": "batch"},
        {"lag": -1},
        {"lag": 1.5},
        {"schedule": lambda step, lr: lr, "by": "step"},
    ],
)
@pytest.mark.parametrize(
    "kind", [subs.LearningRateScheduler, lambda **o: subs.HyperparamScheduler("b1", **o)]
)
def test_arguments_that_cannot_work_are_refused_by_name(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        kind(**{"schedule": lambda epoch: 0.1, **options})
    assert next(iter(options)) in str(caught.value)


def test_the_events_of_a_schedule_by_step_are_not_to_be_thinned_out() -> None:
    scheduler = subs.LearningRateScheduler(lambda step: 0.1, by="step")
    scheduler.every = 10
    trainer, _ = make_trainer(sgd(), [scheduler])
    with pytest.raises(et.ConfigurationError, match="every=10"):
        trainer.fit(DATA, epochs=1)


@pytest.mark.parametrize(
    "state", [{}, {"version": 2}, {"version": 1, "epoch": 3}, {"version": 1, "sent": "x"}]
)
def test_a_state_of_another_kind_is_refused(state: Any) -> None:
    for scheduler in (
        subs.LearningRateScheduler(lambda epoch: 0.1),
        subs.HyperparamScheduler("b1", lambda epoch: 0.1),
    ):
        scheduler.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
        with pytest.raises(et.StateError, match=type(scheduler).__name__):
            scheduler.load_state_dict(state)
