"""Checks of the arguments of subscribers' constructors. Each error names the subscriber, the argument and its value."""

from __future__ import annotations

import math
from typing import Any

from eventtrain.errors import ConfigurationError


def require_number(
    owner: str,
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Raises ConfigurationError unless ``value`` is a finite number within the bounds, or None where ``optional``."""
    bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    if value is None and optional:
        return
    if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
        too_small = (at_least is not None and value < at_least) or (above is not None and value <= above)
        too_large = (at_most is not None and value > at_most) or (below is not None and value >= below)
        if not too_small and not too_large:
            return
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    raise _refusal(owner, name, value, f"a finite number {limits}".rstrip(), optional)


def require_count(owner: str, name: str, value: Any, *, at_least: int = 0, optional: bool = False) -> None:
    """Raises ConfigurationError unless ``value`` is an integer >= ``at_least``, or None where ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise _refusal(owner, name, value, f"an integer >= {at_least}", optional)


def require_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ConfigurationError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise _refusal(owner, name, value, "one of " + ", ".join(f'"{choice}"' for choice in choices), False)


def _refusal(owner: str, name: str, value: Any, expected: str, optional: bool) -> ConfigurationError:
    or_none = " or None" if optional else ""
    return ConfigurationError(
        f"{owner}({name}={value!r}): {name} must be {expected}{or_none}, got {value!r}."
    )
