"""Batches of one epoch for the loop: straight from the user's iterator, or through the prefetch thread.

Batches that are on the device already need no thread, which would cost 100 us a batch; the first batch decides. All of
it runs on the thread that takes the batches; only `Prefetcher` has another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from eventtrain.data.prefetch import BatchGroup, Prefetcher
from eventtrain.data.sources import Batch, batches_from, iterator_state, on_device
from eventtrain.errors import DataError


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
        steps_per_call: batches in a group.
        sharding: of NumPy batches on the device.
        waiter: how to wait for the prefetch thread.
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
        self._direct: _Peeked | None = None
        try:
            batches = _Peeked(batches_from(data, epoch, start, data_state))
        except StopIteration:
            if start:  # resumed behind the last batch of the epoch
                return
            raise DataError(
                f"The data of epoch {epoch} is empty: it ended before its first batch. Check the files and the batch "
                "size. A generator can be iterated only once, so pass a callable epoch -> iterable instead."
            ) from None
        if steps_per_call == 1 and on_device(batches.first):
            self._direct = batches
        else:
            self._prefetcher = Prefetcher(
                batches, steps_per_call=steps_per_call, sharding=sharding, on_ready=waiter.wake
            )

    def next(self) -> BatchGroup | None:
        """Returns the next group; None at the end of the epoch, or when the run has to end."""
        if self._direct is not None:
            for batch in self._direct:
                return BatchGroup((batch,), 1, (self._direct.get_state(),))
        elif self._prefetcher is not None:
            ready = self._prefetcher.ready
            if not ready() and not self._waiter.wait(ready):
                return None
            group = self._prefetcher.take()
            if group is not None:
                return group
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


class _Peeked(Iterator[Batch]):
    """An iterator whose first batch was inspected.

    Raises:
        StopIteration: it has no batch.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.first = next(batches)
        self._after_first = iterator_state(batches)
        self._handed_out_first = False

    def __next__(self) -> Batch:
        if not self._handed_out_first:
            self._handed_out_first = True
            return self.first
        self._after_first = None
        return next(self._batches)

    def get_state(self) -> Any:
        """Returns the state after the last batch handed out; None where the iterator has none."""
        return self._after_first if self._after_first is not None else iterator_state(self._batches)

    def close(self) -> None:
        """Closes the iterator, if it can be closed."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
