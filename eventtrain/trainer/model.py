"""What is trained and how to run it: all that outlives one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.executable_cache import LowerOnCaller, lower_here
from eventtrain.device.extensions import StepExtension, Use
from eventtrain.device.fused_step import StepOptions
from eventtrain.device.hyperparams import Hyperparam
from eventtrain.device.params_override import ParamsOverride, params_indices, params_overrides
from eventtrain.device.state import PyTree, TreeStructure, place, split_state
from eventtrain.errors import ConfigurationError
from eventtrain.loop.train_loop import Pace


@dataclass(frozen=True)
class RunOptions:
    """How to run: the options of ``Trainer`` that concern every run."""

    run_id: str
    run_dir: Path
    run_dir_is_new: bool
    """Nobody said where it is to be, so that there can be nothing in it."""
    donate: bool
    steps_per_call: int
    pace: Pace
    weight: str | None
    snapshot: str
    drain_timeout_s: float
    fingerprint: Mapping[str, Any]
    """What an exact continuation of a run depends on."""


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
    structure: TreeStructure
    leaves: list[jax.Array]
    ext_leaves: list[jax.Array] | None = None
    step: int = 0
    epoch: int = 0
    compiled: CompiledStep | None = None
    lower_on_caller: LowerOnCaller = lower_here
    """Set to another one where the run trains on another thread than the one that called fit."""
    _evaluation: CompiledEval | None = None
    _prediction: CompiledPredict | None = None
    _overrides: dict[Use, ParamsOverride] = field(init=False)

    def __post_init__(self) -> None:
        self._overrides = params_overrides(
            self.extensions, self.params, self.structure, self.leaves, self._lower
        )

    @classmethod
    def of(
        cls,
        step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]],
        state: PyTree,
        eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]] | None,
        predict_fn: Callable[[PyTree, PyTree], PyTree] | None,
        params: Callable[[PyTree], PyTree] | None,
        extensions: Sequence[StepExtension],
    ) -> Model:
        """From the arguments of ``Trainer``, of the same names; ``state`` is copied.

        Raises:
            ConfigurationError, StateError: what cannot work.
        """
        _require_callable("step_fn", step_fn, "(state, batch) -> (state, metrics)")
        for name, function in (("eval_fn", eval_fn), ("predict_fn", predict_fn), ("params", params)):
            if function is not None:
                _require_callable(
                    name, function, "a function of (state, batch)" if name != "params" else "state -> weights"
                )
        leaves, structure = split_state(state)
        return cls(
            step_fn,
            eval_fn,
            predict_fn,
            params or _default_params,
            tuple(extensions),
            structure,
            place(leaves),
        )

    def compiled_for(
        self, batch: PyTree, hyperparams: Sequence[Hyperparam], options: RunOptions
    ) -> CompiledStep:
        """The step for this state, prepared for ``batch``; it also records the scheduled ones of ``hyperparams``.

        Made once; of a later run ``batch`` is not looked at.
        """
        if self.compiled is None:
            compiled = self._compile_step(hyperparams, options)
            compiled.prepare(batch)
            self.compiled = compiled
        return self.compiled

    def _compile_step(self, hyperparams: Sequence[Hyperparam], options: RunOptions) -> CompiledStep:
        return CompiledStep(
            self.step_fn,
            self.structure,
            self.leaves,
            extensions=self.extensions,
            params=self.params,
            hyperparams_watched=[h.leaf_index for h in hyperparams if h.scheduled],
            options=StepOptions(
                steps_per_call=options.steps_per_call,
                donate=options.donate,
                keep=options.snapshot == "keep",
            ),
            lower_on_caller=self._lower,
        )

    def evaluation(self, leaves: Sequence[jax.Array]) -> CompiledEval:
        """eval_fn for a state with leaves like ``leaves``; made once."""
        assert self.eval_fn is not None
        if self._evaluation is None:
            self._evaluation = CompiledEval(self.eval_fn, self.structure, leaves, lower_on_caller=self._lower)
        return self._evaluation

    def prediction(self) -> CompiledPredict:
        """predict_fn; made once."""
        assert self.predict_fn is not None
        if self._prediction is None:
            self._prediction = CompiledPredict(
                self.predict_fn, self.structure, self.leaves, lower_on_caller=self._lower
            )
        return self._prediction

    def _lower(self, function: Callable[[], Any]) -> Any:
        return self.lower_on_caller(function)

    def params_indices(self) -> list[int]:
        """Which leaves the params lens covers."""
        found = params_indices(self.params, self.structure, self.leaves)
        return [index for index in found.values() if index is not None]

    def params_paths(self) -> dict[str, str | None]:
        """Path of each array that the params lens gives -> its path in the state; None if it is no leaf of it."""
        found, paths = params_indices(self.params, self.structure, self.leaves), self.structure.paths
        return {path: None if index is None else paths[index] for path, index in found.items()}

    def leaves_for(
        self, use: Use, leaves: Sequence[jax.Array], ext_leaves: Sequence[jax.Array] | None
    ) -> Sequence[jax.Array]:
        """Returns ``leaves``, with the weights of the extension that replaces the params in ``use``, if one does.

        One dispatch, which changes neither ``leaves`` nor ``ext_leaves``. Before the first run there are no
        ``ext_leaves``, and the params are used.
        """
        override = self._overrides.get(use)
        if override is None or not ext_leaves or self.compiled is None:
            return leaves
        return override(leaves, self.compiled.extension_states(ext_leaves)[override.extension.name])


def _require_callable(name: str, function: object, shape: str) -> None:
    if not callable(function):
        raise ConfigurationError(f"{name} must be a function ({shape}), not {type(function).__name__}.")


def _default_params(state: PyTree) -> PyTree:
    if isinstance(state, Mapping):
        return state.get("params", state)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return getattr(state, "params", state)
