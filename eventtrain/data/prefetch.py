"""Batches of one epoch for the loop, made by a thread that runs ahead.

- Only the prefetch thread runs the user's code: ``data(epoch)``, ``iter``, ``set_state`` and ``next`` may take minutes,
  and the training thread waits for them where it serves commands. Lists and tuples of device arrays need no thread.
- Only the consumer thread takes groups.
- NumPy batches are copied before they are put on the device: JAX may alias their memory (24 of 50 batches on a CPU) or
  read it late, and an iterator may fill one buffer again and again.
- The groups of a call are assembled by that thread: on the training thread that would cost what ``steps_per_call``
  saves.
- The thread continues when half of what may wait was taken: two threads that wake each other at every batch cost more
  than a short step.
"""

from __future__ import annotations

import collections
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from eventtrain.data.sources import Batch, EpochReader, on_device, require_batches
from eventtrain.device.state import checksum, with_x64_of_caller
from eventtrain.errors import DataError

logger = logging.getLogger("eventtrain")

DEPTH, DEPTH_OF_SMALL = 4, 64
SMALL_BYTES = 256 * 1024
"""A batch on the device that is not larger is cheap enough for ``DEPTH_OF_SMALL`` of them to wait."""
CLOSE_S = 0.5
"""The longest wait for the thread at the end of an epoch that was cut short: the user's iterator may block."""


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


class Leftovers:
    """Batches that were taken from iterators of the user and not trained on, for the next run with the same iterator.

    One object per trainer. They are kept for the iterators given last, so that a forgotten one does not fill memory.
    """

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[Any, Prefetcher]] = collections.deque(maxlen=4)

    def keep(self, iterator: Any, prefetcher: Prefetcher) -> None:
        """Keep what ``prefetcher`` has, and what it still takes before it ends."""
        self._kept.append((iterator, prefetcher))

    def take(self, data: Any) -> Prefetcher | None:
        """Returns the prefetcher that read the same iterator last, if it left anything."""
        for entry in list(self._kept):
            if entry[0] is data:
                self._kept.remove(entry)
                return entry[1]
        return None


