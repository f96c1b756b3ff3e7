"""``checked``: compares the arguments of a call with the annotations of the function, and refuses others by name."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eventtrain.errors import ConfigurationError, EventTrainError, shortened

F = TypeVar("F", bound=Callable[..., Any])

LARGEST = 2**64
"""No count, step or seed is as large; beyond 1e308 an integer has no float."""


def checked(target: F) -> F:
    """Decorates a function, or a class whose constructor it then checks.

    Raises ConfigurationError in the call for an argument that its annotation excludes: the function itself checks
    ranges and combinations only. An annotation that cannot be evaluated at run time is not checked.
    """
    if isinstance(target, type):
        cls: Any = target
        cls.__init__ = _checked(cls.__init__, tuple(base.__module__ for base in cls.__mro__))
        return cls
    return _checked(target, (target.__module__,))


def _checked(function: Any, modules: tuple[str, ...]) -> Any:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # raises the same, with its own name
        hints = _hints(function, modules)
        for name, value in given.items():
            parameter = signature.parameters[name]
            values = {name: value}
            if parameter.kind is parameter.VAR_POSITIONAL:
                values = {f"*{name}": item for item in value}
            elif parameter.kind is parameter.VAR_KEYWORD:
                values = value
            for written, item in values.items():
                if name in hints and item is not parameter.default and not fits(item, hints[name]):
                    if function.__name__ == "__init__":
                        _prefer_own_error(function, args, kwargs)
                    raise _refusal(function, written, item, parameter.annotation)
        return function(*args, **kwargs)

    return call


def _prefer_own_error(constructor: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raises what the constructor itself says of the wrong argument, if it does so by name: it knows the remedy."""
    try:
        constructor(*args, **kwargs)
    except EventTrainError:
        raise
    except Exception:
        return  # the error that the annotation saves the user from


def shown(value: object, limit: int = 200) -> str:
    """Returns the repr of ``value`` for a message, cut after ``limit`` characters; its class if it has no repr."""
    try:
        return shortened(repr(value), limit)
    except Exception:
        return f"an object of class {type(value).__name__}"


def _refusal(
    function: Callable[..., Any], name: str, value: object, annotation: object
) -> ConfigurationError:
    owner = function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[2]
    expected = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", annotation)
    return ConfigurationError(
        f"{owner}({name}={shown(value, 60)}): {name} must be {expected}, got {type(value).__name__}."
    )


@functools.cache
def _hints(function: Callable[..., Any], modules: tuple[str, ...]) -> dict[str, Any]:
    """Returns parameter -> annotation, without those that do not exist at run time.

    ``modules``: where names are looked up; the fields of a dataclass may come from those of its bases.
    """
    hints: dict[str, Any] = {}
    names = {name: value for module in reversed(modules) for name, value in vars(sys.modules[module]).items()}
    for name, annotation in inspect.get_annotations(function).items():
        written = SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= get_type_hints(written, names, include_extras=True)
        except Exception:  # imported for type checkers only
            continue
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Returns whether ``value`` may be an argument annotated ``hint``. A type that is not known here allows all."""
    origin, args = get_origin(hint), get_args(hint)
    is_bool: bool = isinstance(value, bool)
    if origin is Annotated:
        return fits(value, args[0])
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, Integral) and not is_bool and abs(int(value)) < LARGEST
    if hint is float:
        return isinstance(value, Real) and not is_bool and _is_a_float(value)
    if origin is type and isinstance(value, types.UnionType):  # of event classes, as everywhere
        return all(fits(part, hint) for part in get_args(value))
    if origin is type:
        return isinstance(value, type) and all(_fits_class(value, arg) for arg in args)
    if origin is not None and isinstance(origin, type):
        return _fits_container(value, origin, args)
    if isinstance(hint, type) and hint is not object:
        return isinstance(value, hint) if not getattr(hint, "_is_protocol", False) else True
    return True


def _is_a_float(value: Any) -> bool:
    try:
        float(value)
    except (OverflowError, TypeError, ValueError):
        return False
    return True


def _fits_class(value: type, hint: Any) -> bool:
    return issubclass(value, hint) if isinstance(hint, type) else True


def _fits_container(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:
    if origin is Callable:
        return callable(value)
    if not isinstance(value, origin) or isinstance(value, (str, bytes)):  # text is a sequence, of letters
        return False
    if getattr(value, "shape", None) == ():  # a 0-d array has the methods of a sequence, and is none
        return False
    if isinstance(value, Mapping) and len(args) == 2:
        return all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
    if isinstance(value, tuple) and origin is tuple and args and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(fits, value, args))
    if isinstance(value, Collection) and args:
        return all(fits(item, args[0]) for item in value)  # pyright: ignore[reportUnknownVariableType]
    return True
