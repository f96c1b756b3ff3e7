"""The thread that runs ahead of training, so that the next batches lie on the device when it asks for them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from eventtrain.data.sources import Batch, position_of
from eventtrain.device.jax_compat import sixty_four_bit
from eventtrain.errors import ConfigurationError, DataError

__all__ = ["BatchGroup", "Prefetcher"]


class BatchGroup(NamedTuple):
    """`steps_per_call` batches for one call, of which the first `steps` are real.

    A short group is padded by repeating its last batch. `positions[i]` is what the data iterator's
    `get_state()` said right after batch i, or None if it has no such method.
    """

    batches: tuple[Batch, ...]
    steps: int
    positions: tuple[Any, ...]


class Prefetcher:
    """Runs a data iterator in a thread of its own and puts batches on the device ahead of use.

    Args:
        batches: the iterator; from now on only the prefetch thread touches it (and, if it is a
            generator, closes it).
        steps_per_call: batches in a group. A group also ends where the next batch has another
            shape, dtype or structure, for one call needs them alike.
        depth: groups that may wait; this many batches of memory are used on top of the step's.
        sharding: where NumPy leaves are put; None is JAX's default device. Leaves that are JAX
            arrays already stay where they are, numbers stay numbers.
        on_ready: called on the prefetch thread after each group and at the end, when `ready()` holds.

    `ready` and `take` never block and belong to one consumer thread.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        *,
        steps_per_call: int = 1,
        depth: int = 4,
        sharding: jax.sharding.Sharding | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        if steps_per_call < 1 or depth < 1:
            raise ConfigurationError(
                f"Prefetcher(steps_per_call={steps_per_call}, depth={depth}): both count groups or "
                "batches, so they must be 1 at least."
            )
        self._batches = batches
        self._size = steps_per_call
        self._sharding = sharding
        self._on_ready = on_ready
        self._groups: collections.deque[BatchGroup] = collections.deque()
        self._room = threading.Semaphore(depth)
        self._closing = False
        self._ended = False  # set last: whoever sees it sees every group and the error too
        self._error: BaseException | None = None
        self._taken = 0
        self._x64 = bool(jax.config.read("jax_enable_x64"))  # a setting of each thread: handed on to ours
        self._thread = threading.Thread(target=self._run, name="eventtrain-prefetch", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` has something to say: a group, the end, or an error."""
        return bool(self._groups) or self._ended

    def take(self) -> BatchGroup | None:
        """The next group, or None at the end of the data.

        Raises:
            DataError: the data ended before its first batch.
            RuntimeError: nothing is ready; ask `ready()`, or wait for `on_ready`.
            BaseException: what the user's iterator raised, unchanged, after the batches before it.
        """
        ended = self._ended  # read first: a group may be added, but not after this was true
        if self._groups:
            self._taken += 1
            self._room.release()
            return self._groups.popleft()
        if not ended:
            raise RuntimeError("Prefetcher.take(): nothing is ready; ask ready() first.")
        if self._error is not None:
            raise self._error
        if self._taken == 0:
            raise DataError(
                "The data is empty: it ended before its first batch. Check the files and the batch "
                "size; an iterator that was consumed once must be given as a callable "
                "epoch -> iterable."
            )
        return None

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Stop the thread and wait for it, `timeout_s` at most; may be called again.

        Returns whether it has ended: it has not while the user's iterator blocks.
        """
        self._closing = True
        self._room.release()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with sixty_four_bit(self._x64):
                self._fill()
        except BaseException as error:
            self._error = error
        finally:
            try:
                close = getattr(self._batches, "close", None)
                if close is not None:
                    close()
            except BaseException as error:
                self._error = self._error or error
            self._ended = True
            self._on_ready()

    def _fill(self) -> None:
        group: list[tuple[Batch, Any]] = []
        try:
            for batch in self._batches:
                position = position_of(self._batches)
                batch = self._on_device(batch)
                if group and not _alike(group[-1][0], batch):
                    self._add(group)
                    group = []
                group.append((batch, position))
                if len(group) == self._size:
                    self._add(group)
                    group = []
                if self._closing:
                    return
        finally:  # also what came before an error
            if group:
                self._add(group)

    def _add(self, group: list[tuple[Batch, Any]]) -> None:
        if self._closing:
            return
        self._room.acquire()
        if self._closing:  # close() made the room, to end this wait
            return
        padded = group + group[-1:] * (self._size - len(group))
        batches = tuple(batch for batch, _ in padded)
        positions = tuple(position for _, position in group)
        self._groups.append(BatchGroup(batches, len(group), positions))
        self._on_ready()

    def _on_device(self, batch: Batch) -> Batch:
        def put(leaf: Any) -> Any:
            if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm":
                # A copy, since JAX may alias the memory or read it late, and an iterator that fills
                # one buffer again and again is legal.
                return jax.device_put(np.array(leaf), self._sharding)
            return leaf

        return jax.tree.map(put, batch)


def _alike(one: Batch, other: Batch) -> bool:
    first, first_tree = jax.tree_util.tree_flatten(one)
    second, second_tree = jax.tree_util.tree_flatten(other)
    return first_tree == second_tree and all(_kind(a) == _kind(b) for a, b in zip(first, second, strict=True))


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
