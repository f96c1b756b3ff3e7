"""What is trained and how to run it: all that outlives one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from eventtrain.device.evaluate import CompiledEval, CompiledPredict
from eventtrain.device.extensions import StepExtension
from eventtrain.device.hyperparams import Hyperparam
from eventtrain.device.state import PyTree, Skeleton
from eventtrain.device.step import CompiledStep
from eventtrain.loop import Pace

CallOnCaller = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class RunOptions:
    """How to run: the options of ``Trainer`` that concern every run."""

    run_id: str
    run_dir: Path
    donate: bool
    steps_per_call: int
    pace: Pace
    weight: str | None
    snapshot: str
    drain_timeout_s: float


@dataclass(frozen=True)
class Aim:
    """What one call of ``fit`` aims at, for the subscribers' information."""

    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None


@dataclass
class Model:
    """What is trained: the functions, and the state as leaves between runs.

    ``leaves`` is empty while a run owns the state.
    """

    step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]]
    eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]] | None
    predict_fn: Callable[[PyTree, PyTree], PyTree] | None
    params: Callable[[PyTree], PyTree]
    extensions: Sequence[StepExtension]
    skeleton: Skeleton
    leaves: list[jax.Array]
    ext_leaves: list[jax.Array] | None = None
    step: int = 0
    epoch: int = 0
    compiled: CompiledStep | None = None
    compile_on_caller: CallOnCaller = field(default=lambda function: function())
    """Runs tracing and lowering on the thread that called fit, where the JAX settings meant hold."""
    _evaluation: CompiledEval | None = None
    _prediction: CompiledPredict | None = None

    def compile_step(self, hyperparams: Sequence[Hyperparam], options: RunOptions) -> CompiledStep:
        """The step for this state, not prepared yet; it also records the scheduled ones of ``hyperparams``."""
        return CompiledStep(
            self.step_fn,
            self.skeleton,
            self.leaves,
            extensions=self.extensions,
            params=self.params,
            hyperparams_watched=[h.leaf_index for h in hyperparams if h.scheduled],
            steps_per_call=options.steps_per_call,
            donate=options.donate,
            keep=options.snapshot == "keep",
            compile_on_caller=self._lower,
        )

    def evaluation(self, leaves: Sequence[jax.Array]) -> CompiledEval:
        """eval_fn for a state with leaves like ``leaves``; made once."""
        assert self.eval_fn is not None
        if self._evaluation is None:
            self._evaluation = CompiledEval(
                self.eval_fn, self.skeleton, leaves, compile_on_caller=self._lower
            )
        return self._evaluation

    def prediction(self) -> CompiledPredict:
        """predict_fn; made once."""
        assert self.predict_fn is not None
        if self._prediction is None:
            self._prediction = CompiledPredict(
                self.predict_fn, self.skeleton, self.leaves, compile_on_caller=self._lower
            )
        return self._prediction

    def _lower(self, function: Callable[[], Any]) -> Any:
        return self.compile_on_caller(function)

    def params_indices(self) -> list[int]:
        """Which leaves the params lens covers."""
        numbered = self.skeleton.join([_Index(i) for i in range(len(self.leaves))])  # pyright: ignore[reportArgumentType]
        found = jax.tree_util.tree_leaves(self.params(numbered))
        return [leaf.index for leaf in found if isinstance(leaf, _Index)]


class _Index:
    """Stands for a leaf while the params lens is asked which leaves it covers."""

    def __init__(self, index: int) -> None:
        self.index = index
