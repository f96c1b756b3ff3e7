from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import eventtrain as et
from eventtrain.device.default_params import find_params
from eventtrain.device.hyperparams import Hyperparam, find_hyperparams, read, resolve, write
from eventtrain.device.state import place, split_state
from eventtrain.errors import (
    AmbiguousHyperparam,
    HyperparamError,
    ScheduledHyperparam,
    UnknownHyperparam,
)

PARAMS = {"a": jnp.ones(3), "b": jnp.ones(2)}


def sgd(rate: Any) -> optax.GradientTransformationExtraArgs:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


def rates(state: Any) -> list[Hyperparam]:
    return [h for h in find_hyperparams(state) if h.name == "learning_rate"]


NESTINGS = {
    "plain": sgd(0.5),
    "chain": optax.chain(optax.clip(1.0), sgd(0.5)),
    "masked": optax.masked(sgd(0.5), {"a": True, "b": False}),
    "MultiSteps": optax.MultiSteps(sgd(0.5), every_k_schedule=2),
    "apply_if_finite": optax.apply_if_finite(sgd(0.5), max_consecutive_errors=3),
    "deep": optax.chain(
        optax.apply_if_finite(optax.chain(optax.masked(sgd(0.5), {"a": True, "b": True})), 2)
    ),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_hyperparameter_is_found_and_written_in_any_nesting(nesting: str) -> None:
    optimiser = NESTINGS[nesting]
    state = {"params": PARAMS, "opt_state": optimiser.init(PARAMS)}
    (rate,) = rates(state)
    leaves, structure = split_state(state)
    leaves = place(leaves)
    assert structure.paths[rate.leaf_index] == rate.path
    assert not rate.scheduled
    assert read(leaves[rate.leaf_index]) == 0.5

    leaves[rate.leaf_index] = write(leaves[rate.leaf_index], 0.25)
    written = structure.join(leaves)
    for _ in range(2):  # MultiSteps applies every second update
        updates, new_state = optimiser.update(PARAMS, written["opt_state"], PARAMS)
        written = {"params": PARAMS, "opt_state": new_state}
    assert updates["a"].tolist() == [-0.25] * 3
    assert read(split_state(written)[0][rate.leaf_index]) == 0.25


def test_one_of_several_optimisers_is_chosen_by_a_part_of_its_path() -> None:
    optimiser = optax.partition({"fast": sgd(0.5), "slow": sgd(0.125)}, {"a": "fast", "b": "slow"})
    state = {"opt_state": optimiser.init(PARAMS), "params": PARAMS}
    found = rates(state)
    assert len(found) == 2
    with pytest.raises(AmbiguousHyperparam) as caught:
        resolve(found, "learning_rate")
    assert all(h.path in str(caught.value) for h in found)
    slow = resolve(found, "learning_rate", "slow")
    leaves, _ = split_state(state)
    assert read(leaves[slow.leaf_index]) == 0.125
    assert resolve(found, "learning_rate", slow.path) is slow
    with pytest.raises(AmbiguousHyperparam, match="with path 'opt_state' can mean 2"):
        resolve(found, "learning_rate", "opt_state")
    with pytest.raises(UnknownHyperparam, match=r"at path 'medium'\. Its paths are "):
        resolve(found, "learning_rate", "medium")


def test_inject_within_inject_finds_both_levels() -> None:
    def factory(outer_rate: Any) -> optax.GradientTransformation:
        return optax.chain(sgd(0.5), optax.scale(outer_rate))

    state = optax.inject_hyperparams(factory)(outer_rate=2.0).init(PARAMS)
    assert {h.name for h in find_hyperparams(state)} == {"outer_rate", "learning_rate"}
    assert len(rates(state)) == 1


def test_a_whole_path_is_not_taken_for_a_part_of_another() -> None:
    def factory(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(sgd(0.5), optax.scale(learning_rate))

    found = rates(optax.inject_hyperparams(factory)(learning_rate=2.0).init(PARAMS))
    outer, inner = sorted(found, key=lambda h: len(h.path))
    assert outer.path in inner.path
    assert resolve(found, "learning_rate", outer.path) is outer
    assert resolve(found, "learning_rate", "inner_state") is inner


def test_scheduled_hyperparameters_are_refused_in_any_nesting() -> None:
    scheduled = optax.chain(optax.masked(sgd(optax.linear_schedule(1.0, 0.0, 10)), {"a": True, "b": True}))
    state = {"opt_state": (scheduled.init(PARAMS), sgd(0.5).init(PARAMS))}
    one, other = rates(state)
    assert (one.scheduled, other.scheduled) == (True, False)
    with pytest.raises(ScheduledHyperparam) as caught:
        resolve([one], "learning_rate")
    assert str(caught.value) == (
        "Cannot set 'learning_rate': it follows a schedule, and optax would overwrite it at the next update. "
        "Build the optimiser with a number, or use subscribers.LearningRateScheduler."
    )
    assert resolve([one, other], "learning_rate", other.path) is other


def test_a_schedule_without_any_state_is_a_schedule_too() -> None:
    class State(NamedTuple):
        hyperparams: dict[str, Any]
        hyperparams_states: dict[str, Any]

    state = {"opt": [State({"learning_rate": jnp.float32(1)}, {"learning_rate": ()})]}
    (rate,) = find_hyperparams(state)
    assert rate.scheduled


def test_train_states_of_flax_and_equinox_are_searched() -> None:
    flax_state = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=optax.chain(sgd(0.5)))

    class Training(eqx.Module):
        model: eqx.Module
        opt_state: Any

    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    equinox_state = Training(model, sgd(0.5).init(eqx.filter(model, eqx.is_array)))
    for state in (flax_state, equinox_state):
        (rate,) = rates(state)
        leaves, structure = split_state(state)
        assert structure.paths[rate.leaf_index] == rate.path
        assert "hyperparams['learning_rate']" in rate.path
        assert read(place(leaves)[rate.leaf_index]) == 0.5


def test_the_optimiser_of_flax_nnx_is_searched() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, sgd(0.5), wrt=nnx.Param)
    _, state = nnx.split(optimiser)
    (rate,) = rates(state)
    leaves, _ = split_state(state)
    assert read(place(leaves)[rate.leaf_index]) == 0.5


