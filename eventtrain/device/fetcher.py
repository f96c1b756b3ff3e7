"""The fetch thread: no other thread waits for a result of the training computation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from eventtrain.device.metric_ring import TakenRing
from eventtrain.device.stateful_metrics import TakenStates


class Fetcher:
    """Waits for rings in a thread of its own and delivers their columns in order.

    Rings are put in as they are dispatched. Other items (events of the loop) keep their place between them.

    Args:
        deliver: gets each item, on the fetch thread: a `MetricColumns` for a `TakenRing`, a `FetchedStates` for a
            `TakenStates`, any other item as it was put. Later items wait while it runs.
        on_failure: called once, on the fetch thread, with the first error of the device or of `deliver`, which is also
            `failure`. That item and all later ones are discarded.
    """

    def __init__(
        self,
        deliver: Callable[[Any], None],
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._deliver = deliver
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="eventtrain-fetch", daemon=True)
        self._closed = False
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Starts the thread; once."""
        self._thread.start()

    def put(self, item: Any) -> None:
        """Queues an item; raises a RuntimeError after `close`. Training thread only; never blocks."""
        if self._closed:
            raise RuntimeError("Fetcher.put() was called after close(), so the item would not be delivered.")
        self._queue.put(item)

    def close(self) -> None:
        """Delivers all that was put and ends the thread; blocks until then. May be called again."""
        self._closed = True
        self._queue.put(_END)
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self.failure is None:
                try:
                    self._deliver(item.fetch() if isinstance(item, (TakenRing, TakenStates)) else item)
                except BaseException as error:
                    self.failure = error
                    self._on_failure(error)
            del item  # while this thread sleeps it must not keep a ring alive


_END = object()
