"""LRFinder: what it finds, and that nothing of the test is left in the state."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.policies.lr_finder import LRFinderState, RangeTest
from eventtrain.testing import RecordingSubscriber
from tests.support.saved_in_memory import MemoryCheckpointer

SEEN = et.StepCompleted | et.HyperparamChanged | et.CheckpointRestored | et.SnapshotTaken | et.RunCompleted
DATA = [jnp.asarray(row) for row in np.random.default_rng(0).normal(size=(40, 8, 4)).astype(np.float32)]
OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)


def step_fn(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ params["w"]) @ params["v"] - batch[:, :1]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt_state = OPTIMISER.update(grads, state["opt_state"], state["params"])
    metrics = {"loss": loss, "rate": opt_state.hyperparams["learning_rate"]}
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def new_state() -> Any:
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (4, 16)), "v": jax.random.normal(keys[1], (16, 1))}
    return {"params": params, "opt_state": OPTIMISER.init(params)}


def make_trainer(
    subscribers: Sequence[et.Subscriber], step: Any = step_fn, state: Any = None, **options: Any
) -> tuple[et.Trainer, RecordingSubscriber]:
    recorder = RecordingSubscriber(SEEN)
    state = new_state() if state is None else state
    return et.Trainer(step, state, subscribers=[*subscribers, recorder], **options), recorder


def loss_of_rate(loss: Any) -> tuple[Any, Any]:
    """A step whose loss is a function of the learning rate that it was computed with."""
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)

    def step(state: Any, batch: Any) -> Any:
        rate = state["opt_state"].hyperparams["learning_rate"]
        return {**state, "steps": state["steps"] + 1}, {"loss": loss(rate), "rate": rate}

    params = {"w": jnp.ones(2)}
    return step, {"params": params, "opt_state": optimiser.init(params), "steps": jnp.int32(0)}


def same_bits(one: Any, other: Any) -> bool:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(one)] == [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(other)
    ]


def endless(epoch: int) -> Iterator[Any]:
    while True:
        yield from DATA


# --- what it finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps_per_call", "backend", "lag"), [(1, "asyncio", 64), (4, "trio", 7), (1, "trio", 0)]
)
def test_the_rate_grows_exponentially_and_the_steepest_fall_is_suggested(
    steps_per_call: int, backend: str, lag: int
) -> None:
    def loss(rate: Any) -> Any:
        return 2.0 - jax.nn.sigmoid(4 * (jnp.log10(rate) + 3))  # falls fastest at 1e-3

    finder = subs.LRFinder(1e-6, 1.0, 61, smoothing=0.0, lag=lag)
    trainer, recorder = make_trainer(
        [finder], *loss_of_rate(loss), steps_per_call=steps_per_call, backend=backend
    )
    result = trainer.fit([np.float32(0)] * 500, epochs=1)
    assert (result.step, result.stop_reason) == (61 + lag, "lr finder: loss was observed for all 61 steps")
    np.testing.assert_allclose(finder.learning_rates, np.geomspace(1e-6, 1.0, 61), rtol=1e-12)
    used = [event.metrics["rate"] for event in recorder.of(et.StepCompleted)]
    assert used[:61] == [np.float32(rate) for rate in finder.learning_rates]
    assert finder.losses == [event.metrics["loss"] for event in recorder.of(et.StepCompleted)][:61]
    assert finder.smoothed == pytest.approx(finder.losses, rel=1e-12)
    assert finder.suggestion == pytest.approx(1e-3)
    assert all(type(value) is float for value in (*finder.learning_rates, *finder.losses, *finder.smoothed))


def test_without_a_fall_there_is_no_suggestion_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    finder = subs.LRFinder(num_steps=20)
    trainer, _ = make_trainer([finder], *loss_of_rate(lambda rate: 1.0 + rate * 1e-3))
    trainer.fit([np.float32(0)] * 20, epochs=1)
    assert len(finder.losses) == 20
    assert finder.suggestion is None
    assert "LRFinder has no suggestion" in caplog.text


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda rate: jnp.where(rate > 0.05, jnp.nan, 1.0), "loss was nan at"),
        (lambda rate: jnp.where(rate > 0.05, jnp.inf, 1.0), "loss was inf at"),
        (lambda rate: jnp.where(rate > 0.05, 4.1, 1.0), "loss diverged at"),
        (lambda rate: jnp.where(rate > 0.05, 2.1, -1.0), "loss diverged at"),
    ],
)
def test_a_loss_that_diverges_or_is_no_number_ends_the_test(loss: Any, why: str) -> None:
    finder = subs.LRFinder(1e-4, 1.0, 41, smoothing=0.0, lag=3)
    trainer, _ = make_trainer([finder], *loss_of_rate(loss))
    result = trainer.fit([np.float32(0)] * 200, epochs=1)
    rates = np.geomspace(1e-4, 1.0, 41)
    bad = int((rates > 0.05).argmax())
    assert result.stop_reason == f"lr finder: {why} {rates[bad]:.3g}"
    assert result.step == bad + 1 + 3
    assert len(finder.losses) == bad + ("diverged" in why)
    assert all(math.isfinite(value) for value in (*finder.losses, *finder.smoothed))


def test_divergence_none_goes_on_to_the_end() -> None:
    finder = subs.LRFinder(num_steps=30, divergence=None)
    trainer, _ = make_trainer([finder], *loss_of_rate(lambda rate: 1.0 + 100 * rate))
    trainer.fit([np.float32(0)] * 30, epochs=1)
    assert len(finder.losses) == 30


# --- the state is put back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", ["keep", "copy"])
@pytest.mark.parametrize(("steps_per_call", "backend"), [(1, "asyncio"), (4, "trio")])
def test_stop_leaves_the_state_bit_for_bit_as_it_was(
    steps_per_call: int, backend: str, snapshot: str
) -> None:
    finder = subs.LRFinder(num_steps=50, lag=10)
    trainer, recorder = make_trainer(
        [finder],
        steps_per_call=steps_per_call,
        backend=backend,
        snapshot=snapshot,
        step_extensions=[et.EMA(0.9)],
    )
    trainer.fit(DATA[:5], steps=50)  # shorter than test and lag: the end of the run puts the state back
    assert same_bits(trainer.state, new_state())
    assert trainer.step == 50
    assert len(finder.losses) == 50
    first = list(finder.losses)
    result = trainer.fit(DATA, epochs=3)
    assert result.stop_reason is not None
    assert result.stop_reason.startswith("lr finder: ")
    assert same_bits(result.state, new_state())
    assert dict(trainer.control.snapshots) == {}
    assert (len(recorder.of(et.SnapshotTaken)), len(recorder.of(et.CheckpointRestored))) == (2, 2)
    assert finder.losses != first  # other batches: a test of its own


@pytest.mark.parametrize("then", ["continue", "apply"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_goes_on_as_if_the_test_had_not_been(backend: str, then: Any) -> None:
    finder = subs.LRFinder(1e-4, 3.0, 30, smoothing=0.9, lag=6, divergence=None, then=then)
    trainer, recorder = make_trainer([finder], backend=backend, step_extensions=[et.EMA(0.9)])
    result = trainer.fit(DATA + DATA, epochs=1)
    assert result.step == 80
    (restored,) = recorder.of(et.CheckpointRestored)
    assert (restored.step, restored.restored_step, restored.part) == (36, 0, "all")
    assert dict(trainer.control.snapshots) == {}
    state = new_state()
    if then == "apply":
        assert finder.suggestion is not None
        state["opt_state"].hyperparams["learning_rate"] = jnp.float32(finder.suggestion)
    fresh, _ = make_trainer([], state=state, step_extensions=[et.EMA(0.9)])
    assert same_bits(result.state, fresh.fit((DATA + DATA)[36:], epochs=1).state)
    assert same_bits(trainer.extension_states(), fresh.extension_states())


@pytest.mark.parametrize("then", ["stop", "continue", "apply"])
def test_data_that_end_before_the_test_have_the_state_put_back_at_the_end(
    then: Any, caplog: pytest.LogCaptureFixture
) -> None:
    finder = subs.LRFinder(then=then, lag=5)
    trainer, recorder = make_trainer([finder])
    result = trainer.fit(lambda epoch: iter(DATA[:20]), epochs=2)
    assert (result.step, result.stop_reason) == (40, "completed")
    assert same_bits(result.state, new_state())
    assert [event.step for event in recorder.of(et.CheckpointRestored)] == [40]
    assert len(finder.losses) == 40
    assert "ended after 40 of the 100 steps" in caplog.text


@pytest.mark.parametrize("after", [-3, 0, 1, 2])
def test_data_that_end_around_the_moment_of_the_effect_have_the_state_put_back_once(after: int) -> None:
    trainer, _ = make_trainer([subs.LRFinder(num_steps=35 - after, lag=5, divergence=None, then="continue")])
    state = trainer.fit(lambda epoch: iter(DATA), epochs=1).state  # 40 steps
    fresh, _ = make_trainer([])
    assert same_bits(state, fresh.fit(DATA[-after:], epochs=1).state if after > 0 else new_state())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_interrupted_test_is_begun_anew_from_the_state_before_it(backend: str) -> None:
    finder = subs.LRFinder(1e-5, 1.0, 30, lag=5)
    trainer, recorder = make_trainer([finder], backend=backend)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 12)
    async def interrupt(event: et.StepCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    assert trainer.fit(endless, epochs=1).stop_reason == "interrupted"
    assert not same_bits(trainer.state, new_state())
    result = trainer.fit(endless, epochs=1)
    assert result.stop_reason == "lr finder: loss was observed for all 30 steps"
    assert same_bits(result.state, new_state())
    assert len(recorder.of(et.SnapshotTaken)) == 1
    alone = subs.LRFinder(1e-5, 1.0, 30, lag=5)
    make_trainer([alone])[0].fit(endless, epochs=1)
    assert finder.losses == alone.losses


@pytest.mark.parametrize("then", ["stop", "apply"])
def test_a_run_resumed_in_the_middle_of_the_test_is_the_uninterrupted_one(then: Any) -> None:
    def make(checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, RecordingSubscriber, subs.LRFinder]:
        finder = subs.LRFinder(1e-4, 3.0, 20, lag=6, divergence=None, then=then)
        return *make_trainer([finder, checkpointer]), finder

    kept = MemoryCheckpointer(every=1)
    trainer, _, finder = make(kept)
    wanted = trainer.fit(DATA, epochs=1)
    assert finder.suggestion is not None
    for step in (1, 5, 20, 23) if then == "stop" else (1, 17, 20, 26, 27, 39):
        resumed, _, again = make(kept)
        result = resumed.fit(DATA, epochs=1, resume=step)
        assert (result.step, result.stop_reason) == (wanted.step, wanted.stop_reason)
        assert same_bits(result.state, wanted.state)
        assert again.state_dict() == finder.state_dict()


def test_a_test_that_is_over_is_not_repeated_by_who_takes_its_state_over() -> None:
    finder = subs.LRFinder(num_steps=20, lag=2)
    make_trainer([finder])[0].fit(endless, epochs=1)
    state = json.loads(json.dumps(finder.state_dict(), allow_nan=False))
    again = subs.LRFinder(num_steps=20, lag=2)
    again.load_state_dict(state)
    assert (again.suggestion, again.losses) == (finder.suggestion, finder.losses)
    trainer, recorder = make_trainer([again])
    assert trainer.fit(DATA, epochs=1).step == 40
    assert recorder.of(et.HyperparamChanged) == []


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"min_lr": 0.0},
        {"min_lr": math.nan},
        {"min_lr": 20.0},
        {"max_lr": math.inf},
        {"num_steps": 3},
        {"num_steps": 10.5},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"divergence": 1.0},
        {"divergence": "4"},
        {"then": "pause"},
        {"lag": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.LRFinder(**options)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize(("then", "needed"), [("stop", 100), ("continue", 165), ("apply", 165)])
def test_a_run_known_to_be_too_short_is_refused_at_its_start(then: Any, needed: int) -> None:
    for fit in ({"steps": needed - 1}, {"epochs": (needed - 1) // len(DATA)}):
        trainer, recorder = make_trainer([subs.LRFinder(then=then)])
        with pytest.raises(et.ConfigurationError, match=f"at least {needed} steps"):
            trainer.fit(DATA, **fit)
        assert recorder.recorded == []
    make_trainer([subs.LRFinder(then=then)])[0].fit(DATA, steps=needed)


def test_the_steps_of_the_test_are_not_to_be_thinned_out() -> None:
    finder = subs.LRFinder()
    finder.every = 2
    with pytest.raises(et.ConfigurationError, match="every=2"):
        make_trainer([finder])[0].fit(endless, epochs=1)


def test_a_metric_that_is_not_there_fails_the_run_with_the_names_that_are() -> None:
    trainer, _ = make_trainer([subs.LRFinder(monitor="losss")])
    with pytest.raises(et.ConfigurationError, match=r"LRFinder monitors 'losss'.*loss"):
        trainer.fit(endless, epochs=1)


def test_an_optimiser_without_the_hyperparameter_is_refused_at_the_start() -> None:
    trainer, _ = make_trainer([subs.LRFinder(hyperparam="lr")])
    with pytest.raises(et.UnknownHyperparam, match="learning_rate"):
        trainer.fit(endless, epochs=1)


def test_without_the_state_before_the_test_the_run_fails_and_says_what_to_do() -> None:
    trainer, _ = make_trainer([subs.LRFinder()])

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 5)
    async def lose(event: et.StepCompleted, control: et.Control) -> None:
        control.snapshots["LRFinder/start"].release()

    with pytest.raises(et.SubscriberError, match=r'no room to keep it.*snapshot="host"'):
        trainer.fit(endless, epochs=1)


def test_a_resumed_run_that_knows_nothing_of_the_test_is_refused() -> None:
    kept = MemoryCheckpointer(every=5)
    make_trainer([kept])[0].fit(DATA, steps=10)
    trainer, _ = make_trainer([kept, subs.LRFinder()])
    with pytest.raises(et.ConfigurationError, match="LRFinder tests at the beginning of a run"):
        trainer.fit(DATA, steps=300, resume=5)


def test_a_test_whose_first_state_is_lost_is_not_gone_on_with() -> None:
    finder = subs.LRFinder()
    finder.load_state_dict(
        LRFinderState(first_step=0, learning_rates=(1e-7,), losses=(1.0,), smoothed=(1.0,)).to_json()
    )
    with pytest.raises(et.StateError, match="the state before it is lost"):
        make_trainer([finder])[0].fit(endless, epochs=1)


@pytest.mark.parametrize(
    "state", [{}, {"version": 2}, {"version": 1, "losses": ["x"]}, {"version": 1, "best": 1}]
)
def test_a_state_of_another_kind_is_refused(state: Any) -> None:
    with pytest.raises(et.StateError, match="LRFinder"):
        subs.LRFinder().load_state_dict(state)


def test_what_was_found_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eventtrain")
    finder = subs.LRFinder(1e-4, 3.0, 30, divergence=None)
    make_trainer([finder])[0].fit(DATA, steps=30)
    assert finder.suggestion is not None
    assert f"LRFinder suggests a learning rate of {finder.suggestion:.3g}" in caplog.text


# --- RangeTest ----------------------------------------------------------------------------------------------------


def test_the_rates_are_evenly_spaced_logarithms() -> None:
    test = RangeTest(1e-7, 10.0, 100)
    np.testing.assert_allclose([test.rate(i) for i in range(100)], np.geomspace(1e-7, 10.0, 100), rtol=1e-12)
    assert (test.rate(0), test.rate(99)) == (1e-7, pytest.approx(10.0, rel=1e-15))


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.98]))
def test_the_average_is_the_bias_corrected_one(losses: list[float], smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing, divergence=None)
    for index, loss in enumerate(losses):
        assert test.observe(index, loss) == ""
    average = 0.0
    for count, loss in enumerate(losses, 1):  # as Lightning writes it
        average = smoothing * average + (1 - smoothing) * loss
        assert test.state.smoothed[count - 1] == pytest.approx(average / (1 - smoothing**count), abs=1e-9)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=60), st.floats(1.1, 5.0))
def test_a_positive_loss_ends_the_test_at_the_first_multiple_of_the_best(
    losses: list[float], divergence: float
) -> None:
    test = RangeTest(1e-7, 10.0, 100, 0.0, divergence)
    first_bad = next(
        (i for i, loss in enumerate(losses) if loss - min(losses[: i + 1]) > (divergence - 1) * min(losses[: i + 1])),
        None,
    )  # fmt: skip
    ends = [index for index, loss in enumerate(losses) if test.observe(index, loss)]
    assert ends[:1] == ([] if first_bad is None else [first_bad])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_test_and_is_not_kept(loss: float) -> None:
    test = RangeTest(1e-3, 1e-1, 3)
    assert test.observe(0, 1.0) == ""
    assert test.observe(1, loss) == f"was {loss!r} at 0.01"
    assert (test.state.learning_rates, test.state.losses, test.state.smoothed) == ([1e-3], [1.0], [1.0])


@given(st.lists(st.floats(-4.0, 4.0).map(lambda x: round(x, 1)), max_size=50), st.sampled_from([0.0, 0.9]))
def test_the_suggestion_is_where_the_average_falls_fastest(losses: list[float], smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing, divergence=None)
    for index, loss in enumerate(losses):
        test.observe(index, loss)
    first, last = len(losses) // 10, len(losses) - 1
    curve = test.state.smoothed[first:last]
    falls = [curve[min(i + 1, len(curve) - 1)] - curve[max(i - 1, 0)] for i in range(len(curve))]
    if len(curve) > 1:
        falls = [f if 0 < i < len(curve) - 1 else 2 * f for i, f in enumerate(falls)]
    if len(curve) < 2 or min(falls) >= 0:
        assert test.suggestion is None
    else:
        assert test.suggestion is not None
        chosen = test.state.learning_rates.index(test.suggestion) - first
        assert falls[chosen] == pytest.approx(min(falls), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.98])
def test_a_loss_that_stays_the_same_has_no_suggestion(smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing)
    for index in range(100):
        over = test.observe(index, 0.3)
    assert over == "was observed for all 100 steps"
    assert test.suggestion is None
