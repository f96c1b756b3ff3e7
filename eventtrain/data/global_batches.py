"""Batches as arrays over the devices of several processes, of which each process makes its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from eventtrain.data.sources import Batch
from eventtrain.errors import DataError

Block = np.ndarray[Any, Any]


def global_array(shape: tuple[int, ...], sharding: Sharding, rows: Callable[[slice], Block]) -> jax.Array:
    """Returns an array of which ``rows(part)`` makes a part of the first axis, for the devices of this process only.

    Communicates nothing. A part that several devices have is made once, in new memory, which JAX may take over.
    Raises what JAX raises if ``sharding`` does not fit ``shape``.
    """
    made: dict[tuple[int, int, int], Block] = {}

    def block(index: Any) -> Block:  # a tuple of slices
        part = index[0].indices(shape[0])
        if part not in made:
            made[part] = rows(slice(*part))
        return made[part][(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, block)


def require_global(batch: Batch, subject: str) -> None:
    """Raises DataError for a NumPy array in ``batch``, or one of jax.numpy, in a run of several processes.

    A compiled step would take it for the same on every process, and each one would train on other data.

    Args:
        batch: any pytree. Python numbers, scalars of jax.numpy and keys are taken for equal on every process.
        subject: where the batch comes from, with a verb: "The evaluation data yields".
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if isinstance(leaf, (np.ndarray, np.generic)) or _is_uncommitted(leaf):
            where = f"batch{jax.tree_util.keystr(path)}"
            what = "arrays of one process" if isinstance(leaf, jax.Array) else "NumPy arrays"
            raise DataError(
                f"{subject} {what} ({where}: {leaf.dtype}{list(leaf.shape)}), and the run has "
                f"{jax.process_count()} JAX processes: that does not tell whether it is the whole batch or the part of "
                "this process. Pass et.ArrayLoader(arrays, batch_size, sharding=sharding) with a "
                "NamedSharding(mesh, PartitionSpec('data')), or make each batch of the part of this process by "
                "jax.make_array_from_process_local_data(sharding, part)."
            )


def _is_uncommitted(leaf: object) -> bool:
    """Whether it is an array as ``jnp.asarray`` makes it, which a compiled step would move to all devices."""
    return (
        isinstance(leaf, jax.Array)
        and not leaf.committed
        and leaf.ndim > 0
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
