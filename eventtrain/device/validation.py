"""What step_fn and its siblings promise, checked while JAX traces them.

Everything here runs once a compilation, on the thread that traces, and costs the step nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from eventtrain.device.state import PyTree, Skeleton, TreeDef, is_array, partition, strong
from eventtrain.errors import StateError, StepError

__all__ = ["call_user", "check_leaves", "describe", "matched_leaves", "state_and_metrics"]


def call_user(where: str, function: Callable[..., Any], *args: object) -> Any:
    """Call a function of the user's; what it raises becomes a StepError that names `where`."""
    try:
        return function(*args)
    except Exception as error:
        raise StepError(f"{where} raised {type(error).__name__}: {error}") from error


def state_and_metrics(result: object) -> tuple[PyTree, Mapping[str, Any]]:
    """`result` of step_fn, if it is the pair `(state, metrics)`; otherwise a StepError."""
    if isinstance(result, tuple) and len(result) == 2:  # pyright: ignore[reportUnknownArgumentType]
        state, metrics = result  # pyright: ignore[reportUnknownVariableType]
        return state, metrics
    given = type(result).__name__
    if isinstance(result, tuple):
        given += f" of {len(result)}"  # pyright: ignore[reportUnknownArgumentType]
    raise StepError(
        f"step_fn returned {given} instead of a pair: the next step needs the new state, and events "
        "need the metrics. End it with `return state, {'loss': loss}`; without metrics, an empty "
        "dict."
    )


def matched_leaves(
    result: PyTree, skeleton: Skeleton, expected: Sequence[Any], subject: str
) -> list[jax.Array]:
    """The array leaves of `result`, if it has the structure, shapes and dtypes it had before.

    Args:
        result: what the user's function returned in place of the tree it was given.
        skeleton: of the tree given; its static leaves must come back unchanged.
        expected: its array leaves, or tracers or `jax.ShapeDtypeStruct` like them.
        subject: what returned it, for the message: "step_fn returned state".

    A Python number in place of a scalar array is taken as that array; weak types become strong; on
    explicit mesh axes every leaf goes back to the sharding it had.

    Raises:
        StateError: names the first leaf that differs, both kinds, and the remedy.
    """
    leaves, treedef = jax.tree_util.tree_flatten(result)
    if treedef != skeleton.treedef:
        raise StateError(_structure_message(result, skeleton, treedef, subject))
    static = {position: (path, leaf) for position, path, leaf in skeleton.static}
    arrays = iter(zip(skeleton.paths, expected, strict=True))
    matched: list[jax.Array] = []
    for position, leaf in enumerate(leaves):
        if position in static:
            _check_static(leaf, *static[position], subject)
        else:
            matched.append(_matched(leaf, *next(arrays), subject))
    return matched


def check_leaves(leaves: Sequence[Any], skeleton: Skeleton, expected: Sequence[Any]) -> None:
    """Raise a StateError unless `leaves` have the shapes, dtypes and shardings `expected`."""
    if len(leaves) != len(expected):
        raise StateError(
            f"The state has {len(leaves)} array leaves, but the step was compiled for "
            f"{len(expected)}. A state put in place of another must have the same structure."
        )
    for path, leaf, wanted in zip(skeleton.paths, leaves, expected, strict=True):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise StateError(
                f"state{path} is {describe(leaf)}, but the step was compiled for "
                f"{describe(wanted)}. A state put in place of another must have the same shapes "
                "and dtypes."
            )
        if not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim):
            raise StateError(
                f"state{path} lies at {leaf.sharding}, but the step was compiled for "
                f"{wanted.sharding}. Move it there first with jax.device_put."
            )


def describe(leaf: Any) -> str:
    """`dtype[shape]` of an array, as JAX writes it: `float32[3,4]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _matched(leaf: Any, path: str, wanted: Any, subject: str) -> jax.Array:
    if not is_array(leaf):
        number = _as_scalar(leaf, wanted)
        if number is None:
            raise StateError(
                f"{subject}{path} as {type(leaf).__name__}, but was given {describe(wanted)}: the "
                f"state must keep its arrays. Return jnp.asarray(..., jnp.{wanted.dtype}) there."
            )
        return _sharded_as(wanted, number)
    array = jnp.asarray(leaf)
    if array.shape != wanted.shape:
        raise StateError(
            f"{subject}{path} as {describe(array)}, but was given {describe(wanted)}: the compiled "
            "step writes each state over the one before, so shapes must stay. Look for a "
            "broadcast or a missing reduction where it is updated."
        )
    if array.dtype != wanted.dtype:
        raise StateError(
            f"{subject}{path} as {describe(array)}, but was given {describe(wanted)}: the compiled "
            "step writes each state over the one before, so dtypes must stay. Cast the result with "
            f".astype(jnp.{wanted.dtype}), or start with a state of dtype {array.dtype}."
        )
    return _sharded_as(wanted, strong(array))


def _sharded_as(wanted: Any, array: jax.Array) -> jax.Array:
    """On a mesh with explicit axes the sharding is part of a type, and the type must stay too."""
    sharding = jax.typeof(wanted).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)


def _as_scalar(leaf: object, wanted: Any) -> jax.Array | None:
    """A Python number as the scalar array it stands for, if `wanted` is one that can hold it."""
    if not isinstance(leaf, (bool, int, float, complex)) or wanted.shape != ():
        return None
    try:
        fits = jnp.result_type(wanted.dtype, leaf) == wanted.dtype
        return jnp.asarray(leaf, wanted.dtype) if fits else None
    except (OverflowError, TypeError):  # too large, or `wanted` is a PRNG key
        return None


def _check_static(leaf: object, path: str, before: object, subject: str) -> None:
    if leaf is before:
        return
    if not is_array(leaf) and type(leaf) is type(before):
        try:
            if leaf == before:
                return
        except Exception:  # an __eq__ that cannot decide: then they are not known to be equal
            pass
    if is_array(leaf):
        changed = f"turned the {type(before).__name__} {before!r} into {describe(leaf)}"
    else:
        changed = f"changed it from {before!r} to {leaf!r}"
    raise StateError(
        f"{subject}{path}, which is no array, and {changed}: such leaves are constants of the "
        "compiled step, so the change would be lost at the next one. Make it an array from the "
        f"start, with jnp.asarray({before!r})."
        if isinstance(before, (bool, int, float, complex))
        else f"{subject}{path}, which is no array, and {changed}: such leaves are constants of the "
        "compiled step and must come back as they were. Keep it, or hold it outside the state."
    )


def _structure_message(result: PyTree, skeleton: Skeleton, treedef: TreeDef, subject: str) -> str:
    _, after = partition(result)
    before_paths = {*skeleton.paths, *(path for _, path, _ in skeleton.static)}
    after_paths = {*after.paths, *(path for _, path, _ in after.static)}
    found = [f"{path} appeared" for path in sorted(after_paths - before_paths)]
    found += [f"{path} vanished" for path in sorted(before_paths - after_paths)]
    if found:
        listed = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    else:
        listed = f"it was {_short(skeleton.treedef)} and is {_short(treedef)}"
    return (
        f"{subject} with another structure: {listed or 'it is empty'}. Each step hands its state "
        "to the next one, so the structure must stay. Return the tree that was given, with new "
        "values in it (dataclasses.replace, state | {...}, .replace(...))."
    )


def _short(treedef: TreeDef, limit: int = 300) -> str:
    text = str(treedef)
    return text if len(text) <= limit else text[:limit] + "..."
