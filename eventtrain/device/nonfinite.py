"""The counters of `optax.apply_if_finite` as metrics: how many updates were skipped, and whether the last one was."""

from __future__ import annotations

from typing import Any

import jax

from eventtrain.device.state import PyTree
from eventtrain.errors import ConfigurationError

__all__ = ["nonfinite_metrics"]

_COUNTERS = ("notfinite_count", "total_notfinite", "last_finite")


def nonfinite_metrics(opt_state: PyTree, *, prefix: str = "") -> dict[str, jax.Array]:
    """The counters of `optax.apply_if_finite` in `opt_state`, at any depth; for the metrics of a step_fn.

    Of the state that `update` returned they include the present step. Names are optax's, behind `prefix`:
    `notfinite_count` (int32), updates in a row, up to this one, with a NaN or an infinity; `total_notfinite` (int32),
    such updates since the start; `last_finite` (bool), whether this one had none. All of shape (). May be traced.

    Raises:
        ConfigurationError: there is no such state, or more than one.
    """
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_counts)[0]
    found = [(jax.tree_util.keystr(path), node) for path, node in nodes if _counts(node)]
    if not found:
        raise ConfigurationError(
            "nonfinite_metrics: opt_state holds no state of optax.apply_if_finite, so nobody counts. Wrap the "
            "optimiser, as in optax.apply_if_finite(optax.adam(1e-3), max_consecutive_errors=5), and pass its state."
        )
    if len(found) > 1:
        paths = ", ".join(f"opt_state{path}" for path, _ in found)
        raise ConfigurationError(
            f"nonfinite_metrics: opt_state holds {len(found)} states of optax.apply_if_finite, at {paths}. Call it for "
            "each of them, with a prefix of its own."
        )
    ((_, state),) = found
    return {f"{prefix}{name}": getattr(state, name) for name in _COUNTERS}


def _counts(node: Any) -> bool:
    """Whether `node` is the state of apply_if_finite: known by its names, as importing optax takes a while."""
    return all(hasattr(node, name) for name in _COUNTERS)
