"""Computations that ride inside the compiled step: what must see every step's weights.

An observer sees weights only where a snapshot was taken. What needs them after each and every step
(an average, a norm) is cheap on the device and impossible off it, so it is fused with the step.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.state import PyTree, is_array
from eventtrain.errors import ConfigurationError

__all__ = ["EMA", "StepExtension"]


class StepExtension(abc.ABC):
    """A pure update of a small state of its own, after every step, inside the compiled step.

    Both methods are traced by JAX: no side effects, no Python branches on values. The extension's
    state is donated from step to step and is part of snapshots and checkpoints.

    Attributes:
        name: unique among the extensions of one trainer; the key of its state in a snapshot.
    """

    name: str

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The extension's state before the first step; any pytree of arrays."""

    @abc.abstractmethod
    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """The extension's state after a step: same structure, shapes and dtypes.

        `params` are those after the update; `step`, int32 of shape (), counts completed steps.
        """


class EMA(StepExtension):
    """Exponential moving average of the weights: `average = decay * average + (1 - decay) * new`.

    Starts at the weights themselves, so that no bias correction is needed. Only floating-point
    leaves are averaged, in float32 at least: in bfloat16 an increment of 1 - 0.999 would be
    rounded away. Other leaves follow the newest value. The state has the structure of `params`.

    After Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), with
    exponential instead of uniform weights.

    Raises:
        ConfigurationError: `decay` does not lie strictly between 0 and 1.
    """

    def __init__(self, decay: float, *, name: str = "ema") -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigurationError(
                f"EMA(decay={decay!r}): 0 would keep no average and 1 would never move, so decay "
                "must lie strictly between them. 0.999 averages over about 1,000 steps."
            )
        self.decay = decay
        self.name = name

    def __repr__(self) -> str:
        return f"EMA({self.decay!r}, name={self.name!r})"

    def init(self, params: PyTree) -> PyTree:
        """The weights themselves, floating-point ones in float32 at least."""
        return jax.tree.map(_widened, params)

    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """The average including `params`, which are those after the update."""

        def average(old: Any, new: Any) -> Any:
            if not _is_floating(new):
                return new
            return self.decay * old + (1.0 - self.decay) * new.astype(old.dtype)

        return jax.tree.map(average, ext_state, params)


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _widened(leaf: Any) -> Any:
    if not _is_floating(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
