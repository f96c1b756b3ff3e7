"""The weights in states of common shapes, found by names and types; states that do not tell are refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from eventtrain.device.default_params import find_params
from eventtrain.errors import ConfigurationError

P = {"w": jnp.zeros(3), "b": jnp.zeros(())}
Q = {"v": jnp.ones(2)}
TABLE = jnp.arange(3)
MLP = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
OPTIMISERS = [
    optax.sgd(0.1),
    optax.adam(0.1),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    optax.MultiSteps(optax.adam(0.1), 2),
    optax.chain(optax.clip(1.0), optax.adam(0.1)),
]


class Training(NamedTuple):
    model: Any
    optimiser: Any
    step: Any


class Module(eqx.Module):
    net: Any
    opt_state: Any


def same(found: Any, expected: Any) -> bool:
    """Whether two trees have the same structure, and the very same leaves."""
    (left, of_left), (right, of_right) = jax.tree.flatten(found), jax.tree.flatten(expected)
    return of_left == of_right and all(a is b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=["sgd", "adam", "inject", "MultiSteps", "chain"])
def test_the_weights_are_found_beside_any_optimiser(optimiser: Any) -> None:
    p, q, m = optimiser.init(P), optimiser.init(Q), optimiser.init(eqx.filter(MLP, eqx.is_array))
    key, count = jax.random.key(0), jnp.int32(0)
    for state, expected in [
        ({"params": P, "opt_state": p, "ema_params": Q}, P),
        ((P, p), P),
        ((P, p, count, key), P),
        ([P, p, 3], P),
        (Training(P, p, count), P),
        ({"model": P, "opt_state": p}, P),
        ({"weights": P, "batch_stats": Q, "anything": p}, P),
        ({"model": {"params": P, "batch_stats": Q}, "opt_state": p}, P),
        ((MLP, m), MLP),
        (Module(MLP, m), MLP),
        (
            {"gen": {"params": P, "opt_state": p}, "disc": {"params": Q, "opt_state": q}},
            {"gen": P, "disc": Q},
        ),
        (
            {"gen_params": P, "disc_params": Q, "gen_opt": p, "disc_opt": q},
            {"gen_params": P, "disc_params": Q},
        ),
        ([(P, p), (Q, q)], {0: P, 1: Q}),
        ({"net_params": P, "table_params": TABLE, "opt": p}, {"net_params": P, "table_params": TABLE}),
        ({"gen": (P, p), "disc": (Q, q), "step": 1}, {"gen": P, "disc": Q}),
    ]:
        assert same(find_params(state), expected), jax.tree.structure(state)


@pytest.mark.parametrize("state", [jnp.ones(3), {"w": jnp.ones(3), "step": 3, "key": jax.random.key(0)}])
def test_the_only_array_of_floats_is_the_weights(state: Any) -> None:
    expected = state["w"] if isinstance(state, dict) else state
    assert find_params(state) is expected


def test_the_statistics_of_equinox_are_not_weights() -> None:
    norm, statistics = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", mode="batch")
    opt_state = optax.adam(0.1).init(eqx.filter(norm, eqx.is_inexact_array))
    assert same(find_params((norm, statistics, opt_state)), norm)


def test_the_param_variables_of_flax_nnx_are_the_weights() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.linear = nnx.Linear(4, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(1, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    model = Model()
    optimiser = nnx.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=0.1), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    for state in (
        model,
        nnx.state(model),
        (model, optimiser),
        {"model": model, "optimizer": optimiser},
        nnx.split((model, optimiser))[1],
        (nnx.state(model), optax.adam(0.1).init(params)),  # moments are Params there, too
    ):
        found = find_params(state)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(found)[0]]
        assert paths == [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
        ]
        assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))


OPT: Any = optax.adam(0.1).init(P)


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        ((P, Q, OPT), ["state[0] (tree)", "state[1] (tree)", "beside an optimiser"]),
        ({"w": P["w"], "b": P["b"], "opt_state": OPT}, ["state['b'] (array)", "state['w'] (array)"]),
        ({"w": P["w"], "momentum": P["w"]}, ["state['momentum'] (array)", "without an optimiser"]),
        ({"model": P}, ["state['model'] (tree)"]),
        (MLP, ["state.layers (tree)"]),
        ({"gen_params": P, "disc": Q, "gen_opt": OPT}, ["state['disc'] (tree)"]),
        ({"gen": {"params": P, "opt_state": OPT}, "disc": (Q, OPT)}, ["state['disc'] (tree)"]),
        ({"gen_params": P, "tx": (OPT[1], {"m": Q})}, ["state['tx'] (tree)"]),
        ({"gen": (P, OPT), "disc": (P, Q, OPT)}, ["state['disc'][0] (tree)", "state['disc'][1] (tree)"]),
        ({"opt_state": OPT, "step": 3}, ["beside an optimiser state it has no floats"]),
        ((P, OPT, 0.5), ["state[0] (tree)", "state[2] (array)"]),
    ],
)
def test_a_state_that_does_not_tell_its_weights_is_refused_with_what_is_in_it(
    state: Any, parts: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_params(state)
    for text in (*parts, "Trainer(params=lambda state: ...)"):
        assert text in str(caught.value)
