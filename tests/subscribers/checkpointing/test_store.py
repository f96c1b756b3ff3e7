"""Writing a checkpoint: the state is neither copied on the host nor computed with on the device."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain.device.pinned_memory import PinnedPool
from eventtrain.subscribers.checkpointing.manifest import Manifest
from eventtrain.subscribers.checkpointing.store import CheckpointStore
from tests.support.accelerator import as_on_an_accelerator


def manifest_of(step: int) -> Manifest:
    return Manifest(
        step=step, epoch=0, tag="t", run_id="run", owner="owner", time=datetime.now(UTC), weights_only=True
    )


def test_a_checkpoint_is_written_without_a_copy_of_the_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = {name: jnp.full((1_000_000,), i, jnp.float32) for i, name in enumerate("abc")}
    store.write("step-1", {"state": {"a": jnp.zeros(3)}}, manifest_of(1))  # what a first call allocates
    tracemalloc.start()
    try:
        store.write("step-2", {"state": state}, manifest_of(2))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        store.close()
    assert most_bytes < 4_000_000, most_bytes  # less than one of the three arrays
    back = et.load_state(tmp_path / "step-2")
    assert all(back[name].tobytes() == np.asarray(leaf).tobytes() for name, leaf in state.items())


def test_a_state_that_has_no_room_on_the_host_goes_there_as_far_as_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three leaves with room for two: the third arrives when the first two are written."""
    as_on_an_accelerator(monkeypatch)
    pool = PinnedPool(8_000)
    state = {name: jnp.full(1_000, i, jnp.float32) for i, name in enumerate("abc")}
    arrived: list[bool] = []

    def put(leaf: Any) -> Any:
        copy = pool.put(leaf)
        arrived.append(copy is not None)
        return copy

    store = CheckpointStore(tmp_path)
    store.write("step-1", {"state": state}, manifest_of(1), put=put, read=pool.read)
    store.close()
    assert arrived == [True, True, False, True]
    assert pool.has_room(8_000)
    back = et.load_state(tmp_path / "step-1")
    assert all(back[name].tobytes() == np.asarray(leaf).tobytes() for name, leaf in state.items())


def test_a_replicated_state_is_written_without_a_computation(run_on_devices: Any) -> None:
    def script() -> None:
        from datetime import UTC, datetime
        from pathlib import Path

        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        import eventtrain as et
        from eventtrain.subscribers.checkpointing.manifest import Manifest
        from eventtrain.subscribers.checkpointing.store import CheckpointStore

        place = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
        leaf = jax.device_put(jnp.arange(4096.0).reshape(32, 128), place)
        manifest = Manifest(
            step=1, epoch=0, tag="t", run_id="run", owner="owner", time=datetime.now(UTC), weights_only=True
        )
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration_secs, **kwargs: (
                compiled.append(event) if "backend_compile" in event else None
            )
        )
        jax.jit(lambda x: x + 1)(leaf)
        assert len(compiled) == 1  # the listener counts
        store = CheckpointStore(Path("ck").absolute())
        store.write("step-1", {"state": {"w": leaf}}, manifest)
        store.close()
        assert len(compiled) == 1, compiled
        assert et.load_state("ck/step-1")["w"].tobytes() == np.asarray(leaf).tobytes()

    run_on_devices(4, script)
