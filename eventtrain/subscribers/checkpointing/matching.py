"""``take_matching``: the arrays of a saved state that a changed model can use. Blocking; any thread."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.errors import ConfigurationError, StateError, listed
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.subscribers.checkpointing.directory import Committed
from eventtrain.subscribers.checkpointing.manifest import (
    STATE,
    named_leaves,
    named_numbers,
    path_name,
    read_manifest,
)
from eventtrain.subscribers.checkpointing.reader import SavedCheckpoint, fits, on_devices, shown
from eventtrain.validation.annotations import checked

logger = logging.getLogger("eventtrain")


@checked
def take_matching(
    saved: Any, like: Any, part: Literal["all", "params"] = "all"
) -> tuple[Any, dict[str, str]]:
    """Takes what a changed model can use of a saved state: the arrays with the same path, shape and dtype.

    For a new head, another optimiser, one more layer. Logs what is left. Blocks; any thread.

    Args:
        saved: path of a committed checkpoint, of which only what fits is read. Or a state; or a dict from path to
            array, as ``load_state(path)`` returns it, for example with some of the paths renamed.
        like: the new state, which stays as it is. Its arrays determine device and sharding, as for ``load_state``.
        part: "params": ``like`` are the params alone, to be taken from the params of the checkpoint, which
            ``Trainer(params=...)`` has selected.

    Returns:
        ``like`` with the arrays that fit in place of its own, and path -> reason of everything that was left: arrays of
        ``like`` that keep their value, and saved ones that it has no place for.

    Raises:
        SnapshotError: ``saved`` is not a checkpoint, or it is damaged. StateError: nothing fits, or an abstract array
            of ``like`` gets no value. ConfigurationError: ``part="params"`` without a checkpoint.
    """
    if isinstance(saved, (str, Path)):
        path = local_path(saved, "take_matching").absolute()
        checkpoint = SavedCheckpoint(Committed(path, read_manifest(path)))
        known, params = checkpoint.manifest.arrays.get(STATE, {}), checkpoint.manifest.params
        places = params if part == "params" else {path: path for path in known}
        taken, left = _compare(like, {path: known[place].type() for path, place in places.items()})
        _require_any(taken, left)
        checkpoint.read_state([places[path] for path in taken])
        values = checkpoint.values(STATE, {path: (places[path], leaf) for path, leaf in taken.items()})
    elif part == "params":
        raise ConfigurationError(
            "take_matching(part='params') requires the path of a checkpoint, which knows its params, got "
            f"{type(saved).__name__}. Pass the params of both states as they are."
        )
    else:
        by_path = isinstance(saved, Mapping) and not named_leaves(like).keys().isdisjoint(saved)
        arrays: dict[str, Any] = dict(saved) if by_path else named_leaves(saved)
        there = {path: array for path, array in arrays.items() if hasattr(array, "dtype")}
        taken, left = _compare(like, there)
        _require_any(taken, left)
        values = {path: _placed(there[path], leaf) for path, leaf in taken.items()}
    if empty := [path for path in left if isinstance(named_leaves(like).get(path), jax.ShapeDtypeStruct)]:
        raise StateError(
            f"take_matching: {listed(empty)} of `like` would be left without a value. Pass arrays in place of these "
            "abstract ones."
        )
    if left:
        logger.warning(
            "take_matching took %d arrays. Left: %s",
            len(taken), listed([f"{path}: {reason}" for path, reason in left.items()], 15),
        )  # fmt: skip
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: values.get(path_name(jax.tree_util.keystr(path)), leaf), like
    )
    return state, left


def _compare(like: Any, there: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the leaves of ``like`` that can be taken from arrays (or types) by path, and why others cannot."""
    numbers = {path: leaf for path, leaf in named_numbers(like).items() if path in there}
    taken: dict[str, Any] = {}
    left: dict[str, str] = {}
    for path, leaf in {**named_leaves(like), **numbers}.items():
        if path not in there:
            left[path] = "not saved"
        elif fits(there[path], leaf):
            taken[path] = leaf
        else:
            left[path] = f"{shown(there[path])} saved, {shown(leaf)} wanted"
    return taken, left | {path: "not wanted" for path in there if path not in taken and path not in left}


def _require_any(taken: Mapping[str, Any], left: Mapping[str, str]) -> None:
    if not taken:
        found = listed([f"{path}: {reason}" for path, reason in left.items()], 6) or "it is empty"
        raise StateError(
            f"take_matching: nothing of the saved state fits `like` ({found}). Paths must be equal: pass a whole "
            "state, part='params' with the params alone, or a dict with renamed paths."
        )


def _placed(value: Any, like: Any) -> Any:
    """Returns an array that fits as one like ``like``."""
    if isinstance(like, (np.ndarray, np.generic)):
        return np.asarray(value)
    sharding = getattr(like, "sharding", None)
    if isinstance(value, jax.Array):
        if sharding is None or value.sharding == sharding:
            return value
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = on_devices(np.asarray(jax.random.key_data(value)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return on_devices(np.asarray(value), sharding)
