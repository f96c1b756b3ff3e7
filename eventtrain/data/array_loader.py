from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from eventtrain.data.global_batches import global_array
from eventtrain.data.sources import Batch
from eventtrain.errors import ConfigurationError, DataError, listed
from eventtrain.validation.annotations import checked
from eventtrain.validation.callables import require_plain

QUICKLY_SHUFFLED = 1_000_000
"""Examples whose order takes 20 ms to make, at the beginning of an epoch."""


class ArrayLoader:
    """Shuffled batches from arrays in memory: vectorised, seekable, the same on every run.

    Args:
        arrays: a pytree (dict, tuple ...) of NumPy arrays with one leading length, the examples.
        batch_size: examples in a batch.
        shuffle: whether each epoch has an order of its own, which depends on `seed` and the epoch only; otherwise the
            order is that of the arrays.
        seed: 0 <= seed < 2**64.
        drop_last: whether the last examples are left out if they do not fill a batch. A short batch has another shape,
            for which the step is compiled again.
        transform: `(batch, rng) -> batch`, for augmentation. Its generator depends on the seed, the epoch and the
            number of the batch, so that seeking changes nothing. It always gets the whole batch as NumPy arrays.
        sharding: of the batches, such as `NamedSharding(mesh, PartitionSpec("data"))`, in a run over several devices or
            processes. The first axis is that of the examples. Batches are then `jax.Array`s over all its devices, the
            same as without it, and each process makes only the examples of its own devices (with `transform`: all
            of the batch). Every process must have the same arrays; they may be memory-mapped files. The order, the
            position of a run, and so an exact resume, do not depend on the number of processes.

    `loader(epoch)` iterates over the batches of an epoch, `loader(epoch, start=n)` from batch `n` on without making
    those before it; `len(loader)` is the number of batches. Without `sharding`, each batch consists of new NumPy
    arrays, since JAX may take over their memory instead of copying it. Several iterators may run at once, on any
    threads.

    Raises:
        DataError: no arrays, no examples, or leading lengths that differ.
        ConfigurationError: a batch_size or seed out of range, or a full or last batch that `sharding` cannot divide.
    """

    @checked
    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        transform: Callable[[Batch, np.random.Generator], Batch] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self._arrays, self._treedef, self.examples = _checked_arrays(arrays)
        if batch_size <= 0:
            raise ConfigurationError(f"ArrayLoader: batch_size must be an integer >= 1, got {batch_size}.")
        if drop_last and batch_size > self.examples:
            raise ConfigurationError(
                f"ArrayLoader: batch_size={batch_size} with drop_last=True makes every epoch empty, since the arrays "
                f"have only {self.examples} examples. Lower batch_size, or pass drop_last=False."
            )
        if not 0 <= seed < 2**64:
            raise ConfigurationError(
                f"ArrayLoader: seed must be an integer with 0 <= seed < 2**64, got {seed}."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        if transform is not None:
            require_plain("ArrayLoader: transform", transform)
        self._transform = transform
        self._sharding = sharding
        if sharding is not None:
            self._require_divisible(sharding)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what the order of the examples depends on. A run that resumes logs what differs."""
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    @property
    def gives_memory(self) -> bool:
        """Whether each batch consists of new arrays that are not kept: there is no `transform`, which may do so."""
        return self._transform is None

    @property
    def in_memory(self) -> bool:
        """Whether making a batch takes no time to speak of, waits for nothing and runs no code of the user's."""
        quick = not self.shuffle or self.examples <= QUICKLY_SHUFFLED
        only_taken = self._transform is None and self._sharding is None  # transfers take 0.1 ms an array
        return quick and only_taken and not any(map(_is_mapped, self._arrays))

    @property
    def batch_bytes(self) -> int:
        """Size of a full batch, without what `transform` changes."""
        return self.batch_size * sum(array[:1].nbytes for array in self._arrays)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        if self.drop_last:
            return self.examples // self.batch_size
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterates over the batches of epoch 0."""
        return self(0)

    def __call__(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterates over the batches of `epoch`, from batch number `start` on.

        Raises:
            ConfigurationError: a negative epoch or start, or a start behind the last batch.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ConfigurationError(
                f"ArrayLoader: expected epoch >= 0 and 0 <= start <= {len(self)}, the number of batches in an epoch, "
                f"got epoch={epoch}, start={start}."
            )
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = np.arange(self.examples)
        if self.shuffle:
            order = self._generator(epoch, 0).permutation(self.examples)
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            if self._sharding is not None and self._transform is None:
                yield self._own_part(chosen, self._sharding)
                continue
            leaves = [array.take(chosen, axis=0) for array in self._arrays]
            batch = jax.tree_util.tree_unflatten(self._treedef, leaves)
            if self._transform is not None:
                batch = self._transform(batch, self._generator(epoch, index + 1))
            yield batch if self._sharding is None else _sharded(batch, self._sharding)

    def _own_part(self, chosen: np.ndarray[Any, Any], sharding: Sharding) -> Batch:
        """Returns the batch of the examples ``chosen``, of which only those for this process are read."""

        def own(array: np.ndarray[Any, Any]) -> jax.Array:
            dtype = jax.dtypes.canonicalize_dtype(array.dtype)
            shape = (len(chosen), *array.shape[1:])
            return global_array(
                shape, sharding, lambda part: array.take(chosen[part], axis=0).astype(dtype, copy=False)
            )

        return jax.tree_util.tree_unflatten(self._treedef, map(own, self._arrays))

    def _require_divisible(self, sharding: Sharding) -> None:
        short = self.examples % self.batch_size
        sizes = [self.batch_size] if self.examples >= self.batch_size else []
        sizes += [short] if short and not self.drop_last else []
        shapes = {
            (size, *(() if self._transform else array.shape[1:])) for size in sizes for array in self._arrays
        }
        for shape in sorted(shapes, key=lambda shape: -shape[0]):
            try:
                sharding.shard_shape(shape)
            except ValueError as error:
                last = shape[0] != self.batch_size
                given = f"the last batch of {short} examples" if last else f"batch_size={self.batch_size}"
                advice = "pass drop_last=True, or pad the arrays" if last else "choose another batch_size"
                raise ConfigurationError(
                    f"ArrayLoader: {given} does not fit the sharding (shape {shape}: {error}). Every device needs as "
                    f"many examples as the others: {advice}."
                ) from None

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        # Philox is a pure function of key and counter (Salmon et al., 2011): the epoch's order has
        # stream 0 and batch i has stream i + 1, 2**192 blocks apart, so nothing has to be skipped.
        key = np.array([self.seed, epoch], np.uint64)
        counter = np.array([0, 0, 0, stream], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _checked_arrays(arrays: Any) -> tuple[list[np.ndarray[Any, Any]], Any, int]:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    if not with_paths:
        raise DataError(
            f"ArrayLoader got {type(arrays).__name__} without any array. Pass a pytree of NumPy arrays, for example "
            "{'image': images, 'label': labels}."
        )
    lengths: dict[str, int] = {}
    for path, leaf in with_paths:
        name = f"arrays{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (np.ndarray, jax.Array)) or leaf.ndim == 0:
            raise DataError(
                f"ArrayLoader: {name} is {type(leaf).__name__}, but each leaf must be an array whose first axis "
                "counts the examples. Convert it with np.asarray."
            )
        lengths[name] = leaf.shape[0]
    length, *others = set(lengths.values())
    if others:
        given = listed([f"{name}: {length}" for name, length in lengths.items()])
        raise DataError(
            f"ArrayLoader: the arrays have different numbers of examples ({given}). Make their first axes equally long."
        )
    if length == 0:
        raise DataError(
            "ArrayLoader: the arrays have no examples (their first axis has length 0). Check how they were loaded or "
            "filtered."
        )
    return [np.asarray(leaf) for _, leaf in with_paths], treedef, length


def _sharded(batch: Batch, sharding: Sharding) -> Batch:
    """Returns what ``transform`` made as arrays on ``sharding``.

    Raises:
        DataError: a leaf is not an array whose first axis is that of the examples, or has a shape that cannot be split.
    """

    def on_devices(path: Any, leaf: Any) -> jax.Array:
        try:
            leaf = np.asarray(leaf)
            # A copy: transform may keep what it returns.
            leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
            return global_array(leaf.shape, sharding, lambda part: leaf[part])
        except (ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"ArrayLoader: transform returned batch{jax.tree_util.keystr(path)} as {type(leaf).__name__} of shape "
                f"{np.shape(leaf)}, which does not fit the sharding ({error}). Return arrays whose first axis counts "
                "the examples."
            ) from None

    return jax.tree_util.tree_map_with_path(on_devices, batch)


def _is_mapped(array: Any) -> bool:
    """Whether the memory of an array is that of a file, so that reading it may wait for a disk."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False
