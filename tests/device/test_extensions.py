"""EMA, SWA and the counters of skipped updates, each by itself and inside the compiled step."""

from __future__ import annotations

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import eventtrain as et
from eventtrain.device import weight_averaging as averaging
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.extensions import StepExtension
from eventtrain.device.state import copy_leaves, place, split_state
from eventtrain.errors import ConfigurationError


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_decay_outside_the_open_unit_interval_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"EMA: decay must be strictly between 0 and 1, got"):
        et.EMA(decay)


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "3", None])
@pytest.mark.parametrize("argument", ["start", "every"])
def test_a_start_or_an_interval_that_counts_no_steps_is_refused(argument: str, given: Any) -> None:
    arguments: dict[str, Any] = {"start": 1, "every": 1, argument: given}
    with pytest.raises(ConfigurationError, match=rf"SWA: {argument} must be an integer >= 1, got"):
        et.SWA(**arguments)


@pytest.mark.parametrize("given", ["eval", ["evaluate"], ["eval", "test"], [1], [["eval"]], None, 3])
@pytest.mark.parametrize(
    "make", [lambda uses: et.EMA(0.5, use_for=uses), lambda uses: et.SWA(1, use_for=uses)]
)
def test_an_unknown_use_is_refused_with_the_known_ones(make: Any, given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"use_for must be .*'eval', 'predict', 'final', got"):
        make(given)


@pytest.mark.parametrize("given", [["eval"], ("eval",), {"eval"}, {"eval": 1}, iter(["eval"])])
def test_any_collection_of_uses_is_taken(given: Any) -> None:
    if not hasattr(given, "__len__"):  # an iterator is none: reading it once would empty it
        with pytest.raises(ConfigurationError):
            et.EMA(0.5, use_for=given)
    else:
        assert et.EMA(0.5, use_for=given).use_for == {"eval"}
        assert et.SWA(1, use_for=given).use_for == {"eval"}


def test_an_exponential_average_starts_at_the_weights_and_follows_the_formula() -> None:
    ema = et.EMA(0.75)
    params = {"w": jnp.float32(4)}
    average = ema.init(params)
    assert ema.weights(average, params)["w"].tolist() == 4
    for new in (8.0, 0.0):
        params = {"w": jnp.float32(new)}
        average = ema.update(average, params, jnp.int32(1))
    assert ema.weights(average, params)["w"].tolist() == 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 0


def test_a_bfloat16_average_moves_by_increments_that_bfloat16_would_round_away() -> None:
    ema = et.EMA(0.999)
    ones, zeros = jnp.ones((), jnp.bfloat16), jnp.zeros((), jnp.bfloat16)
    average = ema.init(ones)
    for _ in range(100):
        average = ema.update(average, zeros, jnp.int32(1))
    assert ema.weights(average, zeros).dtype == jnp.float32
    np.testing.assert_allclose(ema.weights(average, zeros), 0.999**100, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_an_exponential_average_arrives_where_the_weights_stay(decay: float) -> None:
    # In plain float32 it would stop where an increment is half a unit in the last place: 3e-5 short for 0.999.
    ema, steps = et.EMA(decay), round(20 / (1 - decay))
    stays = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 100), jnp.float32)

    @jax.jit
    def run(start: jax.Array) -> jax.Array:
        end = lax.fori_loop(
            0, steps, lambda _, state: ema.update(state, stays, jnp.int32(1)), ema.init(start)
        )
        return ema.weights(end, stays)

    np.testing.assert_allclose(run(jnp.zeros(100)), stays, rtol=1e-7)


