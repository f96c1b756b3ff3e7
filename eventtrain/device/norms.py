"""Norms of the parts of a tree: `norms` for the metrics of a step_fn, and the step extension `UpdateNorms`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.extensions import StepChange, StepExtension, if_due
from eventtrain.device.hyperparams import entry_name
from eventtrain.device.reductions import Mean
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


class UpdateNorms(StepExtension):
    """Metrics of every N-th step: the L2 norms of the params and of their update, and the ratio of both.

    They are named `param_norm`, `update_norm` and `update_ratio` (update to param), for all params, and
    `update_norm/encoder` for a part. Other steps do not have them, and means are those of the steps that do. A ratio
    far below 1e-3 says that a layer hardly learns, one far above it that the learning rate is too high for it.

    The steps between run a program without it, so that they cost nothing; a second program is compiled before the first
    step. With ``steps_per_call`` above 1 there is one program, which copies the params at every step.

    Args:
        every: N. The norms are those of the steps N, 2N and so on.
        depth: how many levels of the params make the name of a part, as for `norms`; 0: no parts.
        name: unique among the extensions of one trainer.

    Raises:
        ConfigurationError: `every` is not an integer >= 1, or `depth` is not one >= 0.
    """

    @checked
    def __init__(self, every: int = 100, *, depth: int = 0, name: str = "update_norms") -> None:
        require_count("UpdateNorms", "every", every, at_least=1)
        require_count("UpdateNorms", "depth", depth, at_least=0)
        self.every = every
        self.depth = depth
        self.name = name

    def __repr__(self) -> str:
        return f"UpdateNorms({self.every!r}, depth={self.depth!r}, name={self.name!r})"

    def is_due(self, step: int) -> bool:
        """Whether the step has norms."""
        return step % self.every == 0

    def after_step(self, ext_state: PyTree, change: StepChange) -> tuple[PyTree, dict[str, Any]]:
        """Returns the state as it is, and the metrics, NaN where they are not due."""
        paths, leaves = _floats(repr(self), change.params)
        both = [*_floats(repr(self), change.old_params)[1], *leaves]
        parts = _parts(paths, self.depth)
        if self.depth:
            parts = {"": range(len(leaves)), **parts}
        count = len(leaves)

        def measured(_: list[Any], both: list[Any]) -> list[Any]:
            before, after = both[:count], both[count:]
            updates = [_widened(new) - _widened(old) for old, new in zip(before, after, strict=True)]
            return [
                _norm(arrays[index] for index in indices)
                for arrays in (after, updates)
                for indices in parts.values()
            ]

        absent = [
            jnp.full(one.shape, jnp.nan, one.dtype) for one in jax.eval_shape(lambda: measured([], both))
        ]
        values = if_due(change.step % self.every == 0, measured, absent, both)
        metrics: dict[str, Any] = {}
        for name, param, update in zip(parts, values, values[len(parts) :], strict=False):
            end = f"/{name}" if name else ""
            ratio = update / jnp.maximum(param, jnp.finfo(param.dtype).tiny)
            for kind, value in (("param_norm", param), ("update_norm", update), ("update_ratio", ratio)):
                metrics[kind + end] = Mean(value)
        return ext_state, metrics


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
