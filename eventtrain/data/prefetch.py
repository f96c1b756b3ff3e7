"""The prefetch thread, which runs ahead of training so that the next batches are on the device in time.

- Only this thread touches the user's iterator once it runs; only the consumer thread takes groups.
- NumPy batches are copied before they are put on the device: JAX may alias their memory (24 of 50 batches on a CPU) or
  read it late, and an iterator may fill one buffer again and again.
- The groups of a call are assembled here: on the training thread that would cost what ``steps_per_call`` saves.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from eventtrain.data.sources import Batch, with_states
from eventtrain.device.state import with_x64_of_caller
from eventtrain.errors import ConfigurationError


class BatchGroup(NamedTuple):
    """`steps_per_call` batches for one call, of which the first `steps` are to be trained on.

    A short group is padded by repeating its last batch. `positions[i]` is what the data iterator's `get_state()`
    returned right after batch i, or None if it has no such method.
    """

    batches: tuple[Batch, ...]
    steps: int
    positions: tuple[Any, ...]


class Prefetcher:
    """Runs a data iterator in a thread of its own and puts batches on the device ahead of use.

    Args:
        batches: the iterator, which is closed in the end if it has `close`, as generators have.
        first: batches that were taken from it before, each with `iterator_state` after it.
        steps_per_call: batches in a group. A group also ends where the next batch has another shape, dtype or
            structure, since one call needs them alike.
        depth: groups that may wait; that many groups of memory are used beside those of the step.
        sharding: where NumPy leaves are put; None is JAX's default device. Leaves that are JAX arrays already stay
            where they are, numbers stay numbers.
        on_ready: called on the prefetch thread after each group and at the end, when `ready()` holds.

    `ready` and `take` never block and belong to one consumer thread.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        *first: tuple[Batch, Any],
        steps_per_call: int = 1,
        depth: int = 4,
        sharding: jax.sharding.Sharding | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        if steps_per_call < 1 or depth < 1:
            raise ConfigurationError(
                f"steps_per_call and depth must be integers >= 1, got {steps_per_call} and {depth}."
            )
        self._batches = batches
        self._first = first
        self._size = steps_per_call
        self._sharding = sharding
        self._on_ready = on_ready
        self._groups: collections.deque[BatchGroup] = collections.deque()
        self._room = threading.Semaphore(depth)
        self._closing = False
        self._ended = False  # set last: a thread that reads True finds every group, and the error
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=with_x64_of_caller(self._run), name="eventtrain-prefetch", daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` has a result: a group, the end, or an error."""
        return bool(self._groups) or self._ended

    def take(self) -> BatchGroup | None:
        """Returns the next group, or None at the end of the data.

        Raises:
            RuntimeError: nothing is ready; call `ready()` first, or wait for `on_ready`.
            BaseException: what the user's iterator raised, unchanged, after the batches before it.
        """
        ended = self._ended  # read first: a group may be added, but not after this was true
        if self._groups:
            self._room.release()
            return self._groups.popleft()
        if not ended:
            raise RuntimeError("Prefetcher.take() was called while nothing is ready. Call ready() first.")
        if self._error is not None:
            raise self._error
        return None

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Stops the thread and waits for it, at most `timeout_s`; may be called again.

        Returns whether it has ended: it has not while the user's iterator blocks.
        """
        self._closing = True
        self._room.release()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
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
            for batch, position in with_states(self._batches, *self._first):
                batch = jax.tree.map(self._on_device, batch)
                if group and _kinds(group[-1][0]) != _kinds(batch):
                    self._add(group)
                    group = []
                group.append((batch, position))
                if len(group) == self._size:
                    self._add(group)
                    group = []
                if self._closing:
                    return
        finally:  # also the batches before an error
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

    def _on_device(self, leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm":
            return jax.device_put(np.array(leaf), self._sharding)  # a copy, since JAX may alias the memory
        return leaf


def _kinds(batch: Batch) -> tuple[Any, ...]:
    """Returns what all batches of one call must have in common."""
    leaves, treedef = jax.tree_util.tree_flatten(batch)
    return treedef, [
        (leaf.shape, leaf.dtype, leaf.sharding)
        if isinstance(leaf, jax.Array)
        else (type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
        for leaf in leaves
    ]
