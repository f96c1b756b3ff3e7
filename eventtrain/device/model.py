"""``Model``: the functions and the state of a trainer, and the averaged weights that replace its params."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from eventtrain.device.batch_sharding import BatchSharding
from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict, CompiledSample
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.debugged_step import DebuggedStep
from eventtrain.device.default_params import find_params
from eventtrain.device.executable_cache import LowerOnCaller, compile_lowered, lower_here
from eventtrain.device.extensions import ParamsLens, StepExtension, Use, checked_uses, is_periodic
from eventtrain.device.fused_step import StepFn, StepOptions
from eventtrain.device.hyperparams import Hyperparam, find_hyperparams, read, resolve_label, write
from eventtrain.device.periodic_step import PeriodicStep
from eventtrain.device.placement import put
from eventtrain.device.state import (
    Leaves,
    PyTree,
    StateArray,
    TreeStructure,
    abstract,
    is_weak,
    partition,
    place,
    replicated_sharding,
    split_state,
    strong,
)
from eventtrain.device.validation import (
    PromotionError,
    call_user,
    static_differences,
    structure_differences,
    type_differences,
)
from eventtrain.errors import ConfigurationError, StateError, listed
from eventtrain.validation.callables import require_plain

EvalFn: TypeAlias = Callable[[PyTree, PyTree], Any]
PredictFn: TypeAlias = Callable[[PyTree, PyTree], PyTree]


class Model:
    """The functions, and the state between runs.

    Args:
        step_fn, state, eval_fn, predict_fn, params, extensions: as for ``Trainer``. ``state`` is neither copied nor
            donated: the first step of a run keeps it.
        options: how to compile the step.
        batch_sharding: as for ``Trainer``. A state that is not committed goes to its mesh.

    Attributes:
        split: the same, checked; None without it.
        leaves: of the state; empty while a run owns it.
        ext_leaves: of the step extensions; None before the first run.
        step, epoch: completed.
        weak_paths: of leaves that are traced as weakly typed.
        unknown_params: why the default of ``params`` cannot tell the weights in the state; None if it can.
        lower_on_caller: another one while a run trains on another thread than the one that called ``fit``.

    Raises:
        ConfigurationError, StateError: an argument is invalid.
    """

    def __init__(
        self,
        step_fn: StepFn,
        state: PyTree,
        *,
        eval_fn: EvalFn | None,
        predict_fn: PredictFn | None,
        params: ParamsLens | None,
        extensions: Sequence[StepExtension],
        options: StepOptions,
        batch_sharding: PyTree = None,
    ) -> None:
        for name, function, shape in (
            ("step_fn", step_fn, "(state, batch) -> (state, metrics)"),
            ("eval_fn", eval_fn, "(state, batch) -> metrics"),
            ("predict_fn", predict_fn, "(state, batch) -> outputs"),
            ("params", params, "state -> weights"),
        ):
            if not callable(function) and (function is not None or name == "step_fn"):
                raise ConfigurationError(f"{name} must be a function {shape}, got {type(function).__name__}.")
            if function is not None:
                require_plain(name, function)
        leaves, self.structure = split_state(state)
        self._may_move = not any(isinstance(leaf, jax.Array) and leaf.committed for leaf in leaves)
        self.leaves = place(leaves)
        self.split = None if batch_sharding is None else BatchSharding(batch_sharding)
        if self.split is not None:
            self._join(self.split)
        # Weakly typed leaves. One that was read from a checkpoint is strong, and is traced as it was before.
        self.weak_paths = {
            path for path, leaf in zip(self.structure.paths, leaves, strict=True) if is_weak(leaf)
        }
        self.ext_leaves: Leaves | None = None
        self.step_fn, self.eval_fn, self.predict_fn = step_fn, eval_fn, predict_fn
        self.params, self.extensions, self.options = params or find_params, tuple(extensions), options
        self.unknown_params = _unknown_params(self.structure, leaves) if params is None else None
        for extension in self.extensions:
            self.require_params(f"{extension!r} of step_extensions")
        self.step = self.epoch = 0
        self.compiled: CompiledStep | None = None
        self.lower_on_caller: LowerOnCaller = lower_here
        self._evaluation: CompiledEval | None = None
        self._prediction: CompiledPredict | None = None
        self._samples: dict[int, CompiledSample] = {}
        self._overrides = _params_overrides(
            self.extensions, self.params, self.structure, self.leaves, self._lower
        )

    def prepare(self, batch: PyTree) -> CompiledStep:
        """Returns the step, compiled for `batch` if this is the first run. Blocks until compiled.

        The state is taken as `jax.jit` and `lax.scan` take it: Python numbers that step_fn changes become arrays,
        weakly typed leaves get the type that step_fn returns, and a state that is not committed goes to the devices of
        the batch. The step also records the values of the hyperparameters that follow a schedule.
        """
        if self.compiled is None:
            self._move_to(batch)
        while self.compiled is None:
            hyperparams = find_hyperparams(self.structure.join(self.leaves))
            compiled = self._step_class()(
                self.step_fn,
                self.structure,
                self.leaves,
                leaf_types=self._types(self.leaves),
                extensions=self.extensions,
                params=self.params,
                hyperparams_watched=[h.leaf_index for h in hyperparams if h.scheduled],
                options=self.options,
                lower_on_caller=self._lower,
            )
            try:
                compiled.prepare(batch)
            except PromotionError as error:
                self._promote(error)
            else:
                self.compiled = compiled
        return self.compiled

    def _step_class(self) -> type[CompiledStep]:
        if self.options.debug:
            return DebuggedStep
        if self.options.steps_per_call == 1 and any(map(is_periodic, self.extensions)):
            return PeriodicStep
        return CompiledStep

    def adopt(self, state: PyTree) -> None:
        """Take over a state like the present one, which may have arrays where that has Python numbers."""
        leaves, structure = split_state(state)
        changed = structure.paths != self.structure.paths
        self.leaves = place(leaves)
        if changed:
            self.structure = structure
            self._forget_compiled()

    def new_hyperparams(self, values: Mapping[str, object]) -> dict[Hyperparam, jax.Array]:
        """Returns leaves with these values, for `set_hyperparams`.

        Args:
            values: by name; by path where several have one name.

        Raises:
            HyperparamError: there is no such hyperparameter, or it cannot have this value.
        """
        known = find_hyperparams(self.structure.join(self.leaves))
        targets = {label: resolve_label(known, label) for label in values}
        return {one: write(self.leaves[one.leaf_index], values[label]) for label, one in targets.items()}

    def set_hyperparams(self, leaves: Mapping[Hyperparam, jax.Array]) -> dict[Hyperparam, float | int | bool]:
        """Put these leaves into the state. Returns the values before. Blocks until those are computed."""
        before: dict[Hyperparam, float | int | bool] = {}
        self.leaves = list(self.leaves)
        for one, leaf in leaves.items():
            index = self.structure.paths.index(one.path)
            before[one] = read(self.leaves[index])
            self.leaves[index] = leaf
        return before

    def leaves_like(self, state: PyTree, like: Sequence[jax.Array]) -> Leaves:
        """Returns the leaves of ``state``, which replaces one with the leaves ``like``, placed as those are.

        Raises:
            StateError: another structure, shape, dtype or static leaf.
        """
        leaves, structure = split_state(state)
        if structure.treedef != self.structure.treedef or structure.paths != self.structure.paths:
            differences = [structure_differences(state, self.structure)]
        else:
            differences = type_differences("state", structure.paths, leaves, like)
            differences += static_differences("state", self.structure, structure)
        if differences:
            raise StateError(
                f"session.state cannot be replaced by one that differs: {listed(differences)}. The step is compiled "
                "for the present state. Give one with the same structure, shapes and dtypes, and new values in it."
            )
        return [
            wanted if leaf is wanted else strong(put(leaf, wanted.sharding))
            for leaf, wanted in zip(leaves, like, strict=True)
        ]

    def _types(self, leaves: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
        return abstract(leaves, [path in self.weak_paths for path in self.structure.paths])

    def _move_to(self, batch: PyTree) -> None:
        """Place a state that is not committed to devices where the batch is."""
        arrays = [leaf for leaf in jax.tree.leaves(batch) if isinstance(leaf, jax.Array) and leaf.committed]
        if self._may_move and arrays:
            sharding = replicated_sharding(arrays)
            if sharding.device_set != replicated_sharding(self.leaves).device_set:
                self.leaves = [put(leaf, sharding) for leaf in self.leaves]
                self._forget_compiled()

    def _join(self, split: BatchSharding) -> None:
        """Place the state on the mesh of the batches."""
        mesh, here = split.replicated.device_set, replicated_sharding(self.leaves).device_set
        if mesh == here:
            return
        if not self._may_move:
            raise ConfigurationError(
                f"Trainer: batch_sharding is over {len(mesh)} devices, and the state is committed to {len(here)} "
                "others. Put it on the same mesh, for example with jax.device_put(state, NamedSharding(mesh, "
                "PartitionSpec()))."
            )
        self.leaves = [put(leaf, split.replicated) for leaf in self.leaves]

    def _promote(self, error: PromotionError) -> None:
        """Make the leaves that ``error`` names arrays of the dtypes that it names."""
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(self.structure.join(self.leaves))
        leaves = [leaf for _, leaf in with_paths]
        for position, dtype in error.dtypes.items():
            path = jax.tree_util.keystr(with_paths[position][0])
            leaves[position] = strong(jnp.asarray(leaves[position], dtype))
            (self.weak_paths.add if dtype is None else self.weak_paths.discard)(path)
        self.adopt(jax.tree_util.tree_unflatten(treedef, leaves))

    def _forget_compiled(self) -> None:
        self._evaluation = self._prediction = None
        self._samples = {}
        self._overrides = _params_overrides(
            self.extensions, self.params, self.structure, self.leaves, self._lower
        )

    def evaluation(self, leaves: Sequence[jax.Array]) -> CompiledEval:
        """Returns eval_fn, compiled for a state with leaves like ``leaves``; made once."""
        assert self.eval_fn is not None
        if self._evaluation is None:
            self._evaluation = CompiledEval(
                self.eval_fn,
                self.structure,
                leaves,
                leaf_types=self._types(leaves),
                lower_on_caller=self._lower,
            )
        return self._evaluation

    def prediction(self) -> CompiledPredict:
        """Returns predict_fn; made once."""
        assert self.predict_fn is not None
        if self._prediction is None:
            self._prediction = CompiledPredict(
                self.predict_fn,
                self.structure,
                self.leaves,
                leaf_types=self._types(self.leaves),
                lower_on_caller=self._lower,
            )
        return self._prediction

    def sample(
        self, name: str, function: Callable[[PyTree], PyTree], leaves: Sequence[jax.Array]
    ) -> CompiledSample:
        """Returns the function of a sample, compiled for a state with leaves like ``leaves``; made once. Blocks.

        Raises:
            StepError: it raised, or returned other things than arrays.
        """
        key = id(function)  # of an object that the compiled sample keeps; not every callable has a hash
        if key not in self._samples:
            made = CompiledSample(
                name,
                function,
                self.structure,
                leaves,
                leaf_types=self._types(leaves),
                lower_on_caller=self._lower,
            )
            made.prepare(())
            self._samples[key] = made
        return self._samples[key]

    def _lower(self, function: Callable[[], Any]) -> Any:
        return self.lower_on_caller(function)

    def require_params(self, subject: str) -> None:
        """Raises a ConfigurationError for ``subject``, which needs the weights, if they are unknown."""
        if self.unknown_params is not None:
            raise ConfigurationError(f"{subject} requires the weights, but {self.unknown_params}")

    def params_indices(self, leaves: Sequence[jax.Array] | None = None) -> list[int]:
        """Returns the indices of the leaves that the params lens selects, for a state with these leaves."""
        found = _params_indices(self.params, self.structure, self.leaves if leaves is None else leaves)
        return [index for index in found.values() if index is not None]

    def arrays(self, leaves: Sequence[jax.Array]) -> list[StateArray]:
        """Returns what is known of each array of a state with these leaves, without reading it. Any thread."""
        params: set[int] = set() if self.unknown_params else set(self.params_indices(leaves))
        return [
            StateArray(
                path,
                leaf.shape,
                str(leaf.dtype),
                _sharding_text(leaf),
                leaf.size,
                leaf.nbytes,
                index in params,
            )
            for index, (path, leaf) in enumerate(zip(self.structure.paths, leaves, strict=True))
        ]

    def params_paths(self) -> dict[str, str | None]:
        """Returns, for the path of each array that the params lens selects, its path in the state, if it has one."""
        found, paths = _params_indices(self.params, self.structure, self.leaves), self.structure.paths
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


class ParamsOverride:
    """Replaces the params, where the lens `params` finds them, by the weights of `extension`.

    Of the `leaves` of the state, only shapes, dtypes and shardings are used.

    Raises:
        ConfigurationError: `params` gives an array that is not a leaf of the state.
        StepError: a method of the extension raised.
        StateError: its weights have another structure or other shapes than the params.
    """

    def __init__(
        self,
        extension: StepExtension,
        params: ParamsLens,
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
        lower_on_caller: LowerOnCaller,
    ) -> None:
        self.extension = extension
        self._params = params
        self._structure = structure
        self._lower_on_caller = lower_on_caller
        self._compiled: Callable[..., Leaves] | None = None
        self._indices: list[int] = []
        for path, index in _params_indices(params, structure, leaves).items():
            if index is None:
                raise ConfigurationError(
                    f"{extension!r} cannot replace params{path}, which params=... computes: only leaves of the state "
                    "can be replaced. Let params return leaves of the state as they are."
                )
            self._indices.append(index)

        def weights_at_start(leaves: Leaves) -> Leaves:
            initial = call_user(f"{extension!r}.init", extension.init, self._params_of(leaves))
            return self._weights(leaves, initial)

        jax.eval_shape(weights_at_start, _unplaced(leaves))

    def __call__(self, leaves: Sequence[jax.Array], ext_state: PyTree) -> Leaves:
        """Returns `leaves` with the extension's weights in place of the params.

        One dispatch: donates nothing and waits for nothing. The first call compiles, which blocks.
        """
        ext_leaves, ext_structure = partition(ext_state)
        if self._compiled is None:
            lowered: jax.stages.Lowered = self._lower_on_caller(
                lambda: self._lower(leaves, ext_leaves, ext_structure)
            )
            self._compiled = compile_lowered(lowered)
        replaced = list(leaves)
        weights = self._compiled(list(leaves), ext_leaves)
        for index, weight in zip(self._indices, weights, strict=True):
            replaced[index] = weight
        return replaced

    def _lower(
        self, leaves: Sequence[jax.Array], ext_leaves: Sequence[Any], ext_structure: TreeStructure
    ) -> jax.stages.Lowered:
        def call(leaves: Leaves, ext_leaves: Leaves) -> Leaves:
            return self._weights(leaves, ext_structure.join(ext_leaves))

        jitted = jax.jit(call, out_shardings=[leaves[index].sharding for index in self._indices])
        return jitted.lower(abstract(leaves), abstract(ext_leaves))

    def _weights(self, leaves: Leaves, ext_state: PyTree) -> Leaves:
        """Returns the array leaves that replace those of the params, in their dtypes; traced."""
        name, params = f"{self.extension!r}.weights", self._params_of(leaves)
        weights = call_user(name, self.extension.weights, ext_state, params)
        expected, structure = partition(params)
        found, treedef = jax.tree_util.tree_flatten(weights)
        if treedef != structure.treedef:
            raise StateError(
                f"{name} returned another structure than that of params: {structure_differences(weights, structure)}. "
                "Return a tree like params."
            )
        static = {position for position, _, _ in structure.static}
        given = [leaf for position, leaf in enumerate(found) if position not in static]
        if differences := type_differences("params", structure.paths, given, expected, dtypes=False):
            raise StateError(
                f"{name} returned other shapes than those of params: {listed(differences)}. Return a tree like params."
            )
        return [
            jnp.asarray(leaf) if leaf.dtype == wanted.dtype else jnp.asarray(leaf).astype(wanted.dtype)
            for leaf, wanted in zip(given, expected, strict=True)
        ]

    def _params_of(self, leaves: Leaves) -> PyTree:
        return call_user("params", self._params, self._structure.join(leaves))


def _params_indices(
    params: ParamsLens, structure: TreeStructure, leaves: Sequence[Any]
) -> dict[str, int | None]:
    """Returns path of each array that the lens `params` gives -> index of that leaf in the state; None if computed."""
    found: dict[str, int | None] = {}

    def look(leaves: Leaves) -> None:
        number = {id(leaf): index for index, leaf in enumerate(leaves)}
        covered, held = partition(call_user("params", params, structure.join(leaves)))
        found.update({path: number.get(id(leaf)) for path, leaf in zip(held.paths, covered, strict=True)})

    # Traced, since a lens may ask whether a leaf is an array.
    jax.eval_shape(look, _unplaced(leaves))
    return found


def _params_overrides(
    extensions: Sequence[StepExtension],
    params: ParamsLens,
    structure: TreeStructure,
    leaves: Sequence[jax.Array],
    lower_on_caller: LowerOnCaller,
) -> dict[Use, ParamsOverride]:
    """Returns the override for each use that an extension has; errors as in `ParamsOverride`."""
    overrides: dict[Use, ParamsOverride] = {}
    for extension in extensions:
        uses = checked_uses(repr(extension), extension.use_for)
        if not uses:
            continue
        override = ParamsOverride(extension, params, structure, leaves, lower_on_caller)
        for use in sorted(uses):
            if use in overrides:
                raise ConfigurationError(
                    f"step_extensions: {overrides[use].extension!r} and {extension!r} both have {use!r} in use_for, "
                    "but only one extension can replace the params there. Take it out of one of them."
                )
            overrides[use] = override
    return overrides


def _unknown_params(structure: TreeStructure, leaves: Sequence[Any]) -> str | None:
    """Returns why `find_params` cannot tell the weights; None if it can."""
    try:
        find_params(structure.join(leaves))
    except ConfigurationError as error:
        return str(error)
    return None


def _unplaced(leaves: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each leaf."""
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]


def _sharding_text(leaf: jax.Array) -> str:
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        axes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
        return f"{sharding.spec} on ({axes})"
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return str(devices[0]) if len(devices) == 1 else f"{len(devices)} devices"
