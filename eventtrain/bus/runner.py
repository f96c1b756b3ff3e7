"""Runs a bus on one event loop for a while: its tasks, its threads, and coroutines submitted from other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.abc import TaskGroup

from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.bus.worker import Worker
from eventtrain.errors import BusClosed

T = TypeVar("T")

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

    def start_worker(self, worker: Worker, name: str) -> None:
        """Starts the worker of the subscription ``name``. Any thread."""

        def start() -> None:
            worker.attach(self.loop)
            self.tasks.start_soon(worker.work, name=f"eventtrain {name}")

        self._start_soon(start)

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Runs a coroutine function as a task of its own, in a copy of the caller's context. Any other thread."""
        context = copy_context()
        future: Future[T] = Future()

        async def run() -> None:
            try:
                result = await function(*args)
            except Exception as error:
                future.set_exception(error)
            except BaseException:
                future.set_exception(_not_running())
                raise
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
