"""Groups of batches for the calls of the compiled step, made from the batches of the user's data.

- A small batch of NumPy arrays is handed to the compiled call as it is: JAX transfers it in the call for 6 us, where a
  ``device_put`` of its own takes 67 us. A larger one is transferred by one ``device_put``, ahead of its step.
- NumPy arrays are copied first, since JAX may alias their memory (24 of 50 batches on a CPU) or read it late, and an
  iterator may fill one buffer again and again. Memory that the data gives away, as ``ArrayLoader`` does, is not.
- The NumPy batches of a call with several steps are stacked on the host: one argument instead of many, which the step
  indexes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from eventtrain.data.global_batches import require_global
from eventtrain.data.sources import Batch
from eventtrain.device.batch_sharding import BatchSharding
from eventtrain.device.fused_step import StackedBatches
from eventtrain.device.placement import put_all, put_each

SMALL_BYTES = 256 * 1024
"""The largest batch that is handed to the compiled call as it is, and of which many may wait."""


@dataclass(slots=True, eq=False)
class BatchGroup:
    """Batches for one call, of which the first `steps` are to be trained on.

    Attributes:
        call: what the compiled step is called with: the batch itself, or for `steps_per_call=K` a tuple of K batches
            or a `StackedBatches`. None if there are no batches to compile for.
        positions: item i is what the data iterator's `get_state()` returned right after batch i, or None if it has no
            such method.
    """

    call: Any
    steps: int
    positions: tuple[Any, ...]
    grouped: bool = False

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        """Returns one of the batches. Waits for the device if the group was stacked and transferred."""
        if not self.grouped:
            return self.call
        if isinstance(self.call, StackedBatches):
            return jax.tree.map(lambda leaf: np.asarray(leaf)[index], self.call.batches)
        return self.call[index]

    def pairs(self) -> list[tuple[Batch, Any]]:
        """Returns each batch with the position after it."""
        return [(self[index], position) for index, position in enumerate(self.positions)]

    @property
    def batch_bytes(self) -> int:
        """Size of one batch."""
        total = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree_util.tree_leaves(self.call))
        if isinstance(self.call, StackedBatches):
            return total // jax.tree_util.tree_leaves(self.call)[0].shape[0]
        return total // len(self.call) if self.grouped else total


@dataclass(slots=True, eq=False)
class _Open:
    """A group that is being filled: `stacked` holds its NumPy leaves, if it has no others."""

    treedef: Any
    kinds: list[Any]
    stacked: list[np.ndarray] | None
    batches: list[Batch] = field(default_factory=list[Batch])
    positions: list[Any] = field(default_factory=list[Any])


class GroupMaker:
    """Makes the groups of `size` batches. One thread at a time, in whose 64-bit mode arrays get their dtypes.

    A group also ends where the next batch has another structure, shape or dtype, since one call needs them alike.

    Args:
        size: batches in a group: `steps_per_call`.
        sharding: of NumPy leaves on the device; None is JAX's default device. Other leaves stay as they are.
        gives_memory: the data makes new NumPy arrays for each batch, and does not keep them.
    """

    def __init__(
        self, size: int, sharding: jax.sharding.Sharding | None = None, *, gives_memory: bool = False
    ) -> None:
        self._size = size
        self._sharding = sharding
        self._gives_memory = gives_memory
        # A call does not replicate its arguments, and may transfer none under a transfer guard of the user's.
        guard: Any = jax.config.jax_transfer_guard_host_to_device  # pyright: ignore[reportAttributeAccessIssue]
        replicates = sharding is not None and len(sharding.device_set) > 1
        self.most_on_host = 0 if replicates or guard not in (None, "allow") else SMALL_BYTES
        """Size in bytes up to which a batch stays on the host, for the call to transfer it."""
        self._dtypes: dict[Any, Any] = {}
        self._open: _Open | None = None

    def add(self, batch: Batch, position: Any = None) -> list[BatchGroup]:
        """Returns the groups that are whole now, none to two."""
        leaves, treedef = jax.tree_util.tree_flatten(batch)
        if self._size == 1:
            if self._take_in(leaves, treedef):
                batch = jax.tree_util.tree_unflatten(treedef, leaves)
            return [BatchGroup(batch, 1, (position,))]
        kinds = [self._kind(leaf) for leaf in leaves]
        whole: list[BatchGroup] = []
        if self._open is not None and (self._open.treedef, self._open.kinds) != (treedef, kinds):
            whole += self.take()
        if self._open is None:
            on_host = bool(leaves) and all(self._dtype(leaf) is not None for leaf in leaves)
            stacked = (
                [np.empty((self._size, *shape), dtype) for _, shape, dtype in kinds] if on_host else None
            )
            self._open = _Open(treedef, kinds, stacked)
        group = self._open
        if group.stacked is not None:
            for stack, leaf in zip(group.stacked, leaves, strict=True):
                stack[len(group.positions)] = leaf
        else:
            self._take_in(leaves, treedef)
            group.batches.append(jax.tree_util.tree_unflatten(treedef, leaves))
        group.positions.append(position)
        return whole + (self.take() if len(group.positions) == self._size else [])

    def take(self) -> list[BatchGroup]:
        """Returns the group that is not full yet, if there is one. A tuple is padded by repeating its last batch."""
        group, self._open = self._open, None
        if group is None:
            return []
        steps = len(group.positions)
        if group.stacked is not None:
            leaves: list[Any] = group.stacked
            if sum(leaf.nbytes for leaf in leaves) > self.most_on_host:
                leaves = self._put_stacked(leaves, group.treedef)
            call: Any = StackedBatches(jax.tree_util.tree_unflatten(group.treedef, leaves))
        else:
            call = tuple(group.batches + group.batches[-1:] * (self._size - steps))
        return [BatchGroup(call, steps, tuple(group.positions), grouped=True)]

    def sample(self, batches: list[Batch]) -> BatchGroup:
        """Returns a group without steps, to compile for: of the first batch, if there is one."""
        for batch in batches[:1]:
            group = (self.add(batch) + self.take())[0]
            return BatchGroup(group.call, 0, (), group.grouped)
        return BatchGroup(None, 0, ())

    def place(self, batch: Batch) -> Batch:
        """Returns `batch` with its leaves as the step gets them."""
        leaves, treedef = jax.tree_util.tree_flatten(batch)
        self._take_in(leaves, treedef)
        return jax.tree_util.tree_unflatten(treedef, leaves)

    def _take_in(self, leaves: list[Any], treedef: Any) -> bool:
        """Replaces NumPy leaves by what the step gets. Returns whether there were any."""
        size_bytes = 0
        on_host: list[int] = []
        for index, leaf in enumerate(leaves):
            dtype = self._dtype(leaf)
            if dtype is not None:
                copied = np.asarray(leaf, dtype) if self._gives_memory else np.array(leaf, dtype)
                leaves[index] = copied
                size_bytes += copied.nbytes
                on_host.append(index)
        if size_bytes > self.most_on_host:
            moved = self._put([leaves[index] for index in on_host], on_host, leaves, treedef)
            for index, leaf in zip(on_host, moved, strict=True):
                leaves[index] = leaf
        return bool(on_host)

    def _put(self, values: list[Any], indices: list[int], leaves: list[Any], treedef: Any) -> list[jax.Array]:
        """Returns some of the leaves of a batch on the device."""
        return put_all(values, self._sharding)

    def _put_stacked(self, leaves: list[Any], treedef: Any) -> list[Any]:
        """Returns the stacked leaves of several batches on the device."""
        return put_all(leaves, self._sharding)

    def _dtype(self, leaf: Any) -> Any:
        """Returns the dtype on the device of a NumPy leaf; None for other leaves."""
        if not isinstance(leaf, (np.ndarray, np.generic)):
            return None
        given: Any = leaf.dtype
        try:
            return self._dtypes[given]
        except KeyError:
            is_number = given.kind not in "OSUMm" and given.names is None
            self._dtypes[given] = jax.dtypes.canonicalize_dtype(given) if is_number else None
            return self._dtypes[given]

    def _kind(self, leaf: Any) -> tuple[Any, ...]:
        """Returns what a leaf must have in common with those of the other batches of a call."""
        dtype = self._dtype(leaf)
        if dtype is not None:
            return np.ndarray, leaf.shape, dtype
        if isinstance(leaf, jax.Array):
            return leaf.sharding, leaf.shape, leaf.dtype
        return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


class GroupMakerOfSplitBatches(GroupMaker):
    """Makes the groups where each device gets its part of a batch: NumPy arrays, and arrays of no committed place."""

    def __init__(self, size: int, split: BatchSharding, *, gives_memory: bool = False) -> None:
        super().__init__(size, split.replicated, gives_memory=gives_memory)
        self._split = split

    def _take_in(self, leaves: list[Any], treedef: Any) -> bool:
        super()._take_in(leaves, treedef)
        others = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not leaf.committed]
        moved = self._put([leaves[index] for index in others], others, leaves, treedef)
        for index, leaf in zip(others, moved, strict=True):
            leaves[index] = leaf
        return True

    def _put(self, values: list[Any], indices: list[int], leaves: list[Any], treedef: Any) -> list[jax.Array]:
        shardings = self._split.of(leaves, treedef)
        return put_each(values, [shardings[index] for index in indices])

    def _put_stacked(self, leaves: list[Any], treedef: Any) -> list[Any]:
        return put_each(leaves, self._split.of(leaves, treedef, stacked=True))


class GroupMakerOfGlobalBatches(GroupMaker):
    """Makes the groups in a run of several processes, where NumPy batches of the data called ``name`` are refused."""

    def __init__(self, size: int, sharding: jax.sharding.Sharding | None = None, *, name: str) -> None:
        super().__init__(size, sharding)
        self._name = name

    def add(self, batch: Batch, position: Any = None) -> list[BatchGroup]:
        """Returns as ``GroupMaker.add``. Raises DataError for a NumPy batch."""
        require_global(batch, f"The {self._name} yields")
        return super().add(batch, position)
