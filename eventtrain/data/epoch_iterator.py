"""The batches of one epoch, as the loop takes them: from a thread that runs ahead, or directly."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import jax

from eventtrain.data.array_loader import ArrayLoader
from eventtrain.data.batch_group import (
    BatchGroup,
    GroupMaker,
    GroupMakerOfGlobalBatches,
    GroupMakerOfSplitBatches,
)
from eventtrain.data.prefetch import Prefetcher
from eventtrain.data.sources import EpochReader, require_batches
from eventtrain.device.batch_sharding import BatchSharding
from eventtrain.errors import DataError

CLOSE_S = 0.5
"""The longest wait for the thread at the end of an epoch that was cut short: the user's iterator may block."""


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
        split: of the parts of a batch, where each device gets its own; in place of ``sharding``.
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
        split: BatchSharding | None = None,
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
        gives_memory = type(data) is ArrayLoader and data.gives_memory
        if jax.process_count() > 1:
            maker = GroupMakerOfGlobalBatches(steps_per_call, sharding, name=self._name)
        elif split is not None:
            maker = GroupMakerOfSplitBatches(steps_per_call, split, gives_memory=gives_memory)
        else:
            maker = GroupMaker(steps_per_call, sharding, gives_memory=gives_memory)
        if not checks and _is_direct(data, maker.most_on_host) and start <= len(data):
            self._direct = _direct(data, epoch, start, most, maker)
            return
        before = self._leftovers.take(data)

        def read() -> EpochReader:
            return EpochReader(data, epoch, start, data_state, before.rest() if before is not None else ())

        self._prefetcher = Prefetcher(
            read,
            maker,
            most=most,
            batch_crc32=batch_crc32,
            on_ready=waiter.wake,
        )

    def next(self) -> BatchGroup | None:
        """Returns the next group; None at the end of the epoch, or when the run has to end.

        If ``start`` or ``most`` leave no batch to train on, the first group has 0 steps and a batch of the epoch to
        compile for, unless there is none.

        Raises:
            DataError: ``data`` yields no batches, or NumPy arrays in a run of several processes. What the user's code
                raises passes unchanged.
        """
        return self._next()

    def sample(self) -> Any:
        """Returns the first batch, to trace a function for; None if the run has to end first. Raises as ``next``."""
        group = self._next()
        return None if group is None else group.call

    def _next(self) -> BatchGroup | None:
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
            yield group.call

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


def _is_direct(data: Any, most_on_host: int) -> bool:
    """Whether batches of ``data`` can be taken without a thread: no code of the user's, and nothing to wait for.

    NumPy batches larger than ``most_on_host`` bytes are to be transferred ahead.
    """
    if type(data) is ArrayLoader:  # a subclass may run any code
        return data.in_memory and data.batch_bytes <= most_on_host
    if type(data) not in (list, tuple):
        return False
    leaves = jax.tree_util.tree_leaves(data[:1])
    on_host = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
    return sum(getattr(leaf, "nbytes", 0) for leaf in on_host) <= most_on_host


def _direct(data: Any, epoch: int, start: int, most: int | None, maker: GroupMaker) -> Iterator[BatchGroup]:
    """Yields the groups of an epoch of ``data`` that is in memory; if ``start`` or ``most`` leave none, a sample."""
    batches = data(epoch, start=start) if isinstance(data, ArrayLoader) else islice(data, start, None)
    empty = True
    for batch in islice(batches, most):
        empty = False
        yield from maker.add(batch)
    yield from maker.take()
    if empty and (start > 0 or most == 0):
        yield maker.sample(list(islice(data, 1)))
