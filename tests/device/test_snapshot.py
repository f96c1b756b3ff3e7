from __future__ import annotations

import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device import pinned_memory
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.pinned_memory import PinnedPool
from eventtrain.device.snapshot import HostKey, Snapshot
from eventtrain.device.state import copy_leaves, place, split_state
from eventtrain.errors import SnapshotError
from tests.support.accelerator import as_on_an_accelerator

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "f": jax.nn.relu, "key": jax.random.key(5), "n": jnp.int32(4)}


def snapshot_of(state: Any, **options: Any) -> Snapshot:
    leaves, structure = split_state(state)
    return Snapshot(12, copy_leaves(place(leaves)), structure, **options)


def test_a_snapshot_gives_the_state_back_on_the_device() -> None:
    snapshot = snapshot_of(STATE, tag="best")
    assert (snapshot.step, snapshot.tag, snapshot.released) == (12, "best", False)
    assert snapshot.size_bytes == 6 * 4 + 8 + 4
    state = snapshot.state
    assert isinstance(state["w"], jax.Array)
    assert state["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state["f"] is jax.nn.relu
    assert [leaf.shape for leaf in snapshot.leaves] == [(), (), (2, 3)]


def test_the_host_state_consists_of_numpy_copies() -> None:
    snapshot = snapshot_of(STATE)
    host = snapshot.host_state()
    assert type(host["w"]) is np.ndarray
    assert host["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert host["w"].flags.owndata
    assert host["f"] is jax.nn.relu
    key = host["key"]
    assert isinstance(key, HostKey)
    assert key.data.dtype == np.uint32
    assert key.impl == "threefry2x32"
    assert jnp.array_equal(jax.random.key_data(key.wrap()), jax.random.key_data(STATE["key"]))
    assert jax.random.uniform(key.wrap()) == jax.random.uniform(STATE["key"])


def test_extensions_are_kept_beside_the_state() -> None:
    extra = jnp.ones(3)
    snapshot = snapshot_of(STATE, extensions=[extra])
    assert snapshot.extensions[0] is extra
    assert snapshot.size_bytes == 6 * 4 + 8 + 4 + 12


@pytest.mark.parametrize("use", ["state", "leaves", "extensions", "host_state"])
def test_a_released_snapshot_says_so(use: str) -> None:
    snapshot = snapshot_of(STATE, tag="best")
    snapshot.release()
    snapshot.release()
    assert snapshot.released
    assert "released" in repr(snapshot)
    with pytest.raises(SnapshotError, match=r"snapshot of step 12 \(tag 'best'\) was released"):
        getattr(snapshot, use)() if use == "host_state" else getattr(snapshot, use)


def test_release_gives_the_device_memory_back() -> None:
    snapshot = snapshot_of(STATE)
    held = [weakref.ref(leaf) for leaf in snapshot.leaves]
    assert None not in [leaf() for leaf in held]
    snapshot.release()
    assert [leaf() for leaf in held] == [None] * 3


def test_a_release_meanwhile_does_not_disturb_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()

    read = PinnedPool.read

    def slow(pool: PinnedPool, leaf: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return read(pool, leaf)

    monkeypatch.setattr(PinnedPool, "read", slow)
    snapshot = snapshot_of({"a": jnp.full(1, 7), "b": jnp.ones(1)})
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(snapshot.host_state()))
    thread.start()
    assert reading.wait(30)
    snapshot.release()
    go_on.set()
    thread.join(30)
    assert result[0]["a"].tolist() == [7]
    assert result[0]["b"].tolist() == [1]


def test_a_state_that_the_user_donated_is_said_to_be_destroyed() -> None:
    snapshot = snapshot_of({"w": jnp.arange(3.0)})
    jax.jit(lambda w: w + 1, donate_argnums=0)(snapshot.state["w"])
    with pytest.raises(SnapshotError, match="step 12 was destroyed"):
        snapshot.host_state()


def test_a_hundred_snapshots_read_late_are_bit_equal_behind_donating_steps() -> None:
    def walk(state: Any, batch: Any) -> Any:
        key, noise = jax.random.split(state["key"])
        return {"key": key, "w": state["w"] + jax.random.normal(noise, state["w"].shape) * batch}, {}

    state = {"key": jax.random.key(0), "w": jnp.zeros((64, 64))}
    expected = []
    twin = state
    bare = jax.jit(walk)
    for _ in range(100):
        expected.append((np.array(jax.random.key_data(twin["key"])), np.array(twin["w"])))
        for _ in range(3):
            twin, _ = bare(twin, np.float32(0.5))

    leaves, structure = split_state(state)
    leaves = copy_leaves(place(leaves))
    step = CompiledStep(walk, structure, leaves)
    step.prepare(np.float32(0.5))
    carry = step.initial(leaves)
    step.request_keeping()  # the first ones are device copies, then keeping steps
    snapshots = []
    for i in range(100):
        snapshots.append(Snapshot(3 * i, carry.leaves, structure))
        step(carry, np.float32(0.5), keep=True)
        step(carry, np.float32(0.5))
        step(carry, np.float32(0.5))
        if i == 20:
            step.close()
    same = []
    for snapshot, (key, w) in zip(snapshots, expected, strict=True):
        host = snapshot.host_state()
        same.append(np.array_equal(host["key"].data, key) and np.array_equal(host["w"], w))
    assert same == [True] * 100


# --- staging ------------------------------------------------------------------------------------------------------


def test_on_a_cpu_there_is_nothing_to_move() -> None:
    snapshot = snapshot_of(STATE)
    before = snapshot.leaves
    assert snapshot.move_to_host()
    assert all(one is other for one, other in zip(snapshot.leaves, before, strict=True))


def test_what_was_moved_to_the_host_is_bit_equal_and_the_device_has_its_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on_an_accelerator(monkeypatch)
    snapshot = snapshot_of(STATE, extensions=[jnp.ones(3)], extension_paths=["ones"])
    on_device = [weakref.ref(leaf) for leaf in (*snapshot.leaves, *snapshot.extensions)]
    expected = snapshot.host_state()
    assert snapshot.move_to_host()
    assert sum(leaf() is not None for leaf in on_device) == 1  # the key
    kinds = {leaf.sharding.memory_kind for leaf in snapshot.leaves if leaf.shape == (2, 3)}
    assert kinds == {"pinned_host"}
    host = snapshot.host_state()
    assert host["w"].tobytes() == expected["w"].tobytes()
    assert host["key"].data.tolist() == expected["key"].data.tolist()
    assert snapshot.extensions_by_path()["ones"].tolist() == [1, 1, 1]


def test_each_leaf_leaves_the_device_as_soon_as_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    snapshot = snapshot_of([jnp.full(3, i) for i in range(4)])
    on_device = [weakref.ref(leaf) for leaf in snapshot.leaves]
    to_pinned_host, alive = pinned_memory.to_pinned_host, []

    def noting(leaf: jax.Array) -> jax.Array:
        alive.append(sum(one() is not None for one in on_device))
        return to_pinned_host(leaf)

    monkeypatch.setattr(pinned_memory, "to_pinned_host", noting)
    assert snapshot.move_to_host()
    assert alive == [4, 3, 2, 1]


def test_a_part_of_a_snapshot_is_all_that_is_moved_and_the_device_gets_the_rest_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on_an_accelerator(monkeypatch)
    state = {"b": jnp.full(2, 1.0), "a": jnp.full(3, 2.0), "rest": jnp.full(100, 3.0)}
    pool = PinnedPool(20)
    snapshot = snapshot_of(state, extensions=[jnp.ones(3)], extension_paths=["ones"], pool=pool)
    del state
    on_device = [weakref.ref(leaf) for leaf in (*snapshot.leaves, *snapshot.extensions)]
    snapshot.keep_only({"['b']", "['a']"})
    assert snapshot.size_bytes == 20
    assert sum(leaf() is not None for leaf in on_device) == 2
    assert snapshot.move_to_host()
    assert sum(leaf() is not None for leaf in on_device) == 0
    by_path = snapshot.leaves_by_path()
    assert {path: leaf.tolist() for path, leaf in by_path.items()} == {"['a']": [2] * 3, "['b']": [1] * 2}
    assert snapshot.extensions_by_path() == {}
    assert snapshot.host_state()["['a']"].tolist() == [2] * 3
    snapshot.release()
    with pytest.raises(SnapshotError):
        snapshot.keep_only({"['a']"})


def test_reading_on_the_host_takes_the_room_of_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    snapshot = snapshot_of([jnp.full(3, i) for i in range(4)], pool=PinnedPool(12))
    to_pinned_host, through = pinned_memory.to_pinned_host, []
    monkeypatch.setattr(
        pinned_memory, "to_pinned_host", lambda leaf: (through.append(leaf), to_pinned_host(leaf))[1]
    )
    assert [leaf.tolist() for leaf in snapshot.host_state()] == [[i] * 3 for i in range(4)]
    assert len(through) == 4


def test_a_device_without_pinned_host_memory_keeps_its_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(pinned_memory, "has_pinned_host", lambda leaf: False)
    snapshot = snapshot_of(STATE)
    before = snapshot.leaves
    assert not snapshot.move_to_host()
    assert all(one is other for one, other in zip(snapshot.leaves, before, strict=True))


def test_a_pool_without_room_for_all_of_it_leaves_it_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    pool = PinnedPool(40)
    one, other = (snapshot_of(STATE, pool=pool) for _ in range(2))
    assert one.move_to_host()
    before = other.leaves
    assert not other.move_to_host()
    assert all(a is b for a, b in zip(other.leaves, before, strict=True))
    one.release()
    assert other.move_to_host()


def test_a_state_that_was_donated_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    snapshot = snapshot_of({"w": jnp.arange(3.0)})
    jax.jit(lambda w: w + 1, donate_argnums=0)(snapshot.state["w"])
    with pytest.raises(SnapshotError, match="step 12 was destroyed"):
        snapshot.move_to_host()


def test_a_snapshot_that_was_released_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    snapshot = snapshot_of(STATE)
    to_host = pinned_memory.to_pinned_host
    monkeypatch.setattr(pinned_memory, "to_pinned_host", lambda leaf: (snapshot.release(), to_host(leaf))[1])
    snapshot.move_to_host()
    assert snapshot.released
    with pytest.raises(SnapshotError):
        snapshot.move_to_host()
