"""``Schedule``: what the epoch or the step makes of a hyperparameter, and how a file names one. Shared; pure."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
from pydantic import BeforeValidator

from eventtrain.errors import ConfigurationError

By = Literal["epoch", "step"]

NAMES = (
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
)
"""The schedules of optax that a config file may name; nothing else is ever looked up."""


def build_schedule(given: Any) -> Any:
    """A schedule from the table of a config file; what is no table comes back as it is.

    The table holds the ``name`` of a schedule of optax, one of ``NAMES``, and its arguments::

        schedule = { name = "cosine_decay_schedule", init_value = 0.1, decay_steps = 1000 }

    ``schedules`` of ``join_schedules`` is a list of such tables; keys of ``boundaries_and_scales``, which TOML keeps as
    text, become whole numbers. The schedule is traced once, so that an argument of the wrong type is found here.

    Raises:
        ConfigurationError: an unknown name, or arguments that do not fit; the message lists those that do.
    """
    if not isinstance(given, Mapping):
        return given
    arguments: dict[str, Any] = dict(given)  # pyright: ignore[reportUnknownArgumentType]
    name = arguments.pop("name", None)
    if name not in NAMES:
        raise ConfigurationError(
            f"schedule: name={name!r} is no schedule that can be named in a file.{_nearest(name, NAMES)} "
            f"Those that can: {', '.join(NAMES)}."
        )
    factory: Callable[..., Any] = getattr(optax, name)
    parameters = inspect.signature(factory).parameters
    for key in arguments:
        if key not in parameters:
            raise ConfigurationError(
                f"schedule {name}: unknown argument {key!r}.{_nearest(key, parameters)} It takes: "
                f"{', '.join(parameters)}."
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ConfigurationError(
            f"schedule {name}: lacks {', '.join(missing)}. It takes: {', '.join(parameters)}."
        )
    try:
        if isinstance(arguments.get("boundaries_and_scales"), Mapping):
            scales = arguments["boundaries_and_scales"]
            arguments["boundaries_and_scales"] = {int(key): value for key, value in scales.items()}
        if "schedules" in arguments:
            arguments["schedules"] = [build_schedule(part) for part in arguments["schedules"]]
        schedule = factory(**arguments)
        jax.eval_shape(schedule, jax.ShapeDtypeStruct((), np.int32))
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"schedule {name}: optax cannot build it from {arguments!r}: {type(error).__name__}: {error}"
        ) from error
    return schedule


Schedule = Annotated[Callable[..., Any], BeforeValidator(build_schedule)]
"""A function of the epoch or the step (and, by epoch, of the value in effect); in a config file a table."""


def _nearest(given: Any, known: Any) -> str:
    nearest = difflib.get_close_matches(str(given), known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
