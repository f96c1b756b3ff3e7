"""Batches of one epoch for the loop: straight from the user's iterator, or through the prefetch thread.

Batches that are on the device already need no thread, which would cost 100 us a batch; the first batch decides. All of
it runs on the thread that takes the batches; only `Prefetcher` has another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from eventtrain.data.prefetch import BatchGroup, Prefetcher
from eventtrain.data.sources import Batch, batches_from, iterator_state, on_device, with_states
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
        self._direct: Iterator[tuple[Batch, Any]] | None = None
        batches = batches_from(data, epoch, start, data_state)
        try:
            batch = next(batches)
        except StopIteration:
            if start:  # resumed behind the last batch of the epoch
                return
            raise DataError(
                f"The data of epoch {epoch} is empty: it ended before its first batch. Check the files and the batch "
                "size. A generator can be iterated only once, so pass a callable epoch -> iterable instead."
            ) from None
        first = batch, iterator_state(batches)
        if steps_per_call == 1 and on_device(batch):
            self._direct = with_states(batches, first)
        else:
            self._prefetcher = Prefetcher(
                batches, first, steps_per_call=steps_per_call, sharding=sharding, on_ready=waiter.wake
            )

    def next(self) -> BatchGroup | None:
        """Returns the next group; None at the end of the epoch, or when the run has to end."""
        if self._direct is not None:
            for batch, state in self._direct:
                return BatchGroup((batch,), 1, (state,))
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
