"""From what a user wrote (async or plain, with or without control) to one coroutine function ``event -> None``."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from time import thread_time
from typing import Any, Protocol

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from eventtrain.bus.meter import Meter
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event

Handler = Callable[..., Any]
"""``(event)`` or ``(event, control)``; a coroutine function, or a plain one, which runs in a worker thread."""

Call = Callable[[Event], Awaitable[None]]
"""A handler made ready: one argument, awaitable."""


class Attempt(Protocol):
    """The control of one handler call: its commands are sent or dropped together."""

    @property
    def control(self) -> Any: ...  # eventtrain.Control lives on a floor above

    def commit(self) -> None: ...

    def discard(self) -> None: ...


def takes_control(handler: Handler) -> bool:
    """Whether ``handler`` takes ``(event, control)`` rather than ``(event)``.

    Raises:
        ConfigurationError: it can be called with neither.
    """
    name = describe(handler)
    if not callable(handler):
        raise ConfigurationError(
            f"Cannot subscribe {name}: a handler is a function of (event) or (event, control), not {type(handler).__name__}."
        )
    try:
        signature = inspect.signature(handler)
    except (ValueError, TypeError):  # builtins without a signature: list.append and the like take the event
        return False
    required = [
        p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    with_control = len(required) == 2 or (len(required) < 2 and "control" in signature.parameters)
    try:
        signature.bind(*([None] * (2 if with_control else 1)))
    except TypeError as error:
        raise ConfigurationError(
            f"Cannot subscribe {name}{signature}: a handler is called with (event) or (event, control), "
            f"and this one cannot be ({error}). Give further parameters a default."
        ) from None
    return with_control


def is_async(handler: Handler) -> bool:
    """Whether calling ``handler`` gives a coroutine (functions, partials, objects with an async ``__call__``)."""
    while isinstance(handler, partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def describe(handler: object) -> str:
    """A name for messages: ``module.function`` without the module's packages."""
    while isinstance(handler, partial):
        handler = handler.func
    return getattr(handler, "__qualname__", None) or type(handler).__qualname__


def in_thread(handler: Handler, limiter: CapacityLimiter, meter: Meter) -> Callable[..., Awaitable[None]]:
    """Run a plain function in a worker thread of the bus' own limiter, its CPU time charged to ``meter``.

    On cancellation the thread is abandoned, not awaited: a plain function cannot be stopped.
    """

    def call(*args: Any) -> None:
        began = thread_time()
        try:
            handler(*args)
        finally:
            meter.charge_thread(thread_time() - began)

    async def run(*args: Any) -> None:
        await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=limiter)

    return run


def with_control(handler: Callable[[Event, Any], Awaitable[None]], open_attempt: Callable[[Event], Attempt]) -> Call:
    """Give the handler the control of this very attempt; commit it on success, discard it on anything else."""

    async def call(event: Event) -> None:
        attempt = open_attempt(event)
        try:
            await handler(event, attempt.control)
        except BaseException:
            attempt.discard()
            raise
        attempt.commit()

    return call


def with_timeout(call: Call, timeout_s: float) -> Call:
    """Raise TimeoutError in an attempt that takes longer than ``timeout_s`` seconds."""

    async def limited(event: Event) -> None:
        try:
            with anyio.fail_after(timeout_s):
                await call(event)
        except TimeoutError as error:
            if str(error):  # the handler's own
                raise
            raise TimeoutError(f"the handler did not finish within timeout_s={timeout_s:g} s") from None

    return limited


def with_retries(call: Call, retries: int, first_delay_s: float, failed: Callable[[Event, Exception, int], None]) -> Call:
    """Try up to ``retries`` times more, waiting ``first_delay_s`` and then twice as long each time.

    ``failed(event, error, attempt)`` hears of every attempt but the last, whose exception is raised.
    """

    async def persistent(event: Event) -> None:
        delay_s = first_delay_s
        for attempt in range(1, retries + 1):
            try:
                await call(event)
                return
            except Exception as error:
                failed(event, error, attempt)
            await anyio.sleep(delay_s)
            delay_s *= 2
        await call(event)

    return persistent
