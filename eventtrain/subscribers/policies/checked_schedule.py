"""``CheckedSchedule``: a schedule called on the host, whose values are numbers. Shared by those that follow one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import jax
import numpy as np

from eventtrain.errors import ConfigurationError, HyperparamError
from eventtrain.events.models import Number
from eventtrain.subscribers.policies.schedules import By


def takes_value(owner: str, schedule: Any, by: By) -> bool:
    """Whether ``schedule`` is to be called with the index and the value in effect, as Keras does where it can.

    Raises:
        ConfigurationError: it can be called neither so nor with the index alone.
    """
    if not callable(schedule):
        raise ConfigurationError(
            f"{owner}(schedule={schedule!r}): needs a function of the {by}, such as optax.cosine_decay_schedule(...)."
        )
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # written in C, without one
        return False
    if by == "epoch" and _accepts(signature, 2):
        return True
    if _accepts(signature, 1):
        return False
    wanted = (
        "schedule(step): later values are asked for ahead of the steps" if by == "step" else "schedule(epoch)"
    )
    raise ConfigurationError(
        f'{owner}(by="{by}") cannot call {getattr(schedule, "__name__", "schedule")}{signature}. Give a {wanted}'
        f"{' or schedule(epoch, value)' if by == 'epoch' else ''}."
    )


class CheckedSchedule:
    """Calls a schedule on the host, and makes sure that it gives a number.

    One that gives JAX arrays, as optax's do, is compiled for the CPU. Compiled it gives the bits that it gives inside
    a compiled optimiser on the CPU, which one operation after the other does not (XLA joins a multiplication and an
    addition: 525 of 1,000 values of a polynomial decay differed in the last bit). On another device, and for
    one-cycle schedules with ``steps_per_call`` above 1 or optax before 0.2.8, the last bit may differ. No accelerator
    is used: only the training thread may do that.

    Args:
        owner: the subscriber's name in messages.
        hyperparam: whose values these are.
        schedule: takes the index, and the value in effect where ``at`` is given one.

    Raises:
        ConfigurationError: JAX has no CPU backend here.
    """

    def __init__(self, owner: str, hyperparam: str, schedule: Callable[..., Any]) -> None:
        self._owner = owner
        self._hyperparam = hyperparam
        self._schedule = schedule
        self._compiled: Callable[[np.int32], jax.Array] | None = None
        self._called = False
        try:
            self._cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ConfigurationError(
                f"{owner} computes its schedule on the CPU, and JAX has none here ({error}). Name it too, as in "
                'JAX_PLATFORMS="cuda,cpu".'
            ) from error

    async def at(self, index: int, *current: Number) -> Number:
        """The value for epoch or step ``index``; the first call, which may compile, runs in a worker thread.

        Raises:
            HyperparamError: the schedule raised, or gave something else than one finite number.
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
                number = _number(result)
                if first and isinstance(result, jax.Array) and not current:
                    number = self._compile(index, number)
        except Exception as error:
            raise HyperparamError(
                f"{self._call(index, current)} raised {type(error).__name__}: {error}. {self._consequence}"
            ) from error
        if number is None:
            raise HyperparamError(
                f"{self._call(index, current)} gave {result!r}, which is not one finite number. {self._consequence}"
            )
        return number

    def _compile(self, index: int, uncompiled: Number | None) -> Number | None:
        schedule = self._schedule
        compiled = jax.jit(lambda count: schedule(count))  # a function of our own: an object may have no hash
        try:
            number = _number(compiled(np.int32(index)))
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            return uncompiled  # it decides by the number itself, in Python
        self._compiled = compiled
        return uncompiled if number is None else number

    def _call(self, index: int, current: tuple[Number, ...]) -> str:
        return f"{self._owner}: schedule({', '.join(map(repr, (index, *current)))})"

    @property
    def _consequence(self) -> str:
        return f"{self._hyperparam!r} stays as it is; the run ends, rather than go on with a wrong value."


def _number(result: Any) -> Number | None:
    """A Python number out of a Python, NumPy or JAX one; None where it is none, or not finite."""
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
