"""Turns a user's handler (async or plain, with or without control) into one coroutine function ``event -> None``."""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from time import thread_time
from types import FunctionType, SimpleNamespace, UnionType
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import anyio.to_thread
from anyio import CapacityLimiter

from eventtrain.bus.cancellation import own_failure
from eventtrain.bus.clock import Clock
from eventtrain.bus.failures import HandlerTimeout
from eventtrain.bus.handler_cost import HandlerCost
from eventtrain.bus.wakeup import CrossLoopCondition
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.validation.callables import is_generator, settle

Handler = Callable[..., Any]
"""``(event)`` or ``(event, control)``; a coroutine function, or a plain one, which runs in a worker thread."""

Call = Callable[[Event], Awaitable[object]]
"""A handler ready to be called: one argument, awaitable. If it returns anything but None, see ``settle``."""

E = TypeVar("E", bound=Event)
ControlT = TypeVar("ControlT")
R = TypeVar("R")


class HandlerDecorator(Protocol[E, ControlT]):
    """Subscribes the decorated function to events of type ``E`` and returns it unchanged."""

    @overload
    def __call__(self, handler: Callable[[E], R], /) -> Callable[[E], R]: ...
    @overload
    def __call__(self, handler: Callable[[E, ControlT], R], /) -> Callable[[E, ControlT], R]: ...


class CommandTransaction(Protocol):
    """Control of one handler call. Its commands are sent together when the call succeeds, or dropped."""

    @property
    def control(self) -> Any:  # eventtrain.Control belongs to a package above
        """Second argument of the handler."""
        ...

    def commit(self) -> None:
        """Sends the commands: the handler has succeeded."""
        ...

    def discard(self) -> None:
        """Drops the commands: the handler has failed."""
        ...


def takes_control(handler: Handler) -> bool:
    """Returns whether ``handler`` takes ``(event, control)`` rather than ``(event)``.

    Raises:
        ConfigurationError: it can be called with neither, or it is a generator.
    """
    name = describe(handler)
    if not callable(handler):
        raise ConfigurationError(
            f"Cannot subscribe {name}: expected a function of (event) or (event, control), "
            f"got {type(handler).__name__}."
        )
    if is_generator(handler):
        raise ConfigurationError(
            f"Cannot subscribe {name}: it contains a yield, so calling it would run none of its code. Remove the "
            "yield, or use bus.stream(...) to iterate over events."
        )
    try:
        signature = inspect.signature(handler)
    except (ValueError, TypeError):  # builtins without a signature, such as list.append, take the event
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


def require_annotation(handler: Handler, types: tuple[type[Event], ...], name: str) -> None:
    """Raises ConfigurationError if the annotation of the handler's first parameter contradicts one of ``types``.

    It does if neither is a subclass of the other. An annotation that cannot be resolved, such as a name imported for
    type checkers only, is ignored.
    """
    try:
        parameter = next(iter(inspect.signature(handler).parameters.values()))
        written = SimpleNamespace(__annotations__={"event": parameter.annotation})
        annotation = get_type_hints(written, _globals_of(handler))["event"]
        annotated = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        contradicted = [t for t in types if not any(issubclass(t, a) or issubclass(a, t) for a in annotated)]
    except Exception:
        return  # no signature, a name that does not exist at run time, a type that is not a class
    if contradicted and Any not in annotated and parameter.annotation is not parameter.empty:
        wanted, found = (" | ".join(t.__name__ for t in classes) for classes in (types, annotated))
        raise ConfigurationError(
            f"Cannot subscribe {name} to {wanted}: its parameter {parameter.name!r} is annotated as {found}, which a "
            f"{contradicted[0].__name__} is not. Correct the event type or the annotation."
        )


def _globals_of(handler: Handler) -> dict[str, Any]:
    """Returns the names that are known where ``handler`` was written."""
    while isinstance(handler, partial):
        handler = handler.func
    function: Any = inspect.unwrap(handler)
    if not hasattr(function, "__globals__"):  # an object with __call__
        function = type(function).__call__
    return function.__globals__


def describe(handler: object) -> str:
    """Returns the handler's qualified name, for messages."""
    while isinstance(handler, partial):
        handler = handler.func
    return getattr(handler, "__qualname__", None) or type(handler).__qualname__


def notebook_cell() -> int | None:
    """Returns the number of the cell that IPython executes; None outside of a notebook or of IPython's shell."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "execution_count", None) if ipython is not None else None


def is_redefined(earlier: Handler | None, handler: Handler) -> bool:
    """Returns whether ``handler`` has the name of ``earlier``, both of them functions written in a cell.

    A method, a lambda, a function written in a function, and one named ``_`` have no name of their own.
    """
    if not (isinstance(earlier, FunctionType) and isinstance(handler, FunctionType)):
        return False
    name = handler.__qualname__
    return (
        earlier.__module__ == handler.__module__ == "__main__"
        and earlier.__qualname__ == name
        and name.isidentifier()
        and name != "_"
    )


def in_thread(
    handler: Handler, limiter: Callable[[], CapacityLimiter], cost: HandlerCost, concurrency: int
) -> Callable[..., Awaitable[object]]:
    """Runs a plain function in a worker thread of the bus' own limiter and adds its CPU time to ``cost``.

    After cancellation or a timeout the thread is abandoned, because a plain function cannot be stopped. The next event
    waits until it has returned, so that the function never runs more than ``concurrency`` times at once.
    """
    running: deque[None] = deque()  # one item per thread, abandoned ones included; atomic, unlike an int
    returned = CrossLoopCondition()

    def call(*args: Any) -> tuple[object]:  # trio lets no thread return a bare coroutine
        running.append(None)
        began = thread_time()
        try:
            return (handler(*args),)
        finally:
            cost.add_thread_time(thread_time() - began)
            running.pop()
            returned.notify_all()

    async def run(*args: Any) -> object:
        await returned.wait_until(lambda: len(running) < concurrency)
        (result,) = await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=limiter())
        return result

    return run


def settled(call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[None]]:
    """Settles what ``call`` returns within the attempt: its control, its timeout and its retries cover it."""

    async def settle_result(*args: Any) -> None:
        result = await call(*args)
        if result is not None:
            await settle(result)

    return settle_result


def with_control(
    handler: Callable[[Event, Any], Awaitable[object]], begin: Callable[[Event], CommandTransaction]
) -> Call:
    """Passes each call a control of its own; commits it if the handler succeeds, discards it otherwise."""

    async def call(event: Event) -> None:
        transaction = begin(event)
        try:
            await handler(event, transaction.control)
        except BaseException:
            transaction.discard()
            raise
        transaction.commit()

    return call


def with_timeout(call: Call, timeout_s: float, clock: Clock) -> Call:
    """Raises HandlerTimeout in an attempt that takes longer than ``timeout_s`` seconds."""

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
    *,
    clock: Clock,
    failed: Callable[[Event, Exception, int], None],
    active: Callable[[], bool],
) -> Call:
    """Repeats a failed call up to ``retries`` times, after ``first_delay_s`` and then twice as long each time.

    ``failed(event, error, attempt)`` is called for every attempt but the last, whose exception is raised. An attempt
    that fails while ``active()`` is false is the last.
    """

    async def retried(event: Event) -> None:
        delay_s = first_delay_s
        for attempt in range(1, retries + 1):
            try:
                await call(event)
                return
            except BaseException as raised:
                error = own_failure(raised)
                if not active():
                    raise error from error.__cause__
                failed(event, error, attempt)
            await clock.sleep(delay_s)
            delay_s *= 2
        await call(event)

    return retried
