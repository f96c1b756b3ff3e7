"""Checks of what users give to subscribers' constructors; each error names the subscriber and the argument."""

from __future__ import annotations

import math
from typing import Any

from eventtrain.errors import ConfigurationError


def require_number(
    owner: str, name: str, value: Any, *, at_least: float = -math.inf, above: float = -math.inf
) -> None:
    """Raise ConfigurationError unless ``value`` is a finite number, not below ``at_least``, and above ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a finite number.")
    if value < at_least:
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a number of at least {at_least:g}.")
    if value <= above:
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a number above {above:g}.")


def require_count(owner: str, name: str, value: Any, *, at_least: int = 0) -> None:
    """Raise ConfigurationError unless ``value`` is a whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a whole number of at least {at_least}.")


def require_factor(owner: str, value: Any) -> None:
    """Raise ConfigurationError unless ``factor=value`` makes a hyperparameter smaller, and not 0."""
    require_number(owner, "factor", value)
    if not 0 < value < 1:
        raise ConfigurationError(
            f"{owner}(factor={value!r}): the hyperparameter is multiplied by it, so it has to lie between 0 and 1, "
            "both excluded."
        )


def require_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigurationError unless ``value`` is one of ``choices``."""
    if value not in choices:
        given = ", ".join(f'"{choice}"' for choice in choices)
        raise ConfigurationError(f"{owner}({name}={value!r}): is none of {given}.")
