"""The only crossing from threads to an event loop.

anyio has no public fire-and-forget wake: ``from_thread.run_sync`` blocks the caller (34-130 us) and a blocking
portal costs 90-500 us. So this file asks the running loop itself: ``call_soon_threadsafe`` on asyncio and uvloop,
``TrioToken.run_sync_soon`` on trio. Even that costs 6 us, hence the doorbell, which is rung only for a sleeper.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

T = TypeVar("T")


class LoopThread:
    """The event loop that runs on the thread that makes this object; other threads send it functions."""

    def __init__(self) -> None:
        native: Any = current_token().native_token  # asyncio's loop or trio's token: no common type
        self._ident = threading.get_ident()
        self._submit: Callable[[Callable[[], object]], object] = (
            native.run_sync_soon if hasattr(native, "run_sync_soon") else native.call_soon_threadsafe
        )

    @property
    def here(self) -> bool:
        """Whether the caller is on the event loop's thread."""
        return threading.get_ident() == self._ident

    def run_soon(self, function: Callable[[], object]) -> bool:
        """Run ``function`` on the event loop: now if called there, else soon. False if the loop has ended.

        Any thread; never blocks.
        """
        if self.here:
            function()
            return True
        try:
            self._submit(function)
        except RuntimeError:  # the loop is closed; trio's RunFinishedError is one too
            return False
        return True


class Wakeup:
    """One task sleeps on it, any thread rings it.

    The sleeper arms the bell, then looks once more at what it waits for; a ringer first changes that, then looks
    at ``armed``. Whichever comes second sees the other, so no ring is lost, and a busy consumer costs its
    producers one attribute read.
    """

    __slots__ = ("_event", "_loop", "armed")

    def __init__(self, loop: LoopThread) -> None:
        self._loop = loop
        self._event = anyio.Event()
        self.armed = False

    async def sleep_unless(self, awake: Callable[[], object]) -> None:
        """Sleep until rung with ``awake()`` true; return at once if it is. One task at a time.

        A ringer that was slow between its two looks may ring for what was taken long ago: such a ring is slept through.
        """
        try:
            while True:
                self._event = anyio.Event()
                self.armed = True
                if awake():
                    return
                await self._event.wait()
        finally:
            self.armed = False

    def ring(self) -> None:
        """Wake the sleeper, if there is one. Any thread; never blocks."""
        if self.armed:
            self.armed = False
            self._loop.run_soon(self._event.set)


class Signal:
    """Many tasks, on any event loops, wait for the next pulse; any thread gives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[LoopThread, anyio.Event]] = []

    async def wait_unless(self, ready: Callable[[], object]) -> None:
        """Wait for the next pulse; return at once if ``ready()`` is true after this task was enlisted."""
        entry = (LoopThread(), anyio.Event())
        with self._lock:
            self._waiting.append(entry)
        try:
            if not ready():
                await entry[1].wait()
        finally:
            with self._lock:
                if entry in self._waiting:
                    self._waiting.remove(entry)

    def pulse(self) -> None:
        """Wake everyone who waits now. Any thread; never blocks. Without waiters: one attribute read."""
        if not self._waiting:
            return
        with self._lock:
            woken, self._waiting = self._waiting, []
        for loop, event in woken:
            loop.run_soon(event.set)


class Answer(Generic[T]):
    """One value or error, given once by any thread, awaited by any task on any event loop."""

    def __init__(self) -> None:
        self._signal = Signal()
        self._value: T | None = None
        self._error: Exception | None = None
        self.given = False

    def give(self, value: T) -> None:
        """The first answer counts; later ones are ignored. Any thread; never blocks."""
        if not self.given:
            self._value = value
            self.given = True
            self._signal.pulse()

    def fail(self, error: Exception) -> None:
        """Like ``give``: every ``wait`` raises ``error``."""
        if not self.given:
            self._error = error
            self.given = True
            self._signal.pulse()

    async def wait(self) -> T:
        """The value; raises the error given instead. Cancellation ends only this waiting."""
        await self._signal.wait_unless(lambda: self.given)
        if self._error is not None:
            raise self._error
        return self._value  # pyright: ignore[reportReturnType]  # given, and no error: it is a T
