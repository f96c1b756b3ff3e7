from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device.state import copy_leaves, place, replicated_sharding, split_state
from eventtrain.errors import StateError


def test_arrays_are_leaves_and_everything_else_is_held() -> None:
    state = {
        "a": jnp.ones(2),
        "f": jax.nn.relu,
        "n": 3,
        "s": "x",
        "z": None,
        "np": np.float32(2),
        "b": np.ones(1),
    }
    _, structure = split_state(state)
    assert structure.paths == ("['a']", "['b']", "['np']")
    assert [path for _, path, _ in structure.static] == ["['f']", "['n']", "['s']"]
    joined = structure.join([1, 2, 3])
    assert joined == state | {"a": 1, "b": 2, "np": 3}
    assert joined["f"] is jax.nn.relu


def test_an_equinox_module_keeps_its_functions() -> None:
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    leaves, structure = split_state(model)
    assert len(leaves) == 6
    joined = structure.join(leaves)
    assert jnp.array_equal(joined(jnp.ones(2)), model(jnp.ones(2)))


@pytest.mark.parametrize("state", [{}, None, {"n": 3, "name": "model"}, np.array(["text"])])
def test_a_state_without_arrays_is_refused(state: Any) -> None:
    with pytest.raises(StateError, match=r"without any array leaf.*nothing to train"):
        split_state(state)


def test_a_deleted_leaf_is_refused_by_its_path() -> None:
    state = {"w": jnp.ones(2)}
    state["w"].delete()
    with pytest.raises(StateError, match=r"state\['w'\] was deleted, most likely donated"):
        split_state(state)


def test_placed_leaves_are_committed_and_stay_as_weakly_typed_as_they_were() -> None:
    key = jax.random.key(3)
    placed = place([np.float64(1.5), jnp.asarray(2.0), np.arange(3), jnp.ones(2, jnp.bfloat16), key])
    assert all(leaf.committed for leaf in placed)
    assert [leaf.dtype.name for leaf in placed[:4]] == ["float32", "float32", "int32", "bfloat16"]
    assert [leaf.weak_type for leaf in placed[:4]] == [False, True, False, False]
    assert jnp.array_equal(jax.random.key_data(placed[4]), jax.random.key_data(key))


def test_copies_have_buffers_of_their_own_even_of_one_array() -> None:
    shared = jnp.arange(5.0)
    copies = copy_leaves(place([shared, shared, jax.random.key(1)]))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in copies[:2]} | {shared.unsafe_buffer_pointer()}
    assert len(pointers) == 3
    copies[0].delete()
    assert copies[1].tolist() == shared.tolist() == [0, 1, 2, 3, 4]
    assert jnp.array_equal(jax.random.key_data(copies[2]), jax.random.key_data(jax.random.key(1)))


def test_placement_on_eight_devices(run_on_devices: Any) -> None:
    def placement() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        import pytest
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.device.state import copy_leaves, place, replicated_sharding
        from eventtrain.errors import StateError

        devices = jax.devices()
        assert len(devices) == 8
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        sharded = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data")))
        everywhere = NamedSharding(mesh, P())
        placed = place([jnp.ones(3), sharded, np.ones(2), jax.random.key(0)])
        assert [leaf.sharding for leaf in placed] == [everywhere, sharded.sharding, everywhere, everywhere]
        assert replicated_sharding([jnp.ones(3), sharded]) == everywhere
        copies = copy_leaves(placed)
        assert [leaf.sharding for leaf in copies] == [leaf.sharding for leaf in placed]

        (alone,) = place([jax.device_put(jnp.ones(1), devices[3])])
        assert alone.sharding.device_set == {devices[3]}
        followed = place([np.ones(1), jnp.ones(1), jax.device_put(jnp.ones(1), devices[3])])
        assert all(leaf.sharding.device_set == {devices[3]} for leaf in followed)

        half = jax.make_mesh((4,), ("x",), devices=devices[:4], axis_types=(jax.sharding.AxisType.Auto,))
        with pytest.raises(StateError, match=r"on different sets of devices: \(.*0.*\); \(.*1.*\)\. One"):
            place([jax.device_put(jnp.ones(1), d) for d in devices[:2]])
        with pytest.raises(StateError, match=r"on different sets of devices: \(.*; .*\); \(.*\)\. One"):
            place([sharded, jax.device_put(jnp.ones(4), NamedSharding(half, P("x")))])

    run_on_devices(8, placement)


def test_the_ring_goes_to_the_only_device() -> None:
    (device,) = replicated_sharding([jnp.ones(2)]).device_set
    assert device == jax.devices()[0]
