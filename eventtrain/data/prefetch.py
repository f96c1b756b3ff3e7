"""Batches of one epoch for the loop: straight from the user's iterator, or through a thread that runs ahead.

- Batches that are on the device already need no thread, which would cost 100 us a batch; the first batch decides.
- Only the prefetch thread touches the user's iterator once it runs; only the consumer thread takes groups.
- NumPy batches are copied before they are put on the device: JAX may alias their memory (24 of 50 batches on a CPU) or
  read it late, and an iterator may fill one buffer again and again.
- The groups of a call are assembled by that thread: on the training thread that would cost what ``steps_per_call``
  saves.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from eventtrain.data.sources import Batch, batches_from, iterator_state, on_device, with_states
from eventtrain.device.state import with_x64_of_caller
from eventtrain.errors import DataError


class BatchGroup(NamedTuple):
    """`steps_per_call` batches for one call, of which the first `steps` are to be trained on.

    A short group is padded by repeating its last batch. `positions[i]` is what the data iterator's `get_state()`
    returned right after batch i, or None if it has no such method.
    """

    batches: tuple[Batch, ...]
    steps: int
    positions: tuple[Any, ...]


class Waiter(Protocol):
    """How the thread that takes the batches waits for one; the loop serves commands meanwhile."""

    def wait(self, ready: Callable[[], object]) -> bool:
        """Blocks until ``ready()`` is true; returns False if the run has to end first."""
        ...

    def wake(self) -> None:
        """Has a thread in ``wait`` evaluate ``ready`` again. Any thread; never blocks."""
        ...


class EpochIterator:
    """The batches of one epoch, in groups of ``steps_per_call``; to be closed by the thread that takes them.

    Args:
        data: as for ``Trainer.fit``.
        sharding: of NumPy batches on the device.
        start: batches of a resumed epoch that were trained on before; it may have no batch left.
        data_state: state of the data's iterator after them, where it has one.

    Attributes:
        exhausted: whether ``next`` returned None because the epoch has no more batches.

    Raises:
        DataError: ``data`` yields no batches. What the user's iterator raises passes unchanged.
    """

    def __init__(
        self,
        data: Any,
        epoch: int,
        *,
        steps_per_call: int,
        sharding: jax.sharding.Sharding | None,
        waiter: Waiter,
        start: int = 0,
        data_state: Any = None,
    ) -> None:
        self.exhausted = False
        self._waiter = waiter
        self._prefetcher: Prefetcher | None = None
        self._direct: Iterator[tuple[Batch, Any]] = iter(())
        try:
            batches = batches_from(data, epoch, start, data_state)
            first = next(batches), iterator_state(batches)
        except StopIteration:
            if start:  # resumed behind the last batch of the epoch
                return
            raise DataError(
                f"The data of epoch {epoch} is empty: it ended before its first batch. Check the files and the batch "
                "size. A generator can be iterated only once, so pass a callable epoch -> iterable instead."
            ) from None
        if steps_per_call == 1 and on_device(first[0]):
            self._direct = with_states(batches, first)
        else:
            self._prefetcher = Prefetcher(
                batches, first, steps_per_call=steps_per_call, sharding=sharding, on_ready=waiter.wake
            )

    def next(self) -> BatchGroup | None:
        """Returns the next group; None at the end of the epoch, or when the run has to end."""
        if self._prefetcher is not None:
            ready = self._prefetcher.ready
            if not ready() and not self._waiter.wait(ready):
                return None
            group = self._prefetcher.take()
            self.exhausted = group is None
            return group
        for batch, state in self._direct:
            return BatchGroup((batch,), 1, (state,))
        self.exhausted = True
        return None

    def batches(self) -> Iterator[Any]:
        """Yields every batch; for ``steps_per_call=1``."""
        while (group := self.next()) is not None:
            yield group.batches[0]

    def close(self) -> None:
        """Stops the prefetch thread. Idempotent."""
        if self._prefetcher is not None:
            self._prefetcher.close()


class Prefetcher:
    """Runs a data iterator in a thread of its own and puts batches on the device ahead of use.

    Args:
        batches: the iterator, which is closed in the end if it has `close`, as generators have.
        first: batches that were taken from it before, each with `iterator_state` after it.
        steps_per_call: batches in a group. A group also ends where the next batch has another shape, dtype or
            structure, since one call needs them alike.
        depth: groups that may wait; that many groups of memory are used beside those of the step.
        sharding: where NumPy leaves are put; None is JAX's default device. Other leaves stay as they are.
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
        try:
            getattr(self._batches, "close", lambda: None)()
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
                group.append((batch, position))
                if len(group) == self._size:
                    self._add(group)
                if self._closing:
                    return
        finally:  # also the batches before an error
            self._add(group)

    def _add(self, group: list[tuple[Batch, Any]]) -> None:
        """Makes the group of a call from the batches in ``group``, if there are any, and empties it."""
        if not group or self._closing:
            return
        self._room.acquire()
        if self._closing:  # close() made the room, to end this wait
            return
        padded = group + group[-1:] * (self._size - len(group))
        batches = tuple(batch for batch, _ in padded)
        positions = tuple(position for _, position in group)
        self._groups.append(BatchGroup(batches, len(group), positions))
        group.clear()
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
