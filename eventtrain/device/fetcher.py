"""The thread that waits for the device, so that the training thread need not.

Rings go in as they are dispatched, columns of values come out, in the same order; whatever else is
put between them (control events) keeps its place. This is the only thread that ever waits for a
result of the training computation.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from eventtrain.device.metric_codec import Column, MetricLayout

__all__ = ["Fetcher", "MetricColumns", "Ring"]


class Ring(NamedTuple):
    """A ring as `take_ring` gave it: its first `rows` rows are used, perhaps not computed yet.

    `meta` is the caller's and comes back in `Columns.meta`.
    """

    ring: jax.Array
    rows: int
    layout: MetricLayout
    meta: Any


class MetricColumns(NamedTuple):
    """A fetched ring: one read-only column of `rows` values for each metric.

    `watched` holds the watched hyperparameters by leaf index, in the same form.
    """

    metrics: dict[str, Column]
    rows: int
    meta: Any
    watched: dict[int, Column]


class Fetcher:
    """Waits for rings in a thread of its own and delivers their columns in order.

    Args:
        deliver: gets each item, on the fetch thread: a `Columns` for a `Ring`, anything else as it
            was put. While it runs, later items wait.
        on_failure: called once, on the fetch thread, if the device reports an error or `deliver`
            raises. What was put after that is swallowed.

    Attributes:
        failure: what went wrong, or None.
        swallowed: how many items came after the failure (the failing one included).
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
        self._closing = threading.Lock()
        self._closed = False
        self._rows_put = 0  # written by the training thread only
        self._rows_done = 0  # written by the fetch thread only
        self.failure: BaseException | None = None
        self.swallowed = 0

    @property
    def backlog(self) -> int:
        """Rows put and not delivered yet (or swallowed); any thread may read it."""
        return self._rows_put - self._rows_done

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def put(self, item: Any) -> None:
        """Queue an item; training thread only; never blocks. After `close` a RuntimeError."""
        if self._closed:
            raise RuntimeError("Fetcher.put() after close(): nobody would deliver the item.")
        if isinstance(item, Ring):
            self._rows_put += item.rows
        self._queue.put(item)

    def close(self, timeout_s: float | None = None) -> bool:
        """Deliver all that was put and end the thread; blocks, for `timeout_s` at most.

        May be called again, also from another thread. Returns whether the thread has ended.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(_END)
        if self._thread.ident is None:  # never started: nothing was promised
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self.failure is None:
                try:
                    self._deliver(_fetched(item) if isinstance(item, Ring) else item)
                except BaseException as error:
                    self.failure = error
                    self.swallowed += 1
                    self._on_failure(error)
            else:
                self.swallowed += 1
            if isinstance(item, Ring):
                self._rows_done += item.rows
            del item  # while this thread sleeps it must not keep a ring alive


_END = object()


def _fetched(item: Ring) -> MetricColumns:
    # The only wait; the GIL is released. On the CPU this is a view of the buffer, and a live view
    # would keep it from being reused: decode() copies.
    rows = np.asarray(item.ring)[: item.rows]
    metrics, watched = item.layout.decode(rows), item.layout.decode_watched(rows)
    return MetricColumns(metrics, item.rows, item.meta, watched)
