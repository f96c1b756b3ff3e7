"""Pinned host memory: the way of arrays from an accelerator to the host, without holding up the steps.

A transfer to any other host memory pins its pages first, which holds the driver, and with it the dispatch of steps. On
an H200, reading 8.6 GB directly from the device beside 134 ms steps stalled the loop for 3.4 s. Through pinned memory
it took 2.3 s at first and 0.17 s afterwards, and stalled the loop for 1 ms then: XLA keeps the memory that it pinned.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.device.placement import move

logger = logging.getLogger("eventtrain")

_PINNED = "pinned_host"
_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def is_on_host(leaf: jax.Array) -> bool:
    """Whether it takes no memory of an accelerator: it is on a CPU, or in pinned host memory."""
    return leaf.sharding.memory_kind == _PINNED or all(device.platform == "cpu" for device in leaf.devices())


def has_pinned_host(leaf: jax.Array) -> bool:
    """Whether all its devices have pinned host memory."""
    return all(
        any(memory.kind == _PINNED for memory in device.addressable_memories()) for device in leaf.devices()
    )


def to_pinned_host(leaf: jax.Array) -> jax.Array:
    """Returns a copy in pinned host memory, sharded as it is; does not wait for the transfer."""
    return move(leaf, leaf.sharding.with_memory_kind(_PINNED))


def is_key(leaf: jax.Array) -> bool:
    """Whether it is a typed PRNG key array. Those stay: they are small, and reading one is a computation."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def must_move(leaf: jax.Array) -> bool:
    """Whether it has to leave an accelerator to be stored."""
    return not (is_on_host(leaf) or is_key(leaf))


def free_host_bytes() -> int | None:
    """Returns the memory that this process may still take, in its cgroup too; None if the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        most, taken = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        free = min(free, int(most) - int(taken))
    except (OSError, ValueError):  # no cgroup of version 2, or "max": no limit
        pass
    return max(0, free)


class PinnedPool:
    """Bounds the pinned host memory of a run. Any thread.

    Args:
        limit_bytes: how much of it the arrays that are alive may take; None: no limit.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._lock = threading.RLock()  # the garbage collector may call _give_back on a thread that has it

    @classmethod
    def warmed(cls, leaves: Sequence[jax.Array]) -> PinnedPool:
        """Returns a pool for copies of ``leaves``, whose memory is pinned already, or for as much as is possible.

        At most half of the free memory of the host is pinned, and what the driver allows. Blocks, for 0.3 s per GB on
        an H200. Leaves that are on a CPU need nothing. To be called before the first step.

        Args:
            leaves: one that will have several copies at the same time is there as often.
        """
        leaves = [leaf for leaf in leaves if must_move(leaf)]
        if not leaves:
            return cls()
        began_s = perf_counter()
        free = free_host_bytes()
        most = sum(leaf.nbytes for leaf in leaves)
        pool = cls(most if free is None else min(most, free // 2))
        held: list[jax.Array] = []
        for leaf in leaves:
            if (pinned := pool.put(leaf)) is None:
                break
            held.append(pinned)
        pool.limit_bytes = sum(leaf.nbytes for leaf in held)
        logger.info(
            "Pinned %.3g GB of host memory in %.2f s, of %.3g GB for states on their way from the device to the disk.",
            pool.limit_bytes / 1e9, perf_counter() - began_s, most / 1e9,
        )  # fmt: skip
        return pool

    def has_room(self, size_bytes: int) -> bool:
        """Whether so much more fits. Another thread may be faster."""
        return self.limit_bytes is None or self._used_bytes + size_bytes <= self.limit_bytes

    def put(self, leaf: jax.Array) -> jax.Array | None:
        """Returns a copy in pinned host memory, which counts until it is deleted; None if there is no room for it.

        A leaf that is on the host already is returned itself. Blocks until the leaf was computed and transferred.
        Raises what the device raises.
        """
        if is_on_host(leaf):
            return leaf
        size_bytes = leaf.nbytes
        with self._lock:
            if not (has_pinned_host(leaf) and self.has_room(size_bytes)):
                return None
            self._used_bytes += size_bytes
        try:
            copy = jax.block_until_ready(to_pinned_host(leaf))
        except BaseException as error:
            self._give_back(size_bytes)
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        return self._counted(copy)

    def copy(self, leaf: jax.Array) -> jax.Array:
        """Returns a copy in pinned host memory, as ``put``, but also beyond the limit; does not wait for the transfer.

        For a copy that must be made at once. While it is alive, ``put`` finds less room.
        """
        copy = to_pinned_host(leaf)
        with self._lock:
            self._used_bytes += copy.nbytes
        return self._counted(copy)

    def _counted(self, copy: jax.Array) -> jax.Array:
        weakref.finalize(copy, self._give_back, copy.nbytes).atexit = False
        return copy

    def read(self, leaf: Any) -> np.ndarray[Any, Any]:
        """Returns an array in host memory: a view if it is there already. Blocks until it was computed."""
        copy = self.put(leaf) if isinstance(leaf, jax.Array) else None
        return np.asarray(leaf if copy is None else copy)

    def _give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes
