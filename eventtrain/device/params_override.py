"""An extension's weights in the places of the params: a state to look at, never the one that is trained.

Nothing is swapped, so nothing has to be swapped back: evaluation, prediction and the result of a run
get leaves of their own, and the state in training is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.extensions import StepExtension, Use, checked_uses
from eventtrain.device.fused_step import abstract
from eventtrain.device.state import PyTree, Skeleton, is_array, partition
from eventtrain.device.validation import call_user, describe
from eventtrain.errors import ConfigurationError, StateError

__all__ = ["ParamsOverride", "params_indices", "stand_ins"]

Params = Callable[[PyTree], PyTree]
CallOnCaller = Callable[[Callable[[], Any]], Any]


def params_indices(params: Params, skeleton: Skeleton, leaves: Sequence[Any]) -> dict[str, int | None]:
    """Path of each array that the lens `params` gives -> which leaf of the state it is; None if it is none."""
    found: dict[str, int | None] = {}

    def look(leaves: list[jax.Array]) -> None:
        number = {id(leaf): index for index, leaf in enumerate(leaves)}
        tree = call_user("params", params, skeleton.join(leaves))
        covered, held = partition(tree)
        found.update({path: number.get(id(leaf)) for path, leaf in zip(held.paths, covered, strict=True)})

    # Traced, since a lens may ask whether a leaf is an array.
    jax.eval_shape(look, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
    return found


def stand_ins(
    extensions: Sequence[StepExtension],
    params: Params,
    skeleton: Skeleton,
    leaves: Sequence[jax.Array],
    compile_on_caller: CallOnCaller,
) -> dict[Use, ParamsOverride]:
    """Who stands in for the params where; what cannot work is said now and not after a night's training.

    Raises:
        ConfigurationError: an unknown use, two extensions for one use, or `params` gives something else than leaves
            of the state.
        StepError, StateError: as in `StandIn`.
    """
    chosen: dict[Use, ParamsOverride] = {}
    for extension in extensions:
        uses = checked_uses(repr(extension), extension.use_for)
        if not uses:
            continue
        stand_in = ParamsOverride(extension, params, skeleton, leaves, compile_on_caller)
        for use in sorted(uses):
            if use in chosen:
                raise ConfigurationError(
                    f"step_extensions: {chosen[use].extension!r} and {extension!r} both have {use!r} in use_for, but "
                    "only one can stand in for the params there. Take it out of one of them."
                )
            chosen[use] = stand_in
    return chosen


class ParamsOverride:
    """Puts the weights of `extension` where the lens `params` finds the params.

    Args:
        skeleton, leaves: of the state. Only shapes, dtypes and shardings of the leaves are used.
        compile_on_caller: as in `CompiledStep`.

    Raises:
        ConfigurationError: `params` gives an array that is no leaf of the state.
        StepError: a method of the extension raised. StateError: its weights are not shaped like the params.
    """

    def __init__(
        self,
        extension: StepExtension,
        params: Params,
        skeleton: Skeleton,
        leaves: Sequence[jax.Array],
        compile_on_caller: CallOnCaller,
    ) -> None:
        self.extension = extension
        self._params = params
        self._skeleton = skeleton
        self._compile_on_caller = compile_on_caller
        self._compiled: Callable[..., list[jax.Array]] | None = None
        self._indices: list[int] = []
        for path, index in params_indices(params, skeleton, leaves).items():
            if index is None:
                raise ConfigurationError(
                    f"{extension!r} cannot stand in for params{path}: params=... computes it, and only leaves of the "
                    "state can be replaced. Let params return leaves of the state as they are."
                )
            self._indices.append(index)
        jax.eval_shape(
            lambda leaves: self._weights(leaves, self._initial(leaves)),
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        )

    def __call__(self, leaves: Sequence[jax.Array], ext_state: PyTree) -> list[jax.Array]:
        """`leaves` with the extension's weights in place of the params; neither is donated or waited for.

        The first call compiles, and blocks for that.
        """
        ext_leaves, ext_skeleton = partition(ext_state)
        if self._compiled is None:
            lowered: jax.stages.Lowered = self._compile_on_caller(
                lambda: self._lower(leaves, ext_leaves, ext_skeleton)
            )
            self._compiled = lowered.compile()
        replaced = list(leaves)
        for index, weight in zip(self._indices, self._compiled(list(leaves), ext_leaves), strict=True):
            replaced[index] = weight
        return replaced

    def _lower(
        self, leaves: Sequence[jax.Array], ext_leaves: Sequence[Any], ext_skeleton: Skeleton
    ) -> jax.stages.Lowered:
        def call(leaves: list[jax.Array], ext_leaves: list[jax.Array]) -> list[jax.Array]:
            return self._weights(leaves, ext_skeleton.join(ext_leaves))

        jitted = jax.jit(call, out_shardings=[leaves[index].sharding for index in self._indices])
        return jitted.lower(abstract(leaves), abstract(ext_leaves))

    def _initial(self, leaves: list[jax.Array]) -> PyTree:
        return call_user(f"{self.extension!r}.init", self.extension.init, self._params_of(leaves))

    def _weights(self, leaves: list[jax.Array], ext_state: PyTree) -> list[jax.Array]:
        """The array leaves that take the places of the params', in the params' dtypes."""
        where, params = f"{self.extension!r}.weights", self._params_of(leaves)
        found = jax.tree_util.tree_flatten(call_user(where, self.extension.weights, ext_state, params))
        expected, treedef = jax.tree_util.tree_flatten_with_path(params)
        if found[1] != treedef:
            raise StateError(
                f"{where} returned {found[1]}, but stands in for params of structure {treedef}. Return a tree like "
                "params."
            )
        replacing: list[jax.Array] = []
        for (path, wanted), leaf in zip(expected, found[0], strict=True):
            if not is_array(wanted):
                continue
            if not is_array(leaf) or leaf.shape != wanted.shape:
                given = describe(leaf) if is_array(leaf) else type(leaf).__name__
                raise StateError(
                    f"{where} returned params{jax.tree_util.keystr(path)} as {given}, but stands in for "
                    f"{describe(wanted)}. Return a tree like params."
                )
            weight = jnp.asarray(leaf)
            replacing.append(weight if weight.dtype == wanted.dtype else weight.astype(wanted.dtype))
        return replacing

    def _params_of(self, leaves: list[jax.Array]) -> PyTree:
        return call_user("params", self._params, self._skeleton.join(leaves))