def test_a_misspelt_name_gets_the_nearest_name_and_all_others() -> None:
    found = find_hyperparams(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3).init(PARAMS))
    with pytest.raises(UnknownHyperparam, match="Did you mean 'learning_rate'") as caught:
        resolve(found, "learning_rat")
    for name in ("b1", "b2", "eps"):
        assert name in str(caught.value)


def test_a_state_without_hyperparameters_says_how_to_build_the_optimiser() -> None:
    found = find_hyperparams(optax.adam(1e-3).init(PARAMS))
    assert found == []
    with pytest.raises(UnknownHyperparam) as caught:
        resolve(found, "learning_rate")
    assert "the state has none" in str(caught.value)
    assert "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)" in str(caught.value)


def test_arrays_that_are_no_scalars_are_no_hyperparameters() -> None:
    assert find_hyperparams({"hyperparams": {"mask": jnp.ones(3), "f": abs, "n": 3}}) == []


@pytest.mark.parametrize(
    "value",
    [0.25, np.float64(0.25), np.float32(0.25), jnp.asarray(0.25), jnp.float32(0.25), np.array(0.25)],
    ids=["float", "np.float64", "np.float32", "weak", "strong", "0-d"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_written_leaf_keeps_dtype_strength_and_place(value: Any, dtype: str) -> None:
    (leaf,) = place([jnp.asarray(1.0, dtype)])
    written = write(leaf, value)
    assert read(written) == 0.25
    assert written.dtype == leaf.dtype
    assert not written.weak_type
    assert written.committed
    assert written.sharding == leaf.sharding
    assert read(leaf) == 1.0


def test_integers_and_bools_are_written_as_such() -> None:
    (count, flag) = place([jnp.int32(1), jnp.asarray(True)])
    assert read(write(count, 7.0)) == 7
    assert read(write(count, np.int64(-3))) == -3
    assert read(write(flag, False)) is False
    assert isinstance(read(count), int)
    assert read(write(place([jnp.float32(1)])[0], 3)) == 3.0


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float32", "fast", "str to a hyperparameter: it must be one real number"),
        ("float32", None, "NoneType"),
        ("float32", 1j, "complex"),
        ("float32", np.complex64(1), "complex64"),
        ("float32", np.ones(2), r"ndarray of shape \(2,\)"),
        ("float32", jnp.ones((1,)), r"of shape \(1,\)"),
        ("float32", [0.5], "list"),
        ("float32", float("nan"), "nan.*finite"),
        ("float32", np.float64("inf"), "inf.*finite"),
        ("float32", True, "bool"),
        ("bool", 1.0, "bool"),
        ("float16", 1e6, r"float16, which holds 0 and magnitudes from 6e-08 to 6.6e\+04\..*=jnp.float32\.$"),
        ("float16", 1e-12, "float16, which holds 0 and magnitudes from 6e-08"),
        (
            "float32",
            1e300,
            r"float32, which holds 0 and magnitudes from 1.4e-45 to 3.4e\+38\. Pass one of them\.$",
        ),
        ("int8", 200, "int8, which holds whole numbers from -128 to 127"),
        ("int32", 0.5, "int32, which holds whole numbers from"),
    ],
)
def test_what_is_no_finite_number_of_the_dtype_is_refused(dtype: str, value: Any, expected: str) -> None:
    (leaf,) = place([jnp.asarray(1, dtype)])
    with pytest.raises(HyperparamError, match=expected):
        write(leaf, value)


