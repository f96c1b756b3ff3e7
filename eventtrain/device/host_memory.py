"""From a device's memory to pinned host memory, from where a transfer needs no copy of its own. Any thread."""

from __future__ import annotations

from collections.abc import Sequence

import jax

__all__ = ["PINNED", "has_pinned_host", "is_on_host", "to_pinned_host"]

PINNED = "pinned_host"
"""What JAX calls that kind of memory."""


def is_on_host(leaf: jax.Array) -> bool:
    """Whether it takes no memory of an accelerator: it is on a CPU, or was moved."""
    return leaf.sharding.memory_kind == PINNED or all(device.platform == "cpu" for device in leaf.devices())


def has_pinned_host(leaf: jax.Array) -> bool:
    """Whether all devices that it lies on have pinned host memory."""
    return all(
        any(memory.kind == PINNED for memory in device.addressable_memories()) for device in leaf.devices()
    )


def to_pinned_host(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Copies of ``leaves``, distributed as they are. Does not wait for the transfers."""
    return [jax.device_put(leaf, leaf.sharding.with_memory_kind(PINNED)) for leaf in leaves]
