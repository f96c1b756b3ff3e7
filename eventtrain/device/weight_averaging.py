"""Averages of the weights inside the compiled step: exponential (`EMA`) and uniform (`SWA`).

Only floating-point leaves are averaged, in float32 at least: in bfloat16 an increment of 1 - 0.999 would be rounded
away. Other leaves follow the newest value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eventtrain.device.extensions import StepExtension, Use, checked_uses, if_due
from eventtrain.device.state import PyTree, is_array, partition
from eventtrain.errors import ConfigurationError
from eventtrain.validation.annotations import checked


class EMA(StepExtension):
    """Exponential moving average of the weights: `average = decay * average + (1 - decay) * new`.

    Starts at the weights themselves, so that no bias correction is needed. Exact to the last digit of float32 (float64
    for float64 weights) for every decay and any number of steps: the rounding error of one step is added in the next
    (Kahan, "Further remarks on reducing truncation errors", 1965).

    The state has the structure of `params`; its leaves are complex64 (complex128 for float64): the real part is the
    average, the imaginary part its rounding error. Read it through `weights`. It takes 8 bytes for each float32 or
    narrower weight.

    After Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), with exponential instead
    of uniform weights.

    Args:
        decay: 0.999 averages over about 1,000 steps.
        name: unique among the extensions of one trainer.
        use_for: any of "eval", "predict", "final": where the average replaces the params.

    Raises:
        ConfigurationError: `decay` is not strictly between 0 and 1, or an unknown use.
    """

    @checked
    def __init__(self, decay: float, *, name: str = "ema", use_for: Collection[Use] = ()) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigurationError(
                f"EMA: decay must be strictly between 0 and 1, got {decay!r}: at 0 there is no average, at 1 it never "
                "moves. 0.999 averages over about 1,000 steps."
            )
        self.decay = decay
        self.name = name
        self.use_for = checked_uses(repr(self), use_for)

    def __repr__(self) -> str:
        return f"EMA({self.decay!r}, name={self.name!r})"

    def init(self, params: PyTree) -> PyTree:
        """Returns the weights themselves, with a rounding error of zero."""
        return _on_floats(lambda leaf: lax.complex(_widened(leaf), jnp.zeros_like(_widened(leaf))), params)

    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """Returns the average including `params`, which are those after the update."""

        # One complex array is overwritten in one pass. Two real ones, each of which needs the other's
        # old value, cost a copy: 26 us instead of 10 for 33,000 weights on a CPU.
        def average(new: jax.Array, old: jax.Array) -> jax.Array:
            change = (1.0 - self.decay) * (_widened(new) - old.real) - old.imag
            moved = old.real + change
            return lax.complex(moved, (moved - old.real) - change)

        return _on_floats(average, params, ext_state)

    def weights(self, ext_state: PyTree, params: PyTree) -> PyTree:
        """Returns the average, in float32 at least."""
        return _on_floats(lambda _, average: average.real, params, ext_state)


class SWA(StepExtension):
    """Stochastic weight averaging: the uniform mean of the weights after steps start, start + every, ...

    Before the first of these its weights are the params themselves. The state is `{"count": int32[], "average": tree
    like params}`. Statistics that a model has beside its params, such as those of batch normalisation, are
    averaged only if `Trainer(params=...)` selects them. Otherwise they belong to the newest weights, and need a pass
    over the training data with the average, which is more exact.

    After Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018), arXiv:1803.05407.

    Args:
        start: the first step whose weights count, of the trainer's life.
        every: steps from one of them to the next; the paper takes the end of each epoch or cycle.
        name, use_for: as in `EMA`.

    Raises:
        ConfigurationError: `start` or `every` is not an integer >= 1, or an unknown use.
    """

    @checked
    def __init__(
        self, start: int, every: int = 1, *, name: str = "swa", use_for: Collection[Use] = ()
    ) -> None:
        for argument, value in (("start", start), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(f"SWA: {argument} must be an integer >= 1, got {value!r}.")
        self.start = start
        self.every = every
        self.name = name
        self.use_for = checked_uses(repr(self), use_for)

    def __repr__(self) -> str:
        return f"SWA({self.start!r}, {self.every!r}, name={self.name!r})"

    def init(self, params: PyTree) -> PyTree:
        """Returns a count of zero, and the weights in place of the average."""
        return {"count": jnp.int32(0), "average": _on_floats(_widened, params)}

    def is_due(self, step: int) -> bool:
        """Whether the weights after this step count."""
        return self._counts(step)

    def _counts(self, step: Any) -> Any:
        """Of a number on the host, or an array in the step."""
        return (step >= self.start) & ((step - self.start) % self.every == 0)

    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """Returns the mean including `params` if `step` is one of those that count, else the state as it was."""
        count, (old, structure) = ext_state["count"], partition(ext_state["average"])
        due = self._counts(step)

        def mean(old: Any, new: Any) -> Any:
            if not _is_floating(new):
                return new
            return jnp.where(count == 0, _widened(new), old + (_widened(new) - old) / (count + 1))

        def sampled(old: list[Any], new: list[Any]) -> list[Any]:
            return list(map(mean, old, new))

        average = if_due(due, sampled, old, partition(params)[0])
        return {"count": count + due, "average": structure.join(average)}

    def weights(self, ext_state: PyTree, params: PyTree) -> PyTree:
        """Returns the mean, in float32 at least; before the first sample `params`."""
        started = ext_state["count"] > 0
        return _on_floats(
            lambda new, old: jnp.where(started, old, _widened(new)), params, ext_state["average"]
        )


def _on_floats(function: Callable[..., Any], params: PyTree, *trees: PyTree) -> PyTree:
    """Returns `params` with `function` of it and `trees` in place of each floating-point leaf."""
    return jax.tree.map(
        lambda leaf, *others: function(leaf, *others) if _is_floating(leaf) else leaf, params, *trees
    )


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _widened(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)
