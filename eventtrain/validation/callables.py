"""Functions that users pass: which kind they are, and whether what they returned is a result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from eventtrain.errors import ConfigurationError


def is_async(function: Callable[..., Any]) -> bool:
    """Returns whether calling ``function`` gives a coroutine, as far as can be seen without calling it.

    Functions, partials, objects with an async ``__call__``. A decorator may hide it, even with ``functools.wraps``.
    """
    return any(map(inspect.iscoroutinefunction, _called(function)))


def is_generator(function: Callable[..., Any]) -> bool:
    """Returns whether calling ``function`` gives a generator or an async generator, which runs none of its code."""
    return any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in _called(function))


def require_plain(subject: str, function: Callable[..., Any]) -> None:
    """Raises ConfigurationError if ``function`` is async or a generator: ``subject`` is called and its result used."""
    if is_async(function) or is_generator(function):
        kind = "an async function" if is_async(function) else "a generator"
        raise ConfigurationError(
            f"{subject} must be a plain function: its result is used at once, and {kind} does not give one. Remove "
            "async and yield from it."
        )


def require_result(subject: str, result: object) -> None:
    """Raises ConfigurationError if ``result``, which ``subject`` returned, has not been computed yet.

    That is a coroutine, another awaitable, or a generator. A coroutine is closed, so that Python does not warn that it
    was never awaited.
    """
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ConfigurationError(
            f"{subject} returned {_named(result)}, and its result is used at once. Return a value, without async and "
            "yield."
        )


async def settle(result: object) -> None:
    """Awaits what a handler returned if that is awaitable, as is the coroutine of an async function in a decorator.

    Raises:
        ConfigurationError: it is a generator, so that none of the handler's code has run.
    """
    while inspect.isawaitable(result):
        result = await result
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise ConfigurationError(
            f"The handler returned {_named(result)}, so none of its code ran. Remove yield from it."
        )


def _named(result: object) -> str:
    name = getattr(result, "__qualname__", None)
    kind = "an " if type(result).__name__[0] in "aeiou" else "a "
    return f"{kind}{type(result).__name__.replace('_', ' ')}" + (f" of {name}" if name else "")


def _called(function: Callable[..., Any]) -> list[Any]:
    """Returns what a call of ``function`` may execute: the function inside of partials, and its ``__call__``."""
    while isinstance(function, partial):
        function = function.func
    candidates = (function, getattr(function, "__call__", None))  # noqa: B004
    # A mock of a function has all of its attributes, and inspect takes it for a function of every kind.
    return [f for f in candidates if isinstance(getattr(getattr(f, "__code__", None), "co_flags", 0), int)]
