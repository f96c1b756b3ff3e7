"""Tells when the process is asked to end, so that event streams end then.

A server such as uvicorn waits for its open connections before it leaves the lifespan of the app, and a stream of
server-sent events stays open until the lifespan closes the bus: each would wait for the other. So a stream follows the
signals that the server follows.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STILL_ASKED_S = 5.0
"""How long after a signal new streams end at once: a client may reconnect before the server closes its sockets."""

_listeners: dict[Callable[[], object], None] = {}
_before: dict[int, Any] = {}
_asked_s = -math.inf


@contextmanager
def on_termination(listener: Callable[[], object]) -> Generator[None]:
    """Calls ``listener`` when SIGTERM or SIGINT arrives and the program handles it, for the length of the block.

    The program's own handler runs first. A signal without one ends the process, or raises KeyboardInterrupt, as ever.

    Args:
        listener: called in the signal handler: it must not wait, and take no lock. Only on the main thread, where
            Python runs signal handlers; elsewhere the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler not in (signal.default_int_handler, _handle):
            _before[number] = handler
            signal.signal(number, _handle)
    _listeners[listener] = None
    if monotonic() - _asked_s < STILL_ASKED_S:
        listener()
    try:
        yield
    finally:
        _listeners.pop(listener, None)
        if not _listeners:
            for number, handler in _before.items():
                if signal.getsignal(number) is _handle:  # else the program has set another one
                    signal.signal(number, handler)
            _before.clear()


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked_s
    _asked_s, listeners = monotonic(), list(_listeners)
    try:
        _before[number](number, frame)
    finally:
        for listener in listeners:
            listener()
