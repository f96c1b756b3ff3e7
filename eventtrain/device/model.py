"""``Model``: what is trained, over all runs of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.extensions import StepExtension, Use
from eventtrain.device.hyperparams import Hyperparam
from eventtrain.device.params_override import ParamsOverride, params_indices, stand_ins
from eventtrain.device.state import PyTree, Skeleton, place, split_state
from eventtrain.errors import ConfigurationError

CallOnCaller = Callable[[Callable[[], Any]], Any]


def call_here(function: Callable[[], Any]) -> Any:
    """The ``CallOnCaller`` of a run on the thread that called ``fit``."""
    return function()


@dataclass(frozen=True)
class StepOptions:
    """How the step is compiled: the options of ``Trainer`` of the same names."""

    donate: bool = True
    steps_per_call: int = 1
    snapshot: Literal["keep", "copy", "host"] = "keep"


@dataclass
class Model:
    """The functions, and the state between runs.

    Attributes:
        leaves: of the state; empty while a run owns it.
        ext_leaves: of the step extensions; None before the first run.
        step, epoch: completed.
        compiled: the step; None before the first batch.
        compile_on_caller: calls a function on the thread that called ``fit``, where JAX settings such as ``set_mesh``
            and ``enable_x64`` apply. Tracing and lowering go through it.
    """

    step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]]
    eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]] | None
    predict_fn: Callable[[PyTree, PyTree], PyTree] | None
    params: Callable[[PyTree], PyTree]
    extensions: Sequence[StepExtension]
    options: StepOptions
    skeleton: Skeleton
    leaves: list[jax.Array]
    ext_leaves: list[jax.Array] | None = None
    step: int = 0
    epoch: int = 0
    compiled: CompiledStep | None = None
    compile_on_caller: CallOnCaller = call_here
    _evaluation: CompiledEval | None = None
    _prediction: CompiledPredict | None = None
    _stand_ins: dict[Use, ParamsOverride] = field(init=False)

    def __post_init__(self) -> None:
        self._stand_ins = stand_ins(self.extensions, self.params, self.skeleton, self.leaves, self._lower)

    @classmethod
    def of(
        cls,
        step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]],
        state: PyTree,
        eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]] | None,
        predict_fn: Callable[[PyTree, PyTree], PyTree] | None,
        params: Callable[[PyTree], PyTree] | None,
        extensions: Sequence[StepExtension],
        options: StepOptions,
    ) -> Model:
        """Returns the model for the arguments of ``Trainer`` of the same names. ``state`` is copied.

        Raises:
            ConfigurationError, StateError: an argument is invalid.
        """
        _require_callable("step_fn", step_fn, "(state, batch) -> (state, metrics)")
        for name, function in (("eval_fn", eval_fn), ("predict_fn", predict_fn), ("params", params)):
            if function is not None:
                _require_callable(
                    name, function, "a function of (state, batch)" if name != "params" else "state -> weights"
                )
        leaves, skeleton = split_state(state)
        return cls(
            step_fn,
            eval_fn,
            predict_fn,
            params or _default_params,
            tuple(extensions),
            options,
            skeleton,
            place(leaves),
        )

    def prepare(self, batch: PyTree, hyperparams: Sequence[Hyperparam]) -> CompiledStep:
        """Returns the step, compiled for ``batch`` if this is the first run. Blocks until compiled.

        The step also records the values of those ``hyperparams`` that follow a schedule.
        """
        if self.compiled is None:
            compiled = CompiledStep(
                self.step_fn,
                self.skeleton,
                self.leaves,
                extensions=self.extensions,
                params=self.params,
                hyperparams_watched=[h.leaf_index for h in hyperparams if h.scheduled],
                steps_per_call=self.options.steps_per_call,
                donate=self.options.donate,
                keep=self.options.snapshot == "keep",
                compile_on_caller=self._lower,
            )
            compiled.prepare(batch)
            self.compiled = compiled
        return self.compiled

    def evaluation(self, leaves: Sequence[jax.Array]) -> CompiledEval:
        """Returns eval_fn, compiled for a state with leaves like ``leaves``; made once."""
        assert self.eval_fn is not None
        if self._evaluation is None:
            self._evaluation = CompiledEval(
                self.eval_fn, self.skeleton, leaves, compile_on_caller=self._lower
            )
        return self._evaluation

    def prediction(self) -> CompiledPredict:
        """Returns predict_fn; made once."""
        assert self.predict_fn is not None
        if self._prediction is None:
            self._prediction = CompiledPredict(
                self.predict_fn, self.skeleton, self.leaves, compile_on_caller=self._lower
            )
        return self._prediction

    def _lower(self, function: Callable[[], Any]) -> Any:
        return self.compile_on_caller(function)

    def params_indices(self) -> list[int]:
        """Returns the indices of the leaves that the params lens selects."""
        found = params_indices(self.params, self.skeleton, self.leaves)
        return [index for index in found.values() if index is not None]

    def params_paths(self) -> dict[str, str | None]:
        """Returns, for the path of each array that the params lens selects, its path in the state, if it has one."""
        found, paths = params_indices(self.params, self.skeleton, self.leaves), self.skeleton.paths
        return {path: None if index is None else paths[index] for path, index in found.items()}

    def leaves_for(
        self, use: Use, leaves: Sequence[jax.Array], ext_leaves: Sequence[jax.Array] | None
    ) -> Sequence[jax.Array]:
        """Returns ``leaves``, with the params replaced by the weights of the step extension for ``use``, if there is
        one.

        One dispatch, which changes neither ``leaves`` nor ``ext_leaves``. Before the first run there are no
        ``ext_leaves``, and nothing is replaced.
        """
        stand_in = self._stand_ins.get(use)
        if stand_in is None or not ext_leaves or self.compiled is None:
            return leaves
        return stand_in(leaves, self.compiled.extension_states(ext_leaves)[stand_in.extension.name])


def _require_callable(name: str, function: object, shape: str) -> None:
    if not callable(function):
        raise ConfigurationError(f"{name} must be a function ({shape}), got {type(function).__name__}.")


def _default_params(state: PyTree) -> PyTree:
    if isinstance(state, Mapping):
        return state.get("params", state)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return getattr(state, "params", state)
