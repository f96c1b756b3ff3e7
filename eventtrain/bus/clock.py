"""Where the bus takes its time from, so that tests of timing need not wait (``eventtrain.testing.FakeClock``)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic

import anyio


class Clock:
    """The real time of the machine."""

    def now_s(self) -> float:
        """Seconds since some moment; never goes back. Any thread."""
        return monotonic()

    async def sleep(self, duration_s: float) -> None:
        """Wait so many seconds."""
        await anyio.sleep(duration_s)

    def timeout(self, duration_s: float | None) -> AbstractContextManager[anyio.CancelScope]:
        """A scope that is cancelled after so many seconds (None: never) and leaves quietly."""
        return anyio.move_on_after(duration_s)
