"""`BatchSharding`: on which devices the parts of a batch go, so that each device computes its own part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from eventtrain.device.state import PyTree
from eventtrain.errors import ConfigurationError, DataError

_logger = logging.getLogger(__name__)


class BatchSharding:
    """The sharding of each array of a batch: `Trainer(batch_sharding=...)`. Any thread.

    An array that the devices cannot share equally, as in a short last batch, goes to each of them whole: the results
    are the same. The first one is logged, since with a badly chosen batch size it would be every batch.

    Args:
        given: a `NamedSharding`, or a pytree of them whose structure is a prefix of that of the batches.

    Attributes:
        replicated: for what each device gets whole.

    Raises:
        ConfigurationError: `given` is something else, or names several meshes.
    """

    def __init__(self, given: PyTree) -> None:
        self._shardings, self._prefix = jax.tree_util.tree_flatten(given)
        others = [type(one).__name__ for one in self._shardings if not isinstance(one, NamedSharding)]
        if others or not self._shardings:
            raise ConfigurationError(
                "Trainer: batch_sharding must be a NamedSharding, such as NamedSharding(mesh, PartitionSpec('data')), "
                f"or a pytree of them, got {others[0] if others else 'no sharding'}."
            )
        meshes = {one.mesh for one in self._shardings}
        if len(meshes) > 1:
            raise ConfigurationError("Trainer: the shardings in batch_sharding must be of one mesh.")
        self.replicated = NamedSharding(meshes.pop(), PartitionSpec())
        self._known: dict[Any, list[Sharding]] = {}
        self._warned = False

    def of(self, leaves: Sequence[Any], treedef: Any, *, stacked: bool = False) -> list[Sharding]:
        """Returns the sharding of each leaf of a batch.

        Args:
            stacked: the leaves have those of several batches, counted by their first axis.

        Raises:
            DataError: the batch has another structure than `batch_sharding`.
        """
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        key = treedef, shapes, stacked
        if key not in self._known:
            given = self._broadcast(treedef, len(shapes))
            self._known[key] = [
                self._fitted(one, shape, stacked) for one, shape in zip(given, shapes, strict=True)
            ]
        return self._known[key]

    def _broadcast(self, treedef: Any, count: int) -> list[NamedSharding]:
        numbered = jax.tree_util.tree_unflatten(treedef, range(count))
        try:
            parts = self._prefix.flatten_up_to(numbered)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"Trainer(batch_sharding=...) has the structure {self._prefix}, which is not that of the batch, "
                f"{treedef}, or a prefix of it. Pass one sharding for all, or a tree like the batch."
            ) from error
        found: dict[int, NamedSharding] = {}
        for sharding, part in zip(self._shardings, parts, strict=True):
            found |= dict.fromkeys(jax.tree_util.tree_leaves(part), sharding)
        return [found[index] for index in range(count)]

    def _fitted(self, sharding: NamedSharding, shape: tuple[int, ...], stacked: bool) -> Sharding:
        axes = (None, *sharding.spec) if stacked else tuple(sharding.spec)
        if len(shape) < len(axes):
            return self.replicated
        fitted = NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)
        try:
            fitted.shard_shape(shape)
        except ValueError:
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "The %d devices of batch_sharding cannot share an array of shape %s equally, so each of them "
                    "computes all of it, as of others like it. Choose another batch size, or leave out a short last "
                    "batch (ArrayLoader: drop_last=True).",
                    sharding.mesh.size, shape[1:] if stacked else shape,
                )  # fmt: skip
            return self.replicated
        return fitted