@pytest.mark.slow
@given(start=st.integers(1, 9), every=st.integers(1, 5), steps=st.integers(0, 25), by_select=st.booleans())
def test_a_uniform_average_is_the_mean_of_the_weights_after_the_steps_that_count(
    start: int, every: int, steps: int, by_select: bool
) -> None:
    swa = et.SWA(start, every)
    weights = np.random.default_rng(start).normal(3, 1, (steps + 1, 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if by_select:  # what a GPU does
            patch.setattr(
                averaging.lax, "platform_dependent", lambda *state, cuda, **_: cuda(*state), raising=True
            )
        state, update = swa.init({"w": jnp.asarray(weights[0])}), jax.jit(swa.update)
        for step in range(1, steps + 1):
            state = update(state, {"w": weights[step]}, np.int32(step))
    counted = weights[start : steps + 1 : every].astype(np.float64)
    assert state["count"].dtype == jnp.int32
    assert state["count"].tolist() == len(counted)
    found = swa.weights(state, {"w": jnp.asarray(weights[-1])})["w"]
    np.testing.assert_allclose(found, counted.mean(0) if len(counted) else weights[-1], rtol=2e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_on_a_gpu_a_uniform_average_makes_no_dispatch_wait_for_a_decision(platform: str) -> None:
    swa, params = et.SWA(10, 5), {"w": jnp.ones(3)}
    traced = jax.jit(swa.update).trace(swa.init(params), params, jnp.int32(1))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    decided = re.search(r"(%\w+) = stablehlo.convert %\w+ : \(tensor<i1>\).*\n.*stablehlo.case\"\(\1\)", text)
    assert (decided is not None) == (platform in ("cpu", "tpu"))


@pytest.mark.parametrize("extension", [et.EMA(0.5), et.SWA(2)], ids=repr)
def test_leaves_that_are_no_floats_are_the_newest(extension: StepExtension) -> None:
    params = {
        "n": jnp.int32(3),
        "flag": jnp.asarray(True),
        "key": jax.random.key(0),
        "f": jax.nn.relu,
        "w": jnp.zeros(2),
    }
    state = extension.init(params)
    new = params | {"n": jnp.int32(9), "flag": jnp.asarray(False), "key": jax.random.key(1)}
    for step in (1, 2):
        state = extension.update(state, new, jnp.int32(step))
    found = extension.weights(state, new)
    assert found["n"].tolist() == 9
    assert found["flag"].tolist() is False
    assert found["key"] == jax.random.key(1)
    assert found["f"] is jax.nn.relu


def grow(state: Any, batch: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    return jax.tree.map(lambda x: x + batch if eqx.is_array(x) else x, state), {}


def test_an_equinox_module_is_averaged_inside_the_compiled_step() -> None:
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    leaves, structure = split_state(model)
    leaves = copy_leaves(place(leaves))
    extensions = {"half": et.EMA(0.5, name="half"), "ema": et.EMA(0.75), "swa": et.SWA(1)}
    step = CompiledStep(grow, structure, leaves, extensions=list(extensions.values()))
    step.prepare(np.float32(1))
    carry = step.initial(leaves)
    step(carry, np.float32(1))
    step(carry, np.float32(1))
    states = step.extension_states(carry.ext_leaves)
    averages = {name: extensions[name].weights(state, model) for name, state in states.items()}
    bias = model.layers[0].bias
    np.testing.assert_allclose(averages["half"].layers[0].bias, bias + 0.5 * 0.5 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(averages["ema"].layers[0].bias, bias + 0.25 * 0.75 + 0.5, rtol=1e-6)
    np.testing.assert_allclose(averages["swa"].layers[0].bias, bias + 1.5, rtol=1e-6)
    assert averages["ema"](jnp.ones(2)).shape == (2,)


def test_the_averages_are_buffers_of_their_own_from_the_start() -> None:
    leaves, structure = split_state({"w": jnp.ones(4)})
    leaves = copy_leaves(place(leaves))
    step = CompiledStep(lambda s, b: (s, {}), structure, leaves, extensions=[et.EMA(0.5), et.SWA(1)])
    step.prepare(np.float32(1))
    carry = step.initial(leaves)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in [*carry.leaves, *carry.ext_leaves]}
    assert len(pointers) == 5  # weights, two averages, number of samples, number of completed steps


PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
GUARDED = optax.apply_if_finite(optax.inject_hyperparams(optax.adam)(1e-3), max_consecutive_errors=3)


@pytest.mark.parametrize(
    "optimiser",
    [
        GUARDED,
        optax.chain(optax.scale(2.0), GUARDED),
        optax.inject_hyperparams(lambda learning_rate: optax.apply_if_finite(optax.sgd(learning_rate), 3))(
            0.1
        ),
        optax.partition({"x": GUARDED, "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
    ],
    ids=["alone", "in a chain", "inside of injected", "for a part"],
)
def test_the_counters_of_skipped_updates_are_found_at_any_depth(optimiser: Any) -> None:
    state = optimiser.init(PARAMS)
    for value in (1.0, np.nan, np.inf):
        gradients = {name: jnp.full_like(weights, value) for name, weights in PARAMS.items()}
        _, state = optimiser.update(gradients, state, PARAMS)
    found = et.nonfinite_metrics(state, prefix="adam_")
    assert {name: value.tolist() for name, value in found.items()} == {
        "adam_notfinite_count": 2,
        "adam_total_notfinite": 2,
        "adam_last_finite": False,
    }
    assert set(et.nonfinite_metrics(state)) == {"notfinite_count", "total_notfinite", "last_finite"}


def test_counters_that_are_missing_are_an_error_that_names_the_wrapper() -> None:
    with pytest.raises(ConfigurationError, match=r"optax\.apply_if_finite\(optax\.adam"):
        et.nonfinite_metrics(optax.adam(1e-3).init(PARAMS))


def test_several_counters_are_an_error_that_says_where_they_stand() -> None:
    states = {"x": GUARDED.init(PARAMS), "y": GUARDED.init(PARAMS)}
    with pytest.raises(ConfigurationError, match=r"2 states.*opt_state\['x'\]; opt_state\['y'\].*prefix"):
        et.nonfinite_metrics(states)
    assert et.nonfinite_metrics(states["x"], prefix="x_")["x_last_finite"]


def test_behind_two_billion_steps_the_count_of_an_extension_stays_positive() -> None:
    class Steps(et.StepExtension):
        name = "steps"

        def init(self, params: Any) -> Any:
            return jnp.int32(0)

        def update(self, ext_state: Any, params: Any, step: Any) -> Any:
            return step

    def step(state: Any, batch: Any) -> Any:
        return {"params": state["params"] + batch}, {"loss": batch}

    for before in (2**31 - 3, 2**31 + 5):
        trainer = et.Trainer(step, {"params": jnp.float32(0)}, step_extensions=[Steps()])
        trainer._model.step = before
        assert trainer.fit([np.float32(1)] * 4, epochs=1).step == before + 4
        assert int(trainer.extension_states()["steps"]) == 2**31 - 1
