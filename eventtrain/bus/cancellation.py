"""Decides whether an exception in a task of the bus is a failure of the handler, the end of the task, or neither."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


class HandlerExit(RuntimeError):
    """A handler raised something that would end a thread or an event loop, such as SystemExit. It is the cause."""


def being_cancelled() -> bool:
    """Returns whether a cancel scope around the calling task is cancelled and not shielded."""
    return anyio.current_effective_deadline() == -math.inf


async def persist(work: Callable[[], Awaitable[T]]) -> T:
    """Awaits ``work()``, and again whenever something other than a cancel scope has cancelled it.

    ``asyncio.run`` cancels every task that is left at its end, which a shielded scope does not keep off. A run still
    has to settle then: its tasks continue until their scope ends them. ``work`` must be able to
    begin again at any await.
    """
    while True:
        try:
            return await work()
        except anyio.get_cancelled_exc_class():
            if being_cancelled():
                raise


def failure_of(error: BaseException) -> Exception:
    """Returns what a handler raised as an Exception, so that it ends neither a thread nor the event loop."""
    if isinstance(error, Exception):
        return error
    text = str(error)
    failure = HandlerExit(f"the handler raised {type(error).__name__}{f': {text}' if text else ''}")
    failure.__cause__ = error
    return failure


def own_failure(error: BaseException) -> Exception:
    """Returns the failure of a handler, whatever it raised. Raises ``error`` again if it ends the task itself."""
    if isinstance(error, Exception):
        return error
    cancelled = anyio.get_cancelled_exc_class()
    if isinstance(error, GeneratorExit):  # the coroutine is being closed
        raise error
    if isinstance(error, cancelled):
        if being_cancelled():
            raise error
        # Raised again, it would end the worker silently.
        failure = RuntimeError("the handler awaited something that was cancelled")
        failure.__cause__ = error
        return failure
    if isinstance(error, BaseExceptionGroup) and error.split(cancelled)[1] is None and being_cancelled():
        raise error
    return failure_of(error)