class EpochIterator:
    """The batches of one epoch, in groups of ``steps_per_call``; to be closed by the thread that takes them.

    Args:
        data: as for ``Trainer.fit``.
        sharding: of NumPy batches on the device.
        start: batches of a resumed epoch that were trained on before; it may have no batch left.
        data_state: state of the data's iterator after them, where it has one.
        batch_crc32: of the last one of them. If it is made again and is another, that is logged.
        most: batches to take at most; None for all of the epoch.
        leftovers: of the trainer. Without it, what was prefetched from an iterator and not used is lost.
        name: of the data, in messages; by default "data of epoch <epoch>".

    Raises:
        DataError: ``data`` is a tuple of whole arrays.
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
        batch_crc32: int | None = None,
        most: int | None = None,
        leftovers: Leftovers | None = None,
        name: str = "",
    ) -> None:
        self._data = data
        self._name = name or f"data of epoch {epoch}"
        require_batches(data, self._name)
        self._waiter = waiter
        self._leftovers = leftovers or Leftovers()
        self._group: BatchGroup | None = None
        self._used = 0
        self._begun = False
        self._direct: Iterator[BatchGroup] | None = None
        self._prefetcher: Prefetcher | None = None
        checks = start > 0 and batch_crc32 is not None
        if steps_per_call == 1 and not checks and type(data) in (list, tuple) and all(map(on_device, data)):
            chosen, is_part = data[start : None if most is None else start + most], start > 0 or most == 0
            self._direct = _groups_of(chosen, data[:1] if is_part else None)
            return
        before = self._leftovers.take(data)

        def read() -> EpochReader:
            return EpochReader(data, epoch, start, data_state, before.rest() if before is not None else ())

        self._prefetcher = Prefetcher(
            read,
            steps_per_call=steps_per_call,
            sharding=sharding,
            most=most,
            batch_crc32=batch_crc32,
            on_ready=waiter.wake,
        )

    def next(self) -> BatchGroup | None:
        """Returns the next group; None at the end of the epoch, or when the run has to end.

        If ``start`` or ``most`` leave no batch to train on, the first group has 0 steps and a batch of the epoch to
        compile for, unless there is none.

        Raises:
            DataError: ``data`` yields no batches. What the user's code raises passes unchanged.
        """
        self._group, self._used = None, 0
        if self._prefetcher is not None:
            ready = self._prefetcher.ready
            if not ready() and not self._waiter.wait(ready):
                return None
            self._group = self._prefetcher.take()
        elif self._direct is not None:
            self._group = next(self._direct, None)
        if self._group is None and not self._begun:
            raise DataError(
                f"The {self._name} is empty: it ended before its first batch. Check the files and the batch size. A "
                "generator can be iterated only once, so pass a callable epoch -> iterable instead."
            )
        self._begun = True
        return self._group

    def used(self, count: int) -> None:
        """Record that ``count`` batches of the group that ``next`` returned last were trained on."""
        self._used = count

    def batches(self) -> Iterator[Any]:
        """Yields every batch; for ``steps_per_call=1``."""
        while (group := self.next()) is not None:
            self.used(1)
            yield group.batches[0]

    def close(self) -> None:
        """Stops the prefetch thread, and waits a moment for it. Keeps what it took from an iterator of the user."""
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is None:
            return
        if self._group is not None:
            prefetcher.put_back(self._group, self._used)
        prefetcher.close(CLOSE_S)
        if isinstance(self._data, Iterator) and not callable(self._data) and prefetcher.has_rest():
            self._leftovers.keep(self._data, prefetcher)


class Prefetcher:
    """Runs the code of the user's data in a thread of its own, and puts batches on the device ahead of use.

    Args:
        read: opens the data, on the thread.
        steps_per_call: batches in a group. A group also ends where the next batch has another shape, dtype or
            structure, since one call needs them alike.
        depth: groups that may wait; that many groups of memory are used beside those of the step. Small batches that
            are on the device already may be more.
        most: batches to take at most.
        batch_crc32: of the batch before the first one.
        sharding: where NumPy leaves are put; None is JAX's default device. Other leaves stay as they are.
        on_ready: called on the prefetch thread after each group and at the end, when `ready()` holds.

    `ready`, `take`, `put_back` and `close` belong to one consumer thread; only `close` blocks.
    """

    def __init__(
        self,
        read: Callable[[], EpochReader],
        *,
        steps_per_call: int = 1,
        depth: int = DEPTH,
        most: int | None = None,
        batch_crc32: int | None = None,
        sharding: jax.sharding.Sharding | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._read = read
        self._size = steps_per_call
        self._depth = depth
        self._most = most
        self._batch_crc32 = batch_crc32
        self._sharding = sharding
        self._on_ready = on_ready
        self._groups: collections.deque[BatchGroup] = collections.deque()
        self._refill_below = depth
        self._full = False
        self._room = threading.Event()
        self._closing = False
        self._ended = False  # set last: a thread that reads True finds every group, and the error
        self._error: BaseException | None = None
        self._unread: list[tuple[Batch, Any]] = []
        run = with_x64_of_caller(self._run)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(run,), name="eventtrain-prefetch", daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` has a result: a group, the end, or an error."""
        return bool(self._groups) or self._ended

    def take(self) -> BatchGroup | None:
        """Returns the next group, or None at the end of the data.

        Raises:
            RuntimeError: nothing is ready; call `ready()` first, or wait for `on_ready`.
            BaseException: what the user's code raised, unchanged, after the batches before it.
        """
        ended = self._ended  # read first: a group may be added, but not after this was true
        if self._groups:
            group = self._groups.popleft()
            if self._full and len(self._groups) < self._refill_below:
                self._room.set()
            return group
        if not ended:
            raise RuntimeError("Prefetcher.take() was called while nothing is ready. Call ready() first.")
        if self._error is not None:
            raise self._error
        return None

    def put_back(self, group: BatchGroup, used: int) -> None:
        """Returns the batches behind the first ``used`` ones of a group, the last one taken, for ``rest``."""
        if used < group.steps:
            self._groups.appendleft(
                BatchGroup(group.batches[used:], group.steps - used, group.positions[used:])
            )

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Stops the thread and waits for it, at most `timeout_s`; may be called again.

        Returns whether it has ended: it has not while the user's code blocks.
        """
        self._closing = True
        self._room.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def has_rest(self) -> bool:
        """Whether ``rest`` may have something. After ``close``."""
        return bool(self._groups or self._unread) or not self._ended

    def rest(self) -> list[tuple[Batch, Any]]:
        """Returns the batches that were not taken, each with the state after it. Blocks until the thread has ended."""
        self._thread.join()
        taken = [
            pair
            for group in self._groups
            for pair in zip(group.batches[: group.steps], group.positions, strict=True)
        ]
        rest = taken + self._unread
        self._groups.clear()
        self._unread = []
        return rest

    def _run(self) -> None:
        reader: EpochReader | None = None
        try:
            reader = self._read()
            self._compare(reader)
            self._fill(reader)
        except BaseException as error:
            self._error = error
        try:
            self._unread = reader.close() if reader is not None else []
        except BaseException as error:
            self._error = self._error or error
        self._ended = True
        self._on_ready()

    def _compare(self, reader: EpochReader) -> None:
        """Log if the data that was made again is not that which was trained on."""
        for batch in reader.last_skipped if self._batch_crc32 is not None else ():
            now = checksum(jax.tree.map(self._on_device, batch))
            if now is not None and now != self._batch_crc32:
                logger.warning(
                    "The run does not resume exactly: batch %d of epoch %d is not the one that was trained on before "
                    "the checkpoint, so the rest of the epoch may repeat examples and leave out others. Data that "
                    "shuffles itself must do so by a seed and the epoch, as et.ArrayLoader does, or have an iterator "
                    "with get_state and set_state.",
                    reader.start - 1, reader.epoch,
                )  # fmt: skip

    def _fill(self, reader: EpochReader) -> None:
        group: list[tuple[Batch, Any]] = []
        empty = True
        try:
            for batch, position in islice(reader, self._most):
                empty = False
                given = on_device(batch)
                if not given:
                    batch = jax.tree.map(self._on_device, batch)
                if group and _kinds(group[-1][0]) != _kinds(batch):
                    self._add(group, given)
                group.append((batch, position))
                if len(group) == self._size or self._closing:
                    self._add(group, given)
                if self._closing:
                    return
        finally:  # also the batches before an error
            self._add(group, False)
        if empty and (self._most == 0 or reader.start > 0):
            samples = tuple(jax.tree.map(self._on_device, batch) for batch in reader.sample())
            self._groups.append(BatchGroup(samples * self._size, 0, ()))

    def _add(self, group: list[tuple[Batch, Any]], given: bool) -> None:
        """Makes the group of a call from the batches in ``group``, if there are any, and empties it.

        Waits for room before it, except when the thread has to end: an iterator of the user would lose the batches.
        """
        if not group:
            return
        if len(self._groups) >= self._depth:
            self._wait_for_room(group, given)
        padded = group + group[-1:] * (self._size - len(group))
        batches = tuple(batch for batch, _ in padded)
        positions = tuple(position for _, position in group)
        self._groups.append(BatchGroup(batches, len(group), positions))
        group.clear()
        self._on_ready()

    def _wait_for_room(self, group: list[tuple[Batch, Any]], given: bool) -> None:
        depth = self._depth
        if given and _size_bytes(group[0][0]) <= SMALL_BYTES:
            depth = max(depth, DEPTH_OF_SMALL // self._size)
        if len(self._groups) < depth:
            return
        self._refill_below, self._full = depth // 2 + 1, True
        while len(self._groups) >= self._refill_below and not self._closing:
            self._room.wait()
            self._room.clear()
        self._full = False

    def _on_device(self, leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm":
            return jax.device_put(np.array(leaf), self._sharding)  # a copy, since JAX may alias the memory
        return leaf


def _groups_of(batches: Sequence[Batch], sample: Sequence[Batch] | None) -> Iterator[BatchGroup]:
    for batch in batches:
        yield BatchGroup((batch,), 1, (None,))
    if not batches and sample is not None:
        yield BatchGroup(tuple(sample), 0, ())


def _size_bytes(batch: Batch) -> int:
    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(batch))


def _kinds(batch: Batch) -> tuple[Any, ...]:
    """Returns what all batches of one call must have in common."""
    leaves, treedef = jax.tree_util.tree_flatten(batch)
    return treedef, [
        (leaf.shape, leaf.dtype, leaf.sharding)
        if isinstance(leaf, jax.Array)
        else (type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
        for leaf in leaves
    ]
