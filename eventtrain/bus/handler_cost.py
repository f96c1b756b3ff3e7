"""What a handler costs: CPU time and time on the event loop, charged without touching each event."""

from __future__ import annotations

import threading
from collections.abc import Coroutine, Generator
from functools import partial
from time import perf_counter, thread_time
from types import coroutine
from typing import Any


class HandlerCost:
    """The costs of one subscription. Written on the event loop's thread (and by helper threads under the lock)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.cpu_s = 0.0
        """CPU time of the handler, on the event loop's thread and in worker threads."""
        self.wall_s = 0.0
        """Time from the start to the end of each handler call, summed, waiting included."""
        self.longest_slice_s = 0.0
        """The longest time that the handler held the event loop without giving way."""
        self.slice_began: float | None = None
        """While the handler holds the event loop: since when (``perf_counter``). Read by the watchdog."""

    def charge_thread(self, cpu_s: float) -> None:
        """Add CPU time used in a worker thread. Any thread."""
        with self._lock:
            self.cpu_s += cpu_s

    def charge_slice(self, cpu_s: float, wall_s: float) -> None:
        """Add one stretch between two suspensions, on the event loop's thread."""
        with self._lock:
            self.cpu_s += cpu_s
        if wall_s > self.longest_slice_s:
            self.longest_slice_s = wall_s


@coroutine
def metered(work: Coroutine[Any, Any, None], meter: HandlerCost) -> Generator[Any, Any, None]:
    """Drive ``work`` as ``await`` would, charging every slice between two suspensions to ``meter``.

    A worker handles many events in one slice, so the two clocks (0.6 us for the CPU's) are read per wake-up and
    per suspension, not per event.
    """
    resume = partial(work.send, None)
    while True:
        meter.slice_began = began = perf_counter()
        cpu_began = thread_time()
        try:
            yielded = resume()
        except StopIteration:
            return
        finally:
            meter.slice_began = None
            meter.charge_slice(thread_time() - cpu_began, perf_counter() - began)
        try:
            sent = yield yielded
        except BaseException as error:  # cancellation, GeneratorExit: the work decides what to do with it
            resume = partial(work.throw, error)
        else:
            resume = partial(work.send, sent)
