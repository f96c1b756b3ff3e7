"""How batches reach the loop: straight from the iterator where they lie on the device, else through the prefetcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from eventtrain.data.prefetch import BatchGroup, Prefetcher
from eventtrain.data.sources import Peeked, batches_from, on_device
from eventtrain.errors import DataError

Wait = Callable[[Callable[[], object]], bool]
"""Waits until its argument is true; False if the run has to end first."""


class EpochIterator:
    """The batches of one epoch, in groups of ``steps_per_call``. Training thread only; close it.

    Batches that lie on the device already need no thread: the first one tells. A resumed epoch begins at batch
    ``start``, with the iterator in ``data_state`` where it has one; it may have no batch left.
    """

    def __init__(
        self,
        data: Any,
        epoch: int,
        *,
        steps_per_call: int,
        sharding: jax.sharding.Sharding | None,
        wait: Wait,
        on_ready: Callable[[], None],
        start: int = 0,
        data_state: Any = None,
    ) -> None:
        self._wait = wait
        self._prefetcher: Prefetcher | None = None
        self._direct: Peeked | None = None
        self.exhausted = False
        """Whether `next` gave None because the epoch has no more batches."""
        try:
            batches = Peeked(batches_from(data, epoch, start, data_state))
        except StopIteration:
            if start:  # resumed behind the epoch's last batch
                return
            raise DataError(
                f"The data of epoch {epoch} is empty: it ended before its first batch. Check the files and the batch "
                "size; a generator can be iterated only once, so give a callable epoch -> iterable instead."
            ) from None
        if steps_per_call == 1 and on_device(batches.first):
            self._direct = batches
        else:
            self._prefetcher = Prefetcher(
                batches, steps_per_call=steps_per_call, sharding=sharding, on_ready=on_ready
            )

    def next(self) -> BatchGroup | None:
        """The next group; None at the end of the epoch, or when the run has to end."""
        if self._direct is not None:
            for batch in self._direct:
                return BatchGroup((batch,), 1, (self._direct.get_state(),))
        elif self._prefetcher is not None:
            ready = self._prefetcher.ready
            if not ready() and not self._wait(ready):
                return None
            group = self._prefetcher.take()
            if group is not None:
                return group
        self.exhausted = True
        return None

    def batches(self) -> Iterator[Any]:
        """Every batch, one by one; for ``steps_per_call=1``."""
        while (group := self.next()) is not None:
            yield group.batches[0]

    def close(self) -> None:
        """Stop the prefetch thread. Idempotent."""
        if self._prefetcher is not None:
            self._prefetcher.close()
