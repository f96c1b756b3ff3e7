from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device.extensions import EMA
from eventtrain.device.state import copy_leaves, place, split_state
from eventtrain.device.step import CompiledStep
from eventtrain.errors import ConfigurationError


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_decay_outside_the_open_unit_interval_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"EMA\(decay=.*strictly between"):
        EMA(decay)


def test_the_average_starts_at_the_weights_and_follows_the_formula() -> None:
    ema = EMA(0.75)
    average = ema.init({"w": jnp.float32(4)})
    for new in (8.0, 0.0):
        average = ema.update(average, {"w": jnp.float32(new)}, jnp.int32(1))
    assert average["w"].tolist() == 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 0


def test_a_bfloat16_average_moves_by_increments_that_bfloat16_would_round_away() -> None:
    ema = EMA(0.999)
    average = ema.init(jnp.ones((), jnp.bfloat16))
    assert average.dtype == jnp.float32
    for _ in range(100):
        average = ema.update(average, jnp.zeros((), jnp.bfloat16), jnp.int32(1))
    np.testing.assert_allclose(average, 0.999**100, rtol=1e-5)


def test_leaves_that_are_no_floats_follow_the_newest_value() -> None:
    ema = EMA(0.5)
    params = {"n": jnp.int32(3), "flag": jnp.asarray(True), "f": jax.nn.relu, "w": jnp.zeros(2)}
    average = ema.update(
        ema.init(params), params | {"n": jnp.int32(9), "flag": jnp.asarray(False)}, jnp.int32(1)
    )
    assert average["n"].tolist() == 9
    assert average["flag"].tolist() is False
    assert average["f"] is jax.nn.relu


def test_an_equinox_module_is_averaged_inside_the_compiled_step() -> None:
    def grow(state: eqx.Module, batch: jax.Array) -> tuple[eqx.Module, dict[str, jax.Array]]:
        return jax.tree.map(lambda x: x + batch if eqx.is_array(x) else x, state), {}

    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    leaves, skeleton = split_state(model)
    leaves = copy_leaves(place(leaves))
    step = CompiledStep(grow, skeleton, leaves, extensions=[EMA(0.5, name="half"), EMA(0.75)])
    step.prepare(np.float32(1))
    carry = step.initial(leaves)
    step(carry, np.float32(1))
    step(carry, np.float32(1))
    states = step.extension_states(carry.ext_leaves)
    assert set(states) == {"half", "ema"}
    bias = model.layers[0].bias
    np.testing.assert_allclose(states["half"].layers[0].bias, bias + 0.5 * 0.5 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(states["ema"].layers[0].bias, bias + 0.25 * 0.75 + 0.5, rtol=1e-6)
    assert states["ema"](jnp.ones(2)).shape == (2,)


def test_the_averages_are_buffers_of_their_own_from_the_start() -> None:
    leaves, skeleton = split_state({"w": jnp.ones(4)})
    leaves = copy_leaves(place(leaves))
    step = CompiledStep(lambda s, b: (s, {}), skeleton, leaves, extensions=[EMA(0.5)])
    step.prepare(np.float32(1))
    carry = step.initial(leaves)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in [*carry.leaves, *carry.ext_leaves]}
    assert len(pointers) == 3  # weights, average, number of completed steps
