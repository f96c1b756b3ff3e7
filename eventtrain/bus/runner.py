"""Runs a bus on one event loop for a while: its tasks, its threads, and coroutines submitted from other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter
from anyio.abc import TaskGroup

from eventtrain.bus.cancellation import persist
from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.bus.worker import Worker
from eventtrain.errors import BusClosed

T = TypeVar("T")

BLOCKED_S = 0.1
"""The event loop counts as blocked while it has not answered for this long."""
PLAIN_HANDLER_THREADS = 40
"""Worker threads for plain handlers. They have a limiter of their own, so that a service's own threads are not
delayed."""


class BusRunner:
    """Created and ended on the event loop's thread, inside the task group of its tasks."""

    def __init__(self, tasks: TaskGroup) -> None:
        self.tasks = tasks
        self.loop = LoopThread()
        self.publish_wakeup = Wakeup(self.loop)
        self.stream_wakeup = Wakeup(self.loop)
        self.limiter = CapacityLimiter(PLAIN_HANDLER_THREADS)
        self._start_wakeup = Wakeup(self.loop)
        self._starts: deque[Callable[[], None]] = deque()
        self._submitted: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._ended = False
        self._pinged_s: float | None = None
        self._blocked_s = 0.0

    def start_worker(self, worker: Worker, name: str) -> None:
        """Starts the worker of the subscription ``name``. Any thread."""

        def start() -> None:
            if worker.running_on is self.loop:
                return
            worker.attach(self.loop)
            self.start_task(worker.work, name)

        self._start_soon(start)

    def start_task(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Starts a task that ends with the bus. On the event loop's thread."""
        self.tasks.start_soon(partial(persist, work), name=f"eventtrain {name}")

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Runs a coroutine function as a task of its own, in a copy of the caller's context. Any other thread."""
        context = copy_context()
        future: Future[T] = Future()

        async def run() -> None:
            try:
                result = await function(*args)
            except anyio.get_cancelled_exc_class():
                future.set_exception(_not_running())
                raise
            except BaseException as error:  # SystemExit too: it must end the caller, not the event loop
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                self._submitted.discard(future)

        def start() -> None:
            if future.set_running_or_notify_cancel():
                context.run(self.tasks.start_soon, run)
            else:
                self._submitted.discard(future)

        with self._lock:
            if self._ended:
                raise _not_running()
            self._submitted.add(future)
        self._start_soon(start)
        return future

    def _start_soon(self, start: Callable[[], None]) -> None:
        self._starts.append(start)
        self._start_wakeup.wake()

    async def start_tasks(self) -> None:
        """Starts tasks for other threads, forever: anyio lets only a task of the loop start another one."""
        while True:
            await self._start_wakeup.sleep_until(lambda: len(self._starts))
            while self._starts:
                self._starts.popleft()()

    # --- is the event loop blocked? -----------------------------------------------------------------------------

    def ping(self) -> None:
        """Asks the event loop for a sign of life, unless an answer is due already. The watchdog's thread."""
        if self._pinged_s is None:
            self._pinged_s = perf_counter()
            self.loop.run_soon(self._answer)

    def _answer(self) -> None:
        self._blocked_s += self.blocked_now_s
        self._pinged_s = None

    @property
    def blocked_now_s(self) -> float:
        """For how long the event loop has not answered; 0.0 if it answers."""
        pinged_s = self._pinged_s
        silent_s = perf_counter() - pinged_s if pinged_s is not None else 0.0
        return silent_s if silent_s > BLOCKED_S else 0.0

    @property
    def blocked_s(self) -> float:
        """For how long it was blocked in total, in seconds."""
        return self._blocked_s + self.blocked_now_s

    def stop(self) -> None:
        """Cancels all tasks. Any thread; never blocks."""
        self.loop.run_soon(self.tasks.cancel_scope.cancel)

    def end(self) -> None:
        """All tasks have ended. Fails the futures whose task was never started."""
        with self._lock:
            self._ended = True
            left = list(self._submitted)
        for future in left:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(_not_running())


def _not_running() -> BusClosed:
    return BusClosed("The bus is not running, so nothing can be run on its event loop.")
