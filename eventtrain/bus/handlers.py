"""From what a user wrote (async or plain, with or without control) to one coroutine function ``event -> None``."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import thread_time
from typing import Any, Protocol

import anyio.to_thread
from anyio import CapacityLimiter

from eventtrain.bus.clock import Clock
from eventtrain.bus.handler_cost import HandlerCost
from eventtrain.bus.wakeup import Signal
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event

Handler = Callable[..., Any]
"""``(event)`` or ``(event, control)``; a coroutine function, or a plain one, which runs in a worker thread."""

Call = Callable[[Event], Awaitable[None]]
"""A handler made ready: one argument, awaitable."""


class HandlerTimeout(TimeoutError):
    """An attempt took longer than the subscription's ``timeout_s``."""


class Attempt(Protocol):
    """The control of one handler call: its commands are sent or dropped together."""

    @property
    def control(self) -> Any:  # eventtrain.Control lives on a floor above
        """What the handler gets."""
        ...

    def commit(self) -> None:
        """The handler succeeded: send its commands."""
        ...

    def discard(self) -> None:
        """The handler failed: drop its commands."""
        ...


def takes_control(handler: Handler) -> bool:
    """Whether ``handler`` takes ``(event, control)`` rather than ``(event)``.

    Raises:
        ConfigurationError: it can be called with neither.
    """
    name = describe(handler)
    if not callable(handler):
        raise ConfigurationError(
            f"Cannot subscribe {name}: a handler is a function of (event) or (event, control), "
            f"not {type(handler).__name__}."
        )
    try:
        signature = inspect.signature(handler)
    except (ValueError, TypeError):  # builtins without a signature: list.append and the like take the event
        return False
    positional = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(p.default is p.empty for p in positional)
    with_control = required == 2 or (required < 2 and any(p.name == "control" for p in positional))
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
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        getattr(handler, "__call__", None)  # noqa: B004
    )


def describe(handler: object) -> str:
    """A name for messages: ``module.function`` without the module's packages."""
    while isinstance(handler, partial):
        handler = handler.func
    return getattr(handler, "__qualname__", None) or type(handler).__qualname__


def in_thread(
    handler: Handler, limiter: Callable[[], CapacityLimiter], meter: HandlerCost, concurrency: int
) -> Callable[..., Awaitable[None]]:
    """Run a plain function in a worker thread of the bus' own limiter, its CPU time charged to ``meter``.

    On cancellation or a timeout the thread is abandoned, not awaited: a plain function cannot be stopped. The next
    event waits until it has returned, so that the function never runs more than ``concurrency`` times at once.
    """
    at_work: deque[None] = (
        deque()
    )  # one item per thread in the handler, abandoned ones too; atomic, unlike an int
    returned = Signal()

    def call(*args: Any) -> None:
        at_work.append(None)
        began = thread_time()
        try:
            handler(*args)
        finally:
            meter.charge_thread(thread_time() - began)
            at_work.pop()
            returned.pulse()

    async def run(*args: Any) -> None:
        while len(at_work) >= concurrency:
            await returned.wait_unless(lambda: len(at_work) < concurrency)
        await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=limiter())

    return run


def with_control(
    handler: Callable[[Event, Any], Awaitable[None]], open_attempt: Callable[[Event], Attempt]
) -> Call:
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


def with_timeout(call: Call, timeout_s: float, clock: Clock) -> Call:
    """Raise HandlerTimeout in an attempt that takes longer than ``timeout_s`` seconds."""

    async def limited(event: Event) -> None:
        with clock.timeout(timeout_s) as scope:
            await call(event)
        if scope.cancelled_caught:
            raise HandlerTimeout(f"the handler did not finish within timeout_s={timeout_s:g} s")

    return limited


def with_retries(
    call: Call,
    retries: int,
    first_delay_s: float,
    clock: Clock,
    failed: Callable[[Event, Exception, int], None],
    going_on: Callable[[], bool],
) -> Call:
    """Try up to ``retries`` times more, waiting ``first_delay_s`` and then twice as long each time.

    ``failed(event, error, attempt)`` hears of every attempt but the last, whose exception is raised. Once
    ``going_on()`` is false, the attempt that just failed is the last.
    """

    async def persistent(event: Event) -> None:
        delay_s = first_delay_s
        for attempt in range(1, retries + 1):
            try:
                await call(event)
                return
            except Exception as error:
                if not going_on():
                    raise
                failed(event, error, attempt)
            await clock.sleep(delay_s)
            delay_s *= 2
        await call(event)

    return persistent
