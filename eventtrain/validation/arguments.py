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
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> None:
    """Raises ConfigurationError unless ``value`` is a finite number within the bounds, or None where ``optional``."""
    if value is None and optional:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not (at_least <= value <= at_most and above < value < below)
    ):
        bounds = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))
        raise _refusal(owner, name, value, f"a finite number {limits}".rstrip(), optional)


def require_count(owner: str, name: str, value: Any, *, at_least: int = 0, optional: bool = False) -> None:
    """Raises ConfigurationError unless ``value`` is an integer >= ``at_least``, or None where ``optional``.

    It must also be below 2**63, as a size of anything in memory.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
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