def test_parameters_of_the_step_are_found_at_their_paths_and_are_no_weights() -> None:
    class Training(NamedTuple):
        params_of_model: Any
        opt_state: Any
        loss: et.Hyperparams

    loss = et.hyperparams(kl_weight=0.5, level=2, hard=False, rate=jnp.bfloat16(0.25))
    state = Training({"w": jnp.ones(3)}, sgd(0.5).init(PARAMS), loss)
    found = {h.name: h for h in find_hyperparams(state) if "loss" in h.path}
    leaves, structure = split_state(state)
    assert {name: h.dtype.name for name, h in found.items()} == {
        "hard": "bool", "kl_weight": "float32", "level": "int32", "rate": "bfloat16",
    }  # fmt: skip
    assert found["kl_weight"].path == ".loss.hyperparams['kl_weight']"
    assert structure.paths[found["kl_weight"].leaf_index] == found["kl_weight"].path
    leaves[found["level"].leaf_index] = jnp.int32(3)
    joined = structure.join(leaves).loss
    assert {name: value.item() for name, value in joined.items()} == {
        "hard": False, "kl_weight": 0.5, "level": 3, "rate": 0.25,
    }  # fmt: skip
    assert not any(leaf.weak_type for leaf in loss.values())
    assert find_params(state) is state.params_of_model


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda epoch: 0.1, r"hyperparams\(x=...\): expected a number.*HyperparamScheduler\('x', schedule\)"),
        ("high", r"hyperparams\(x=...\): Cannot write str.*one real number"),
        (None, "NoneType"),
        (jnp.ones(2), r"of shape \(2,\)"),
        (float("nan"), "Pass a finite number"),
        (2**40, "int32, which holds whole numbers"),
        (10**400, "int32, which holds whole numbers"),
    ],
)
def test_a_parameter_of_the_step_that_is_no_number_is_refused_by_name(value: Any, expected: str) -> None:
    with pytest.raises(HyperparamError, match=expected):
        et.hyperparams(x=value)
    with pytest.raises(HyperparamError, match="no values"):
        et.hyperparams()
