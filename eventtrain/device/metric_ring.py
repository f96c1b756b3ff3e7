"""The metric ring: a small device buffer that the compiled step writes one row a step into.

`ring` is uint32[capacity, words] and is donated from step to step; `cursor`, the next free row, is
a uint32 scalar that is not, so that it can serve as the completion token of the step that made it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from eventtrain.device.metric_codec import MetricLayout

__all__ = ["RingCarry", "RingSource", "write_row"]


class RingCarry:
    """What goes from one call to the next: the ring, its cursor, and how many rows are used.

    `cursor` of a call is complete when all that the call computed is. Not thread-safe: it belongs
    to the training thread. Slots, because the loop reads and writes them at every step.
    """

    __slots__ = ("cursor", "ring", "rows")

    def __init__(self, ring: jax.Array, cursor: jax.Array) -> None:
        self.ring = ring
        self.cursor = cursor
        self.rows = 0


def write_row(ring: jax.Array, cursor: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(ring, cursor)` with uint32[words] `row` written at `cursor`; traced inside the step."""
    ring = lax.dynamic_update_slice(ring, row[None, :], (cursor, jnp.uint32(0)))
    return ring, cursor + jnp.uint32(1)


class RingSource:
    """Makes rings of one layout, replicated where the state lives; training thread only."""

    def __init__(self, layout: MetricLayout, capacity: int, sharding: Sharding) -> None:
        shape = (capacity, layout.words)
        self.ring_type = jax.ShapeDtypeStruct(shape, np.uint32, sharding=sharding)
        self.cursor_type = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding)
        self.zero = jax.device_put(np.uint32(0), sharding)  # never donated: serves for ever
        self.fresh = jax.jit(lambda: jnp.zeros(shape, jnp.uint32), out_shardings=sharding)

    def take(self, carry: RingCarry) -> tuple[jax.Array, int]:
        """The ring of `carry` and how many rows of it are used; `carry` goes on with a fresh one.

        Never blocks: the ring may not be computed yet.
        """
        taken = carry.ring, carry.rows
        carry.ring, carry.cursor, carry.rows = self.fresh(), self.zero, 0
        return taken
