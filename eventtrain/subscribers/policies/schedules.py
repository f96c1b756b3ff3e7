"""Schedules: hyperparameters as functions of the epoch or the step, named in a config file and called on the host."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import anyio.to_thread
import jax
import numpy as np
import optax
from pydantic import BeforeValidator

from eventtrain.errors import ConfigurationError, HyperparamError, did_you_mean
from eventtrain.events.models import Number
from eventtrain.validation.callables import require_plain, require_result

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
    """Returns the schedule that a table of a config file describes; anything but a table is returned unchanged.

    The table has the ``name`` of a schedule of optax, one of ``NAMES``, and its arguments::

        schedule = { name = "cosine_decay_schedule", init_value = 0.1, decay_steps = 1000 }

    ``schedules`` of ``join_schedules`` is a list of such tables; the keys of ``boundaries_and_scales``, which are text
    in TOML, become integers. The schedule is traced once, so that an argument of the wrong type is found here.

    Raises:
        ConfigurationError: an unknown name, or invalid arguments; the message names valid ones.
    """
    if not isinstance(given, Mapping):
        return given
    arguments: dict[str, Any] = dict(given)  # pyright: ignore[reportUnknownArgumentType]
    name = arguments.pop("name", None)
    if name not in NAMES:
        hint = did_you_mean(str(name), NAMES, f"Those that a config file can name: {', '.join(NAMES)}.")
        raise ConfigurationError(
            f"schedule: name={name!r} is not a schedule that a config file can name. {hint}"
        )
    factory: Callable[..., Any] = getattr(optax, name)
    parameters = inspect.signature(factory).parameters
    takes = f"It takes: {', '.join(parameters)}."
    for key in arguments:
        if key not in parameters:
            raise ConfigurationError(
                f"schedule {name}: unknown argument {key!r}. {did_you_mean(key, parameters, takes)}"
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise ConfigurationError(f"schedule {name}: missing arguments: {', '.join(missing)}. {takes}")
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


def takes_value(owner: str, schedule: Any, by: By) -> bool:
    """Returns whether to call ``schedule`` with the index and the value in effect, as Keras does if possible.

    Raises:
        ConfigurationError: it can be called neither with both nor with the index alone.
    """
    if not callable(schedule):
        raise ConfigurationError(
            f"{owner}(schedule={schedule!r}): schedule must be a function of the {by}, such as "
            "optax.cosine_decay_schedule(...)."
        )
    require_plain(f"{owner}: schedule", schedule)
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # a function in C without one
        return False
    if by == "epoch" and _accepts(signature, 2):
        return True
    if _accepts(signature, 1):
        return False
    wanted = (
        "schedule(epoch) or schedule(epoch, value)"
        if by == "epoch"
        else "schedule(step): values are computed ahead of the steps"
    )
    raise ConfigurationError(
        f'{owner}(by="{by}") cannot call {getattr(schedule, "__name__", "schedule")}{signature}. Give a {wanted}.'
    )


class CheckedSchedule:
    """Calls a schedule on the host, and checks that it returns a number.

    A schedule that returns JAX arrays, as optax's do, is compiled for the CPU. Compiled it returns the bits that it
    returns inside a compiled optimiser on the CPU, which one operation after the other does not (XLA fuses a
    multiplication and an addition: 525 of 1,000 values of a polynomial decay differed in the last bit). On another
    device, and for one-cycle schedules with ``steps_per_call`` above 1 or optax before 0.2.8, the last bit may differ.
    No accelerator is used: only the training thread may do that.

    Raises ConfigurationError if JAX has no CPU backend here.
    """

    def __init__(self, owner: str, hyperparam: str, schedule: Callable[..., Any]) -> None:
        self._owner, self._hyperparam, self._schedule = owner, hyperparam, schedule
        self._compiled: Callable[[np.int32], jax.Array] | None = None
        self._called = False
        try:
            self._cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ConfigurationError(
                f"{owner} computes its schedule on the CPU, and JAX has no CPU backend here ({error}). Enable it, as "
                'in JAX_PLATFORMS="cuda,cpu".'
            ) from error

    async def at(self, index: int, *current: Number) -> Number:
        """Returns the value for epoch or step ``index``; the first call, which may compile, runs in a worker thread.

        Raises:
            HyperparamError: the schedule raised, or returned anything but one finite number.
        """
        if self._called:
            return self._evaluate(index, current)
        self._called = True
        limiter = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(self._evaluate, index, current, True, limiter=limiter)

    def _evaluate(self, index: int, current: tuple[Number, ...], first: bool = False) -> Number:
        try:
            with jax.default_device(self._cpu):
                if self._compiled is not None:
                    number = _number(self._compiled(np.int32(index)))
                    if number is not None:
                        return number
                    # optax's polynomials with a fractional power are NaN at their end once compiled, since
                    # 1 - step / steps may come out as -1e-9 there; one operation after the other they are 0.
                result = self._schedule(index, *current)
                require_result("it", result)
                number = _number(result)
                if first and isinstance(result, jax.Array) and not current:
                    number = self._compile(index, number)
        except Exception as error:
            raise self._failure(index, current, f"raised {type(error).__name__}: {error}") from error
        if number is None:
            raise self._failure(index, current, f"returned {result!r}, which is not one finite number")
        return number

    def _compile(self, index: int, uncompiled: Number | None) -> Number | None:
        schedule = self._schedule
        compiled = jax.jit(lambda count: schedule(count))  # schedule itself may not be hashable
        try:
            number = _number(compiled(np.int32(index)))
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            return uncompiled  # it branches on the number itself, in Python
        self._compiled = compiled
        return uncompiled if number is None else number

    def _failure(self, index: int, current: tuple[Number, ...], problem: str) -> HyperparamError:
        return HyperparamError(
            f"{self._owner}: schedule({', '.join(map(repr, (index, *current)))}) {problem}. {self._hyperparam!r} keeps "
            "its value, and the run ends instead of continuing with a wrong one."
        )


def _number(result: Any) -> Number | None:
    """Returns a Python number from a Python, NumPy or JAX one; None if it is not a finite number."""
    item = np.asarray(result).item() if getattr(result, "shape", None) == () else result
    if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
        return None
    return item


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
