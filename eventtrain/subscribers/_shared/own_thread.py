"""``in_own_thread``: a call that may hang, waited for on the event loop, and left behind where nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


async def in_own_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns, of a thread that waits for no other; cancelled, it is left to finish there."""
    # A limiter of its own: anyio's would have it wait for forty blocked handlers of a service, and one that several
    # calls share is kept under trio by a call that was left behind.
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
