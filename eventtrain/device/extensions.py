"""Computations that ride inside the compiled step: what must see every step's weights.

An observer sees weights only where a snapshot was taken. What needs them after each and every step
(an average, a norm) is cheap on the device and impossible off it, so it is fused with the step.
"""

from __future__ import annotations

import abc
from collections.abc import Collection
from typing import Any, Literal, TypeAlias, get_args

import jax

from eventtrain.device.state import PyTree
from eventtrain.errors import ConfigurationError

__all__ = ["StepExtension", "Use", "checked_uses"]

Use: TypeAlias = Literal["eval", "predict", "final"]


class StepExtension(abc.ABC):
    """A pure update of a small state of its own, after every step, inside the compiled step.

    All methods are traced by JAX: no side effects, no Python branches on values. The extension's
    state is donated from step to step and is part of snapshots.

    Attributes:
        name: unique among the extensions of one trainer; the key of its state in a snapshot.
        use_for: where `weights` stand in for the params: "eval" (the evaluations of a run and
            `trainer.evaluate`), "predict" (`trainer.predict`), "final" (`FitResult.state`). Training
            itself never sees them. One extension at most for each use.
    """

    name: str
    use_for: frozenset[Use] = frozenset()

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The extension's state before the first step; any pytree of arrays."""

    @abc.abstractmethod
    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """The extension's state after a step: same structure, shapes and dtypes.

        `params` are those after the update; `step`, int32 of shape (), counts completed steps.
        """

    def weights(self, ext_state: PyTree, params: PyTree) -> PyTree:
        """What stands in for `params` where `use_for` says so; by default `params` themselves.

        Structure and shapes are those of `params`; floating-point leaves may be wider, and are cast.
        """
        return params


def checked_uses(subject: str, use_for: Any) -> frozenset[Use]:
    """`use_for` as a set.

    Args:
        subject: whose it is, for the message: "EMA(0.999)".

    Raises:
        ConfigurationError: it is no collection of "eval", "predict" and "final".
    """
    valid = get_args(Use)
    if isinstance(use_for, Collection) and not isinstance(use_for, str):
        given = list(use_for)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if all(isinstance(use, str) and use in valid for use in given):  # pyright: ignore[reportUnknownVariableType]
            return frozenset(given)
    raise ConfigurationError(
        f"{subject}: use_for={use_for!r} has to be a collection of any of {', '.join(map(repr, valid))}, for example "
        'use_for=["eval", "final"].'
    )
