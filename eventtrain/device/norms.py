"""Norms of the parts of a tree, for the metrics of a step_fn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.hyperparams import entry_name
from eventtrain.device.state import PyTree, is_array
from eventtrain.errors import ConfigurationError
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count


@checked
def norms(tree: Any, *, prefix: str = "norm/", depth: int = 2) -> dict[str, jax.Array]:
    """Returns the L2 norm of each part of `tree`, such as the gradients: for the metrics of a step_fn. May be traced.

    Args:
        tree: any pytree, of which the floating-point and complex arrays count.
        prefix: of the names, such as "grad_norm/".
        depth: how many levels of the tree make a name: "grad_norm/encoder/layer_0" has two. What is further inside is
            one part. With 0 there is one norm, that of the whole tree, named as `prefix` without its "/".

    Returns:
        Name -> norm, of shape (), in float32; float64 where a part has float64.

    Raises:
        ConfigurationError: the tree has no such array, or `depth` is negative.
    """
    require_count("norms", "depth", depth, at_least=0)
    paths, leaves = _floats("norms", tree)
    return {
        f"{prefix}{name}" if name else prefix.rstrip("/"): _norm(leaves[index] for index in indices)
        for name, indices in _parts(paths, depth).items()
    }


def _floats(subject: str, tree: PyTree) -> tuple[list[Any], list[Any]]:
    """Returns the paths and leaves of the floating-point and complex arrays."""
    found = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not found:
        raise ConfigurationError(
            f"{subject}: the tree has no floating-point array, so it has no norm. Pass the gradients, the updates or "
            "the params."
        )
    return [path for path, _ in found], [leaf for _, leaf in found]


def _parts(paths: list[Any], depth: int) -> dict[str, Any]:
    """Returns name -> indices of its leaves, for names of `depth` levels."""
    parts: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        parts.setdefault("/".join(str(entry_name(key)) for key in path[:depth]), []).append(index)
    return dict(parts)


def _norm(leaves: Iterable[Any]) -> jax.Array:
    squares = [jnp.sum(jnp.square(jnp.abs(_widened(leaf)))) for leaf in leaves]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _widened(leaf: Any) -> jax.Array:
    """Returns `leaf` in a dtype in which its squares do not overflow and add up."""
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
