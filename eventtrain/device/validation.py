"""Checks of what the user's functions return, made once per compilation, on the thread that traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from eventtrain.device.state import (
    Leaves,
    PyTree,
    TreeStructure,
    is_array,
    is_weak,
    partition,
    strong,
    type_of,
)
from eventtrain.errors import StateError, StepError, first_lines, listed
from eventtrain.validation.callables import require_result


def call_user(name: str, function: Callable[..., Any], *args: object) -> Any:
    """Calls a function of the user; what it raises becomes the cause of a StepError that says `name`.

    Raises ConfigurationError if it returns a coroutine or a generator.
    """
    try:
        result = function(*args)
    except Exception as error:
        raise StepError(f"{name} raised {type(error).__name__}: {first_lines(str(error))}") from error
    require_result(name, result)
    return result


def state_and_metrics(result: object) -> tuple[PyTree, Mapping[str, Any]]:
    """Returns `result` of step_fn if it is the pair `(state, metrics)`; raises a StepError otherwise."""
    if isinstance(result, tuple) and len(result) == 2:  # pyright: ignore[reportUnknownArgumentType]
        state, metrics = result  # pyright: ignore[reportUnknownVariableType]
        return state, metrics
    given = type(result).__name__
    if isinstance(result, tuple):
        given += f" of {len(result)}"  # pyright: ignore[reportUnknownArgumentType]
    raise StepError(
        f"step_fn returned {given} instead of a pair (state, metrics). End it with "
        "`return state, {'loss': loss}`, or with an empty dict if there are no metrics."
    )


def matched_leaves(
    result: PyTree, structure: TreeStructure, expected: Sequence[jax.Array], function: str, tree: str
) -> Leaves:
    """Returns the array leaves of `result`, if structure, shapes, dtypes and static leaves are those of the tree given.

    A Python number in place of a scalar array is taken as that array. Strong leaves stay strong. On explicit mesh axes
    every leaf returns to the sharding it had.

    Args:
        structure, expected: of the tree that the user's function was given; its array leaves are tracers.
        function, tree: for messages: "step_fn", "state".

    Raises:
        StateError: something of that changed. As PromotionError, if other types of the leaves given can help.
    """
    leaves, treedef = jax.tree_util.tree_flatten(result)
    if treedef != structure.treedef:
        raise StateError(
            f"{function} returned {tree} with another structure: {structure_differences(result, structure)}. The next "
            "step takes what this one returns, so the structure must stay. Return the tree that was given, with new "
            "values in it (dataclasses.replace, state | {...}, .replace(...))."
        )
    static = {position: (path, leaf) for position, path, leaf in structure.static}
    changed = [
        f"{tree}{path} from {_short(before)} to {_short(leaves[position])}"
        for position, (path, before) in static.items()
        if not _same(before, leaves[position])
    ]
    if changed:
        raise _refusal(_promoted_numbers(static, leaves))(
            f"{function} changed leaves that are not arrays: {listed(changed)}. They are constants of the compiled "
            "step, so the change would be lost at the next one. Make a number an array from the start, with "
            "jnp.asarray, or hold the value outside the state."
        )
    given = [leaf for position, leaf in enumerate(leaves) if position not in static]
    arrays = [_array_like(leaf, wanted) for leaf, wanted in zip(given, expected, strict=True)]
    differences = type_differences(tree, structure.paths, arrays, expected)
    positions = [position for position in range(len(leaves)) if position not in static]
    weak = {
        position: jnp.result_type(wanted, array)
        for position, array, wanted in zip(positions, arrays, expected, strict=True)
        if is_weak(wanted) and is_array(array) and not (is_weak(array) and array.dtype == wanted.dtype)
    }
    if weak or differences:
        raise _refusal(weak)(
            f"{function} returned leaves of other types than it was given: {listed(differences)}. The compiled step "
            "writes each state over the previous one, so shapes and dtypes must stay. Look for a broadcast or a "
            "missing reduction, cast with .astype, or make a number an array with jnp.asarray."
        )
    return [
        sharded_as(wanted, array if is_weak(wanted) else strong(array))
        for array, wanted in zip(arrays, expected, strict=True)
    ]


class PromotionError(StateError):
    """The leaves at some positions of the state must have other types from the start, as the carry of `lax.scan` has.

    Attributes:
        dtypes: by the position among all leaves: the dtype of the array to take; None for that of a Python number.
    """

    dtypes: Mapping[int, Any]


def _refusal(dtypes: Mapping[int, Any]) -> Callable[[str], StateError]:
    """Returns what makes the error: one that says which leaves to promote, if any can be."""

    def make(message: str) -> StateError:
        error = PromotionError(message)
        error.dtypes = dtypes
        return error

    return make if dtypes else StateError


def _promoted_numbers(static: Mapping[int, tuple[str, object]], leaves: Sequence[Any]) -> dict[int, Any]:
    """Returns the Python numbers that the function changed, by position, with the dtypes of the arrays for them."""
    found: dict[int, Any] = {}
    for position, (_, before) in static.items():
        after = leaves[position]
        if not isinstance(before, (bool, int, float, complex)) or _same(before, after):
            continue
        if is_array(after) and after.shape == ():
            found[position] = None if is_weak(after) else jnp.result_type(before, after)
        elif isinstance(after, (bool, int, float, complex)):
            found[position] = None
    return found


def check_leaves(
    tree: str, leaves: Sequence[Any], structure: TreeStructure, expected: Sequence[jax.ShapeDtypeStruct]
) -> None:
    """Raises a StateError unless `leaves`, for the tree named `tree`, fit what the step was compiled for."""
    if len(leaves) != len(expected):
        raise StateError(
            f"The step was compiled for {tree} with {len(expected)} array leaves, got {len(leaves)}. What replaces the "
            "state of a run must have the same structure."
        )
    differences = type_differences(tree, structure.paths, leaves, expected) or [
        f"{tree}{path} is on {leaf.sharding} instead of {wanted.sharding}"
        for path, leaf, wanted in zip(structure.paths, leaves, expected, strict=True)
        if not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    ]
    if differences:
        raise StateError(
            f"The step was compiled for another {tree}: {listed(differences)}. What replaces the state of a run must "
            "have the same shapes, dtypes and shardings. Move it with jax.device_put(leaf, sharding) first."
        )


def type_differences(
    tree: str, paths: Sequence[str], given: Sequence[Any], expected: Sequence[Any], *, dtypes: bool = True
) -> list[str]:
    """Lists the leaves of `given` whose shape (and dtype, unless `dtypes` is False) is not the `expected` one."""
    return [
        f"{tree}{path} is {type_of(leaf)} instead of {type_of(wanted)}"
        for path, leaf, wanted in zip(paths, given, expected, strict=True)
        if not is_array(leaf) or leaf.shape != wanted.shape or (dtypes and leaf.dtype != wanted.dtype)
    ]


def structure_differences(tree: PyTree, structure: TreeStructure) -> str:
    """Lists the first paths that `tree` has besides those of `structure`, or lacks."""
    _, after = partition(tree)
    before_paths = {*structure.paths, *(path for _, path, _ in structure.static)}
    after_paths = {*after.paths, *(path for _, path, _ in after.static)}
    found = [f"{path or 'a single leaf'} was added" for path in sorted(after_paths - before_paths)]
    found += [f"{path or 'a single leaf'} is missing" for path in sorted(before_paths - after_paths)]
    return listed(found) or f"{_short(after.treedef)} instead of {_short(structure.treedef)}"


def static_differences(tree: str, before: TreeStructure, after: TreeStructure) -> list[str]:
    """Lists the leaves that are not arrays and differ, of two trees with the same paths."""
    return [
        f"{tree}{path} is {_short(new)} instead of {_short(old)}"
        for (_, path, old), (_, _, new) in zip(before.static, after.static, strict=True)
        if not _same(old, new)
    ]


def _array_like(leaf: Any, wanted: Any) -> Any:
    """Returns an array, or a Python number as the scalar array that `wanted` is; another object as it is."""
    if is_array(leaf):
        return jnp.asarray(leaf)
    if not isinstance(leaf, (bool, int, float, complex)) or wanted.shape != ():
        return leaf
    try:
        fits = jnp.result_type(wanted.dtype, leaf) == wanted.dtype and not _overflows(leaf, wanted.dtype)
        return jnp.asarray(leaf, wanted.dtype) if fits else leaf
    except (OverflowError, TypeError):  # too large, or `wanted` is a PRNG key
        return leaf


def _overflows(number: complex, dtype: Any) -> bool:
    """Whether a finite number would become infinite, of which NumPy and ml_dtypes only warn, or not even that."""
    size = abs(number)
    return jnp.issubdtype(dtype, jnp.inexact) and float(jnp.finfo(dtype).max) < size < math.inf


def sharded_as(wanted: Any, array: jax.Array) -> jax.Array:
    """Returns `array` in the sharding of `wanted`, which on explicit mesh axes is part of the type."""
    sharding = jax.typeof(wanted).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)


def _same(before: object, after: object) -> bool:
    if after is before:
        return True
    try:
        return not is_array(after) and type(after) is type(before) and bool(after == before)
    except Exception:  # an __eq__ that cannot decide: they are not known to be equal
        return False


def _short(value: object) -> str:
    """Returns a repr in one line of at most 200 characters."""
    if is_array(value):
        return f"the array {type_of(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
