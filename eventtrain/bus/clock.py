"""Source of time for the bus. Tests replace it by ``eventtrain.testing.FakeClock``, so that they need not wait."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic

import anyio


class Clock:
    """The real time of the machine."""

    def now_s(self) -> float:
        """Returns a number of seconds that never goes back. Any thread."""
        return monotonic()

    async def sleep(self, duration_s: float) -> None:
        """Sleeps for ``duration_s`` seconds."""
        await anyio.sleep(duration_s)

    def timeout(self, duration_s: float | None) -> AbstractContextManager[anyio.CancelScope]:
        """Returns a scope that is cancelled after ``duration_s`` seconds (None: never) and raises nothing."""
        return anyio.move_on_after(duration_s)
