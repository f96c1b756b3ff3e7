"""Averaged weights in place of the params, for evaluation, prediction and the result of a run.

Nothing is swapped, so nothing has to be swapped back: the result is a list of leaves of its own, and the state in
training is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.executable_cache import LowerOnCaller
from eventtrain.device.extensions import StepExtension, Use, checked_uses
from eventtrain.device.state import Leaves, PyTree, TreeStructure, abstract, partition
from eventtrain.device.validation import call_user, structure_differences, type_differences
from eventtrain.errors import ConfigurationError, StateError, listed

Params = Callable[[PyTree], PyTree]


def params_indices(params: Params, structure: TreeStructure, leaves: Sequence[Any]) -> dict[str, int | None]:
    """Returns path of each array that the lens `params` gives -> index of that leaf in the state.

    The index is None where the lens computes the array. Never blocks.
    """
    found: dict[str, int | None] = {}

    def look(leaves: Leaves) -> None:
        number = {id(leaf): index for index, leaf in enumerate(leaves)}
        covered, held = partition(call_user("params", params, structure.join(leaves)))
        found.update({path: number.get(id(leaf)) for path, leaf in zip(held.paths, covered, strict=True)})

    # Traced, since a lens may ask whether a leaf is an array.
    jax.eval_shape(look, _unplaced(leaves))
    return found


def params_overrides(
    extensions: Sequence[StepExtension],
    params: Params,
    structure: TreeStructure,
    leaves: Sequence[jax.Array],
    lower_on_caller: LowerOnCaller,
) -> dict[Use, ParamsOverride]:
    """Returns the override for each use that an extension has; fails before training, not after it.

    Raises:
        ConfigurationError: an unknown use, two extensions for one use, or `params` computes an array.
        StepError, StateError: as in `ParamsOverride`.
    """
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


class ParamsOverride:
    """Replaces the params, where the lens `params` finds them, by the weights of `extension`.

    Args:
        structure, leaves: of the state. Only shapes, dtypes and shardings of the leaves are used.
        lower_on_caller: as in `CompiledStep`.

    Raises:
        ConfigurationError: `params` gives an array that is not a leaf of the state.
        StepError: a method of the extension raised.
        StateError: its weights have another structure or other shapes than the params.
    """

    def __init__(
        self,
        extension: StepExtension,
        params: Params,
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
        for path, index in params_indices(params, structure, leaves).items():
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
            self._compiled = lowered.compile()
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


def _unplaced(leaves: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each leaf."""
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
