"""One stretch of time in which an event loop serves a bus: its tasks, its threads, and work sent to it from outside."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.abc import TaskGroup

from eventtrain.bus.subscription import Subscription
from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.errors import BusClosed

T = TypeVar("T")

PLAIN_HANDLER_THREADS = 40
"""Worker threads for plain handlers: a limiter of our own, so that a service's own thread calls are not delayed."""


class BusRunner:
    """Made and ended on the event loop's thread, inside the task group that its tasks run in."""

    def __init__(self, tasks: TaskGroup) -> None:
        self.tasks = tasks
        self.loop = LoopThread()
        self.inbox_bell = Wakeup(self.loop)
        self.stream_bell = Wakeup(self.loop)
        self.limiter = CapacityLimiter(PLAIN_HANDLER_THREADS)
        self._errand_bell = Wakeup(self.loop)
        self._errands: deque[Callable[[], None]] = deque()
        self._submitted: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def employ(self, subscription: Subscription) -> None:
        """Start the workers of a subscription. Any thread."""

        def start() -> None:
            subscription.worker.attach(self.loop)
            self.tasks.start_soon(subscription.worker.work, name=f"eventtrain {subscription.name}")

        self._send(start)

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Run a coroutine function as a task of its own, from any other thread."""
        future: Future[T] = Future()

        async def run() -> None:
            try:
                result = await function(*args)
            except Exception as error:
                future.set_exception(error)
            except BaseException:
                future.set_exception(_stopped())
                raise
            else:
                future.set_result(result)
            finally:
                self._submitted.discard(future)

        def start() -> None:
            if future.set_running_or_notify_cancel():
                self.tasks.start_soon(run)
            else:
                self._submitted.discard(future)

        with self._lock:
            if self._ended:
                raise _stopped()
            self._submitted.add(future)
        self._send(start)
        return future

    def _send(self, errand: Callable[[], None]) -> None:
        self._errands.append(errand)
        self._errand_bell.ring()

    async def run_errands(self) -> None:
        """Start tasks on behalf of other threads, for ever: anyio lets only a task start another one."""
        while True:
            await self._errand_bell.sleep_unless(lambda: len(self._errands))
            while self._errands:
                self._errands.popleft()()

    def stop(self) -> None:
        """Cancel all tasks. Any thread; never blocks."""
        self.loop.run_soon(self.tasks.cancel_scope.cancel)

    def end(self) -> None:
        """All tasks have ended: whoever waits for one that never started is told."""
        with self._lock:
            self._ended = True
            left = list(self._submitted)
        for future in left:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(_stopped())


def _stopped() -> BusClosed:
    return BusClosed("The bus is not running, so nothing can be run on its event loop.")
