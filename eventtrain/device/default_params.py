"""``find_params``: the weights in a state of a common shape, for a trainer without a ``params`` lens.

Names and types decide; nothing is guessed. A part of the state that could be weights or something else (statistics, a
second optimiser's moments, frozen weights) is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.hyperparams import entry_name
from eventtrain.device.state import PyTree, is_array
from eventtrain.errors import ConfigurationError, listed

# Ends of names, behind "_": `opt_state`, `gen_opt`.
OPTIMISERS = ("_opt", "_opt_state", "_optimizer_state", "_optimiser_state")
OTHERS = ("_batch_stats", "_hyper_params", "_hyperparams")


@dataclass(frozen=True, eq=False)
class _Part:
    """A subtree of the state, with what the rules ask about it; `key` is its entry in the container around it."""

    key: Any
    node: PyTree
    parts: tuple[_Part, ...]
    is_named: bool
    has_named: bool
    has_floats: bool
    has_optimiser: bool


def find_params(state: PyTree) -> PyTree:
    """Returns the weights in `state`, as subtrees of it. Reads no array; may be traced.

    1. In any container, the entry or attribute named `params`. It hides the other entries.
    2. Without one: all entries with a name that ends in `_params`, all `nnx.Param` variables of Flax, and what these
       rules find further inside, as a dict by name.
    3. Without any of these: the only part beside an optimiser state, or the only array of floats; for several
       optimisers, the one beside each.

    Optimiser states (types of optax; `opt_state`, `opt`, `gen_opt`), statistics (`batch_stats`, other variables of
    Flax NNX, `eqx.nn.State`), `hyperparams`, and parts without floating-point numbers (counters, keys) are not weights.

    Raises:
        ConfigurationError: another part is left, or there are no weights; the message lists what was found.
    """
    if isinstance(state, Mapping):
        if "params" in state:
            return state["params"]  # pyright: ignore[reportUnknownVariableType]
    elif hasattr(state, "params"):
        return state.params
    return _find(_part(None, state), "")


def _find(container: _Part, path: str) -> PyTree:
    if not container.parts:
        return container.node
    weights: dict[Any, Any] = {}
    left: list[tuple[str, _Part]] = []
    for part in container.parts:
        if entry_name(part.key) == "params":
            return part.node
    for part in container.parts:
        name, place = entry_name(part.key), path + jax.tree_util.keystr((part.key,))
        if part.is_named:
            weights[name] = part.node
        elif part.has_named:
            weights[name] = _find(part, place)
        elif not part.has_floats:
            continue
        # Where a name decides, a tuple of optax states and others may be the state of one chained optimiser.
        elif part.has_optimiser and not container.has_named:
            weights[name] = _find(part, place)
        else:
            left.append((place, part))
    has_optimiser = container.has_optimiser
    if not weights and len(left) == 1 and (has_optimiser or not left[0][1].parts):
        return left[0][1].node
    if left or not weights:
        found = [f"state{place} ({'tree' if part.parts else 'array'})" for place, part in left]
        raise ConfigurationError(
            "the state does not say which of its arrays are the weights: "
            f"{'beside' if has_optimiser else 'without'} an optimiser state it has {listed(found) or 'no floats'}. "
            "Pass Trainer(params=lambda state: ...) that returns the weights in the state; if all of it is weights, "
            "params=lambda state: state."
        )
    # Without its place beside the optimiser, so that it is the tree that the user knows as the weights.
    return next(iter(weights.values())) if len(weights) == 1 and has_optimiser else weights


def _part(key: Any, node: PyTree) -> _Part:
    name = "" if key is None else f"_{entry_name(key)}"
    is_optimiser = type(node).__module__.split(".")[0] == "optax" or name.endswith(OPTIMISERS)
    is_named = name.endswith("_params") or _is_variable(node, "Param")
    parts: tuple[_Part, ...] = ()
    if not (is_optimiser or name.endswith(OTHERS) or _is_statistics(node)):
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
        parts = tuple(_part(path[0], child) for path, child in children if path)
        is_float = isinstance(node, (float, complex)) or (
            is_array(node) and bool(jnp.issubdtype(node.dtype, jnp.inexact))
        )
    else:
        is_named = is_float = False
    return _Part(
        key,
        node,
        parts,
        is_named,
        has_named=is_named or any(part.has_named for part in parts),
        has_floats=is_float or any(part.has_floats for part in parts),
        has_optimiser=is_optimiser or any(part.has_optimiser for part in parts),
    )


def _is_statistics(node: Any) -> bool:
    kind = type(node)
    if kind.__name__ == "State" and kind.__module__.startswith("equinox.nn"):
        return True
    return _is_variable(node, "Variable") and not _is_variable(node, "Param")


def _is_variable(node: Any, name: str) -> bool:
    """Whether it is a variable of Flax NNX of this class; by names, since Flax need not be installed."""
    kind = type(node)
    if kind.__name__ == "VariableState":  # in the state that nnx.split of older versions returns
        kind = getattr(node, "type", kind)
    return any(base.__name__ == name and base.__module__.startswith("flax.nnx") for base in kind.__mro__)
