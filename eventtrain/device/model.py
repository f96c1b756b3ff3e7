"""``Model``: what is trained, over all runs of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax

from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.executable_cache import LowerOnCaller, lower_here
from eventtrain.device.extensions import StepExtension, Use
from eventtrain.device.fused_step import StepFn, StepOptions
from eventtrain.device.hyperparams import Hyperparam
from eventtrain.device.params_override import Params, ParamsOverride, params_indices, params_overrides
from eventtrain.device.state import Leaves, PyTree, TreeStructure, place, split_state
from eventtrain.errors import ConfigurationError

EvalFn: TypeAlias = Callable[[PyTree, PyTree], Mapping[str, Any]]
PredictFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]


@dataclass
class Model:
    """The functions, and the state between runs.

    Attributes:
        leaves: of the state; empty while a run owns it.
        ext_leaves: of the step extensions; None before the first run.
        step, epoch: completed.
        compiled: the step; None before the first batch.
        lower_on_caller: another one while a run trains on another thread than the one that called ``fit``.
    """

    step_fn: StepFn
    eval_fn: EvalFn | None
    predict_fn: PredictFn | None
    params: Params
    extensions: Sequence[StepExtension]
    options: StepOptions
    structure: TreeStructure
    leaves: Leaves
    ext_leaves: Leaves | None = None
    step: int = 0
    epoch: int = 0
    compiled: CompiledStep | None = None
    lower_on_caller: LowerOnCaller = lower_here
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
        step_fn: StepFn,
        state: PyTree,
        *,
        eval_fn: EvalFn | None,
        predict_fn: PredictFn | None,
        params: Params | None,
        extensions: Sequence[StepExtension],
        options: StepOptions,
    ) -> Model:
        """Returns the model for the arguments of ``Trainer`` of the same names.

        ``state`` is neither copied nor donated: the first step of a run keeps it.

        Raises:
            ConfigurationError, StateError: an argument is invalid.
        """
        for name, function, shape in (
            ("step_fn", step_fn, "(state, batch) -> (state, metrics)"),
            ("eval_fn", eval_fn, "(state, batch) -> metrics"),
            ("predict_fn", predict_fn, "(state, batch) -> outputs"),
            ("params", params, "state -> weights"),
        ):
            if not callable(function) and (function is not None or name == "step_fn"):
                raise ConfigurationError(f"{name} must be a function {shape}, got {type(function).__name__}.")
        leaves, structure = split_state(state)
        params, extensions = params or _default_params, tuple(extensions)
        return cls(step_fn, eval_fn, predict_fn, params, extensions, options, structure, place(leaves))

    def prepare(self, batch: PyTree, hyperparams: Sequence[Hyperparam]) -> CompiledStep:
        """Returns the step, compiled for ``batch`` if this is the first run. Blocks until compiled.

        The step also records the values of those ``hyperparams`` that follow a schedule.
        """
        if self.compiled is None:
            compiled = CompiledStep(
                self.step_fn,
                self.structure,
                self.leaves,
                extensions=self.extensions,
                params=self.params,
                hyperparams_watched=[h.leaf_index for h in hyperparams if h.scheduled],
                options=self.options,
                lower_on_caller=self._lower,
            )
            compiled.prepare(batch)
            self.compiled = compiled
        return self.compiled

    def evaluation(self, leaves: Sequence[jax.Array]) -> CompiledEval:
        """Returns eval_fn, compiled for a state with leaves like ``leaves``; made once."""
        assert self.eval_fn is not None
        if self._evaluation is None:
            self._evaluation = CompiledEval(self.eval_fn, self.structure, leaves, lower_on_caller=self._lower)
        return self._evaluation

    def prediction(self) -> CompiledPredict:
        """Returns predict_fn; made once."""
        assert self.predict_fn is not None
        if self._prediction is None:
            self._prediction = CompiledPredict(
                self.predict_fn, self.structure, self.leaves, lower_on_caller=self._lower
            )
        return self._prediction

    def _lower(self, function: Callable[[], Any]) -> Any:
        return self.lower_on_caller(function)

    def params_indices(self) -> list[int]:
        """Returns the indices of the leaves that the params lens selects."""
        found = params_indices(self.params, self.structure, self.leaves)
        return [index for index in found.values() if index is not None]

    def params_paths(self) -> dict[str, str | None]:
        """Returns, for the path of each array that the params lens selects, its path in the state, if it has one."""
        found, paths = params_indices(self.params, self.structure, self.leaves), self.structure.paths
        return {path: None if index is None else paths[index] for path, index in found.items()}

    def leaves_for(
        self, use: Use, leaves: Sequence[jax.Array], ext_leaves: Sequence[jax.Array] | None
    ) -> Sequence[jax.Array]:
        """Returns ``leaves``, with the params replaced by the weights of the extension for ``use``, if there is one.

        One dispatch, which changes neither ``leaves`` nor ``ext_leaves``. Before the first run there are no
        ``ext_leaves``, and nothing is replaced.
        """
        override = self._overrides.get(use)
        if override is None or not ext_leaves or self.compiled is None:
            return leaves
        return override(leaves, self.compiled.extension_states(ext_leaves)[override.extension.name])


def _default_params(state: PyTree) -> PyTree:
    if isinstance(state, Mapping):
        return state.get("params", state)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return getattr(state, "params", state)
