from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.data.batch_group import SMALL_BYTES, BatchGroup, GroupMaker
from eventtrain.device.fused_step import StackedBatches


def aligned(size: int) -> np.ndarray:
    """Memory that JAX takes over on a CPU, since it is aligned to 64 bytes."""
    memory = np.zeros(size + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + size]


def made(maker: GroupMaker, batches: list[Any]) -> list[BatchGroup]:
    return [group for batch in batches for group in maker.add(batch)] + maker.take()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("length", [1024, SMALL_BYTES // 4 + 1], ids=["small", "large"])
def test_an_iterator_that_fills_one_buffer_again_and_again_is_harmless(size: int, length: int) -> None:
    buffer = aligned(length)

    def reusing() -> Iterator[np.ndarray]:
        for i in range(20):
            buffer[:] = i
            yield buffer

    maker = GroupMaker(size)
    groups = [group for batch in reusing() for group in maker.add(batch)]
    found = [np.unique(group[i]) for group in groups for i in range(group.steps)]
    assert [values.tolist() for values in found] == [[float(i)] for i in range(20)]


def test_memory_that_is_given_away_is_not_copied() -> None:
    given = np.ones(4, np.float32)
    (group,) = GroupMaker(1, gives_memory=True).add({"x": given})
    assert group.call["x"] is given
    (group,) = GroupMaker(1).add({"x": given})
    assert not np.shares_memory(group.call["x"], given)


def test_a_small_batch_stays_on_the_host_and_a_large_one_is_transferred_at_once() -> None:
    small = {"x": np.ones(4), "y": np.float32(3), "name": "left alone", "n": 7}
    (group,) = GroupMaker(1).add(small)
    assert isinstance(group.call["x"], np.ndarray)
    assert group.call["x"].dtype == np.float32  # as on the device
    assert (float(group.call["y"]), group.call["name"], group.call["n"]) == (3.0, "left alone", 7)
    large = {"x": np.ones(SMALL_BYTES, np.uint8), "y": np.arange(3), "z": jnp.ones(2)}
    (group,) = GroupMaker(1).add(large)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(group.call))
    np.testing.assert_array_equal(group.call["y"], [0, 1, 2])


@pytest.mark.parametrize("guard", ["transfer_guard", "transfer_guard_host_to_device"])
def test_under_a_transfer_guard_no_call_has_to_transfer(guard: str) -> None:
    with getattr(jax, guard)("disallow"):
        (group,) = GroupMaker(1).add(np.ones(4))
        assert jax.jit(lambda x: x + x)(group.call).tolist() == [2.0] * 4
    with jax.transfer_guard_device_to_host("disallow"):
        (group,) = GroupMaker(1).add(np.ones(4))
        assert isinstance(group.call, np.ndarray)


def test_numpy_batches_of_a_call_are_stacked_and_others_form_a_tuple() -> None:
    (stacked,) = made(GroupMaker(3), [{"x": np.full(2, float(i))} for i in range(3)])
    assert isinstance(stacked.call, StackedBatches)
    np.testing.assert_array_equal(stacked.call.batches["x"], [[0, 0], [1, 1], [2, 2]])
    mixed = [{"x": np.full(2, float(i)), "n": jnp.ones(1)} for i in range(2)]
    (group,) = made(GroupMaker(3), mixed)
    assert (type(group.call), len(group.call), group.steps) == (tuple, 3, 2)
    assert [float(batch["x"][0]) for batch in group.call] == [0, 1, 1]  # padded with the last one


def test_the_batches_of_a_group_come_back_one_by_one() -> None:
    for length in (2, SMALL_BYTES):
        maker = GroupMaker(3)
        whole = [group for i in range(4) for group in maker.add(np.full(length, i, np.int32), i)]
        (rest,) = maker.take()
        assert [group.steps for group in (*whole, rest)] == [3, 1]
        pairs = [pair for group in (*whole, rest) for pair in group.pairs()]
        assert [(int(batch[0]), position) for batch, position in pairs] == [(i, i) for i in range(4)]
        assert whole[0].batch_bytes == 4 * length


@pytest.mark.parametrize(
    "odd",
    [np.zeros(2), np.zeros(3, np.int32), np.zeros((3, 1)), jnp.zeros(3), 1.0, [np.zeros(3)]],
    ids=["length", "dtype", "rank", "device", "number", "structure"],
)
def test_a_group_ends_where_the_next_batch_is_of_another_kind(odd: Any) -> None:
    usual = np.zeros(3, np.float32)
    groups = made(GroupMaker(4), [usual, usual, odd, usual])
    assert [group.steps for group in groups] == [2, 1, 1]


def test_batches_of_one_dtype_on_the_device_share_a_call() -> None:
    groups = made(GroupMaker(2), [np.zeros(3, np.float64), np.zeros(3, np.float32)])
    assert [group.steps for group in groups] == [2]  # both are float32 there


def test_a_sample_is_something_to_compile_for_without_a_step() -> None:
    group = GroupMaker(2).sample([np.ones(3)])
    assert (group.steps, len(group), group[0].tolist()) == (0, 0, [1.0] * 3)
    assert GroupMaker(2).sample([]).call is None


def test_numpy_batches_are_replicated_over_the_mesh(run_on_devices: Any) -> None:
    def replicated() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.data.batch_group import GroupMaker

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        (group,) = GroupMaker(1, everywhere).add({"x": np.ones(8), "y": jax.device_put(jnp.ones(8), spread)})
        assert group.call["x"].sharding == everywhere
        assert group.call["y"].sharding == spread
        maker = GroupMaker(2, everywhere)
        (group,) = [group for _ in range(2) for group in maker.add(np.ones(8))]
        assert group.call.batches.sharding.is_equivalent_to(everywhere, 2)
        print("placed")

    assert "placed" in run_on_devices(8, replicated)
