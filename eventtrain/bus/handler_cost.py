"""Drives the handlers of one subscription: in a context of their own, measured without a clock for each event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from functools import partial
from time import perf_counter, thread_time
from types import coroutine
from typing import Any

FRESH_CONTEXT = object()
"""Yielded to ``measured``: continue in a new copy of the context."""


class HandlerCost:
    """Cost of one subscription's handler. Written on the event loop's thread, and by worker threads under the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.cpu_s = 0.0
        """CPU time of the handler, on the event loop's thread and in worker threads."""
        self.wall_s = 0.0
        """Time from the start to the end of each handler call, summed, waiting included."""
        self.longest_slice_s = 0.0
        """The longest time that the handler held the event loop without suspending."""
        self.slice_began: float | None = None
        """While the handler holds the event loop: since when (``perf_counter``). Read by the watchdog's thread."""

    def add_thread_time(self, cpu_s: float) -> None:
        """Adds CPU time used in a worker thread. Any thread."""
        with self._lock:
            self.cpu_s += cpu_s

    def add_slice(self, cpu_s: float, wall_s: float) -> None:
        """Adds the time between two suspensions. On the event loop's thread."""
        with self._lock:
            self.cpu_s += cpu_s
        if wall_s > self.longest_slice_s:
            self.longest_slice_s = wall_s


@coroutine
def fresh_context() -> Generator[Any, Any, None]:
    """Lets the caller, which ``measured`` drives, continue in a new copy of the context. Not a suspension."""
    yield FRESH_CONTEXT


@coroutine
def measured(
    work: Coroutine[Any, Any, None], cost: HandlerCost, copy: Callable[[], Context]
) -> Generator[Any, Any, None]:
    """Drives ``work`` as ``await`` would, and adds every slice between two suspensions to ``cost``.

    ``work`` runs in the context (contextvars) that ``copy()`` returns, until it awaits ``fresh_context()``. A task of
    its own for each context would do the same, at 20 times the cost.

    A worker handles many events in one slice, so the two clocks (0.6 us for the CPU's) are read once per wake-up and
    once per suspension, not for each event.
    """
    resume, run = partial(work.send, None), copy().run
    while True:
        cost.slice_began = began = perf_counter()
        cpu_began = thread_time()
        try:
            yielded = run(resume)
        except StopIteration:
            return
        finally:
            cost.slice_began = None
            cost.add_slice(thread_time() - cpu_began, perf_counter() - began)
        if yielded is FRESH_CONTEXT:
            resume, run = partial(work.send, None), copy().run
            continue
        try:
            sent = yield yielded
        except BaseException as error:  # cancellation or GeneratorExit: ``work`` decides how to react
            resume = partial(work.throw, error)
        else:
            resume = partial(work.send, sent)
