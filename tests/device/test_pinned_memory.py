from __future__ import annotations

import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device import pinned_memory
from eventtrain.device.pinned_memory import PinnedPool, free_host_bytes
from tests.support.accelerator import as_on_an_accelerator

LEAVES = [jnp.arange(1000, dtype=jnp.float32), jnp.ones((10, 10), jnp.float32)]
SIZE = 4400


def test_on_a_cpu_nothing_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eventtrain")
    pool = PinnedPool.warmed(LEAVES * 2)
    assert pool.limit_bytes is None
    assert pool.put(LEAVES[0]) is LEAVES[0]
    assert np.shares_memory(pool.read(LEAVES[0]), np.asarray(LEAVES[0]))
    assert not caplog.text


def test_a_warm_pool_has_room_for_its_copies_and_says_how_much_was_pinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_on_an_accelerator(monkeypatch)
    caplog.set_level(logging.INFO, "eventtrain")
    pool = PinnedPool.warmed(LEAVES * 2)
    assert pool.limit_bytes == 2 * SIZE
    assert "Pinned 8.8e-06 GB" in caplog.text
    copies = [pool.put(leaf) for leaf in LEAVES * 2]
    assert all(copy is not None and copy.sharding.memory_kind == "pinned_host" for copy in copies)
    assert pool.put(LEAVES[1]) is None  # it is full
    del copies[1]  # 400 bytes
    assert pool.put(LEAVES[1]) is not None


def test_a_copy_that_is_made_at_once_counts_and_may_pass_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    pool = PinnedPool(SIZE)
    copies = [pool.copy(leaf) for leaf in LEAVES * 2]
    assert {copy.sharding.memory_kind for copy in copies} == {"pinned_host"}
    assert not pool.has_room(0)
    del copies[2:]
    assert pool.has_room(0)
    assert pool.put(LEAVES[1]) is None
    del copies[1:]
    assert pool.put(LEAVES[1]) is not None


def test_no_more_than_half_of_the_free_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(pinned_memory, "free_host_bytes", lambda: 2 * SIZE + 100)
    assert PinnedPool.warmed(LEAVES * 3).limit_bytes == SIZE


def test_what_the_driver_does_not_pin_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    to_pinned_host, calls = pinned_memory.to_pinned_host, []

    def limited(leaf):
        calls.append(leaf)
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")
        return to_pinned_host(leaf)

    monkeypatch.setattr(pinned_memory, "to_pinned_host", limited)
    pool = PinnedPool.warmed(LEAVES * 2)
    assert pool.limit_bytes == 4000
    assert pool.put(LEAVES[0]) is not None


def test_a_device_without_pinned_host_memory_is_read_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(pinned_memory, "has_pinned_host", lambda leaf: False)
    pool = PinnedPool.warmed(LEAVES * 2)
    assert pool.limit_bytes == 0
    assert pool.put(LEAVES[0]) is None
    assert pool.read(LEAVES[0]).tolist() == list(range(1000))


def test_a_device_that_fails_in_a_transfer_is_heard_and_takes_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_on_an_accelerator(monkeypatch)
    pool = PinnedPool(SIZE)

    def failing(leaf):
        raise RuntimeError("INTERNAL: the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pinned_memory, "to_pinned_host", failing)
        with pytest.raises(RuntimeError, match="the device is gone"):
            pool.put(LEAVES[0])
    assert pool.put(LEAVES[0]) is not None


def test_free_memory_is_that_of_the_machine_or_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pinned_memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(pinned_memory, "_CGROUP", tmp_path)
    assert free_host_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    assert free_host_bytes() == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    assert free_host_bytes() == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() == 8000 * 1024
