"""The only crossing from other threads into an event loop.

anyio has no public fire-and-forget wake-up: ``from_thread.run_sync`` blocks the caller (34-130 us), a blocking portal
costs 90-500 us. So this module asks the running loop itself: ``call_soon_threadsafe`` on asyncio and uvloop,
``TrioToken.run_sync_soon`` on trio. Even that costs 6 us, so a ``Wakeup`` calls it only while its task sleeps.

All classes here avoid a lock on the notifying side by one order of operations. The waiter first makes itself visible
(``armed``, ``_waiters``) and then evaluates its condition once more; the notifier first changes what the condition
reads and then looks for waiters. Whichever comes second sees the other, so no wake-up is lost. The order holds
because CPython executes these reads and writes as they are written.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import perf_counter, thread_time
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled, current_token

T = TypeVar("T")

BUSY_S = 0.005
"""Time for which a busy event loop may run before it pauses: the interpreter's switch interval."""
PAUSE_S = 0.00005
"""How long it pauses: long enough for a thread that waits for the GIL to wake up and take it."""


class LoopThread:
    """The event loop of the thread that creates this object. Other threads send it functions."""

    def __init__(self) -> None:
        native: Any = current_token().native_token  # asyncio's loop or trio's token: no common type
        self._ident = threading.get_ident()
        self._submit: Callable[[Callable[[], object]], object] = (
            native.run_sync_soon if hasattr(native, "run_sync_soon") else native.call_soon_threadsafe
        )
        self._looked_s = self._cpu_s = 0.0

    @property
    def here(self) -> bool:
        """Whether the caller is on the event loop's thread."""
        return threading.get_ident() == self._ident

    def run_soon(self, function: Callable[[], object]) -> bool:
        """Runs ``function`` on the event loop: now if called there, else soon. Returns False if the loop has ended.

        Any thread; never blocks.
        """
        if self.here:
            function()
            return True
        return self.run_later(function)

    def run_later(self, function: Callable[[], object]) -> bool:
        """Like ``run_soon``, but never runs it at once: also for signal handlers, which interrupt the event loop."""
        try:
            self._submit(function)
        except RuntimeError:  # the loop is closed; trio's RunFinishedError is a RuntimeError too
            return False
        return True

    def pause_if_busy(self) -> None:
        """Lets other threads have the GIL, once every 5 ms, if this event loop was busy. On its thread.

        A busy loop asks the system for news between any two tasks. It gives up the GIL for that, and has it back before
        a waiting thread is awake, but that thread starts its 5 ms again: it waited 24 ms in the median and 139 ms
        at most for the GIL (2 cores, Python 3.13), and with a pause of 50 us 3 and 10 ms.
        """
        now_s = perf_counter()
        if now_s - self._looked_s < BUSY_S:
            return
        cpu_s = thread_time()
        busy = cpu_s - self._cpu_s > (now_s - self._looked_s) / 2
        self._looked_s, self._cpu_s = now_s, cpu_s
        if busy:
            select.select([], [], [], PAUSE_S)  # time.sleep is what detectors of blocked event loops look for


class Wakeup:
    """Wakes one sleeping task from any thread. A busy task costs its producers one attribute read."""

    __slots__ = ("_event", "_loop", "armed")

    def __init__(self, loop: LoopThread) -> None:
        self._loop = loop
        self._event = anyio.Event()
        self.armed = False
        """Whether the task sleeps, or is about to. Producers read it before they call ``wake``."""

    async def sleep_until(self, ready: Callable[[], object]) -> None:
        """Sleeps until woken with ``ready()`` true; returns immediately if it is. One task at a time.

        A producer may read ``armed`` and then be suspended, and wake a later sleep for something consumed long ago.
        Such a wake-up finds ``ready()`` false and the task sleeps on. Each wake-up looks for a cancellation: on asyncio
        none is delivered to a task whose next wake-up has always come already.
        """
        try:
            while True:
                self._event = anyio.Event()
                self.armed = True
                if ready():
                    return
                await self._event.wait()
                await checkpoint_if_cancelled()
        finally:
            self.armed = False

    async def let_others_run(self) -> None:
        """Gives a turn to the other tasks, and now and then to other threads. For a task that is not asleep."""
        self._loop.pause_if_busy()
        await checkpoint()

    def wake(self) -> None:
        """Wakes the task if it sleeps. Any thread; never blocks."""
        if self.armed:
            self.armed = False
            self._loop.run_soon(self._event.set)


class CrossLoopCondition:
    """Condition variable for tasks on any event loops and for threads, notified from any thread.

    Attributes:
        listener: called by every ``notify_all``, on the thread that notifies. Must not block.
    """

    def __init__(self) -> None:
        self.listener: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], object]] = []

    async def wait_until(self, ready: Callable[[], object]) -> None:
        """Waits until ``ready()`` is true. It is evaluated on the caller's event loop, after each notification.

        Each of them looks for a cancellation, as in ``Wakeup.sleep_until``.
        """
        while not ready():
            loop, event = LoopThread(), anyio.Event()
            with self._waiter(lambda loop=loop, event=event: loop.run_soon(event.set)):
                if ready():
                    return
                await event.wait()
            await checkpoint_if_cancelled()

    def block_until(self, ready: Callable[[], object], *, poll_s: float) -> None:
        """Like ``wait_until``, but blocks the calling thread, and evaluates ``ready()`` every ``poll_s`` seconds."""
        while not ready():
            event = threading.Event()
            with self._waiter(event.set):
                if ready():
                    return
                event.wait(poll_s)

    @contextmanager
    def _waiter(self, wake: Callable[[], object]) -> Generator[None]:
        with self._lock:
            self._waiters.append(wake)
        try:
            yield
        finally:
            with self._lock:
                if wake in self._waiters:
                    self._waiters.remove(wake)

    def notify_all(self) -> None:
        """Lets all waiters evaluate their condition. Any thread; never blocks. Without waiters: two attribute reads."""
        if self.listener is not None:
            self.listener()
        if not self._waiters:
            return
        with self._lock:  # taking them out wakes each once, however often it is notified before it runs
            woken, self._waiters = self._waiters, []
        for wake in woken:
            wake()


class CrossLoopFuture(Generic[T]):
    """One result or exception, set once by any thread and awaited by any number of tasks on any event loops."""

    def __init__(self) -> None:
        self._condition = CrossLoopCondition()
        self._result: T | None = None
        self._exception: Exception | None = None
        self.done = False

    def set_result(self, result: T) -> None:
        """Sets the result, unless the future is done. Any thread; never blocks."""
        self._finish(result, None)

    def set_exception(self, exception: Exception) -> None:
        """Makes every ``wait`` raise ``exception``, unless the future is done. Any thread; never blocks."""
        self._finish(None, exception)

    def _finish(self, result: T | None, exception: Exception | None) -> None:
        if not self.done:
            self._result, self._exception = result, exception
            self.done = True  # after both: a waiter reads them once it sees this
            self._condition.notify_all()

    async def wait(self) -> T:
        """Returns the result or raises the exception. Cancellation ends only this wait."""
        await self._condition.wait_until(lambda: self.done)
        if self._exception is not None:
            raise self._exception
        return self._result  # pyright: ignore[reportReturnType]  # done without an exception: it is a T
