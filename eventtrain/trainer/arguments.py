"""Checks of the arguments of ``Trainer`` and of its runs. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eventtrain.errors import ConfigurationError
from eventtrain.loop.event_builder import Derivations
from eventtrain.validation.annotations import fits, shown
from eventtrain.validation.callables import require_plain


def checked_run_id(run_id: object) -> str:
    """Returns ``run_id`` if it can be the name of a folder: it becomes one, here and in remote stores."""
    if not isinstance(run_id, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", run_id):
        raise ConfigurationError(
            f"Trainer(run_id={run_id!r}): run_id must be at most 128 letters, digits and _ . -, and begin with a "
            "letter, a digit or _, since folders are named after it."
        )
    return run_id


def checked_derivations(derive: Mapping[str, Any]) -> Derivations:
    """Returns ``derive`` if it maps names to functions."""
    for name, function in derive.items():
        if not isinstance(name, str) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"Trainer(derive={{{name!r}: {function!r}}}): expected names of metrics, with functions of the means."
            )
        require_plain(f"derive[{name!r}]", function)
    return dict(derive)


def require_start(what: str, resume: object, hyperparams: object) -> None:
    """Raises ConfigurationError if ``what``, which is ``fit`` or ``session``, cannot begin like this."""
    if not fits(resume, bool | str | int | Path):
        raise ConfigurationError(
            f"{what}: resume must be a bool, a path, a tag or a step, got {shown(resume)}."
        )
    if not fits(hyperparams, Mapping[str, Any] | None):
        raise ConfigurationError(
            f"{what}: hyperparams must be a dict of name -> value, got {shown(hyperparams)}."
        )


def require_aim(epochs: object, steps: object) -> None:
    """Raises ConfigurationError unless exactly one of them is given, and is positive."""
    if (epochs is None) == (steps is None):
        raise ConfigurationError(
            f"fit requires exactly one of epochs and steps, got epochs={shown(epochs)} and steps={shown(steps)}."
        )
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63
        ):
            raise ConfigurationError(f"{name} must be an integer >= 1, got {shown(value)}.")
