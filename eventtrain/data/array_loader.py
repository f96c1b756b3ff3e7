from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from eventtrain.data.sources import Batch
from eventtrain.errors import ConfigurationError, DataError, listed
from eventtrain.validation.annotations import checked
from eventtrain.validation.callables import require_plain


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
            number of the batch, so that seeking changes nothing.

    `loader(epoch)` iterates over the batches of an epoch, `loader(epoch, start=n)` from batch `n` on without making
    those before it; `len(loader)` is the number of batches. Each batch consists of new NumPy arrays, since JAX may take
    over their memory instead of copying it. Several iterators may run at once, on any threads.

    Raises:
        DataError: no arrays, no examples, or leading lengths that differ.
        ConfigurationError: a batch_size or seed out of range.
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

    def fingerprint(self) -> dict[str, Any]:
        """Returns what the order of the examples depends on. A run that resumes logs what differs."""
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

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
            leaves = [array[chosen] for array in self._arrays]
            batch = jax.tree_util.tree_unflatten(self._treedef, leaves)
            if self._transform is not None:
                batch = self._transform(batch, self._generator(epoch, index + 1))
            yield batch

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
