"""Batches: an in-memory loader, what counts as data, and the thread that runs ahead of training.

A batch is any pytree of arrays. Which batches make an epoch is the user's affair; that the next
ones already lie on the device when the training thread asks is this module's.
"""

from __future__ import annotations

import collections
import inspect
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.experimental
import numpy as np

from eventtrain.errors import ConfigurationError, DataError

__all__ = [
    "ArrayLoader",
    "Batch",
    "BatchGroup",
    "Peeked",
    "Prefetcher",
    "batches_from",
    "epoch_batches",
    "on_device",
    "place_of",
    "rewound",
]

# A batch is a pytree, which has no static type.
Batch: TypeAlias = Any


class ArrayLoader:
    """Shuffled batches from arrays in memory: vectorised, seekable, the same on every run.

    Args:
        arrays: a pytree (dict, tuple ...) of NumPy arrays with one leading length, the examples.
        batch_size: examples in a batch.
        shuffle: whether each epoch has an order of its own, which depends on `seed` and the epoch
            only; otherwise it is that of the arrays.
        seed: 0 <= seed < 2**64.
        drop_last: whether the last examples are left out if they fill no batch. A short batch has
            another shape, which the step is compiled for a second time.
        transform: `(batch, rng) -> batch`, for augmentation. Its generator depends on the seed,
            the epoch and the number of the batch, so that seeking changes nothing.

    `loader(epoch)` iterates over the batches of an epoch, `loader(epoch, start=n)` from batch `n`
    on without making those before it; `len(loader)` is the number of batches. Each batch consists
    of fresh NumPy arrays, for JAX may take over their memory instead of copying it. Several
    iterators may run at once, on any threads.

    Raises:
        DataError: no arrays, no examples, or leading lengths that differ.
        ConfigurationError: a batch_size or seed that cannot work.
    """

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
            raise ConfigurationError(
                f"ArrayLoader(batch_size={batch_size}): a batch holds at least one example. Pass a "
                "positive batch_size."
            )
        if drop_last and batch_size > self.examples:
            raise ConfigurationError(
                f"ArrayLoader(batch_size={batch_size}, drop_last=True): the arrays hold only "
                f"{self.examples} examples, so every epoch would be empty. Lower batch_size, or "
                "pass drop_last=False."
            )
        if not 0 <= seed < 2**64:
            raise ConfigurationError(
                f"ArrayLoader(seed={seed}): the seed is one 64-bit word of a Philox key, so "
                "0 <= seed < 2**64 must hold."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._transform = transform

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.drop_last:
            return self.examples // self.batch_size
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0."""
        return self(0)

    def __call__(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, from batch number `start` on.

        Raises:
            ConfigurationError: a negative epoch or start, or a start behind the last batch.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ConfigurationError(
                f"ArrayLoader: epoch={epoch}, start={start} was asked for, but epochs count from 0 "
                f"and an epoch has {len(self)} batches. Pass epoch >= 0 and 0 <= start <= "
                f"{len(self)}."
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
        # stream 0 and batch i has stream i + 1, 2**192 blocks apart, so none has to be skipped.
        key = np.array([self.seed, epoch], np.uint64)
        counter = np.array([0, 0, 0, stream], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_batches(data: object, epoch: int) -> Iterator[Batch]:
    """An iterator over the batches of one epoch.

    `data` is an iterable, iterated anew each epoch, or a callable `epoch -> iterable`; an
    `ArrayLoader` is one. What the user's code raises passes unchanged.

    Raises:
        DataError: `data` is neither, or the callable returned no iterable.
    """
    if callable(data):
        batches: object = data(epoch)
        if not isinstance(batches, Iterable):
            raise DataError(
                f"data(epoch={epoch}) returned {type(batches).__name__}, which cannot be iterated. "
                "A callable given as data returns the iterable of that epoch's batches."
            )
        return iter(batches)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(data, (np.ndarray, jax.Array)):
        raise DataError(
            f"data is one array of shape {tuple(data.shape)}, whose rows would be taken for batches. Pass a list of "
            "batches, or cut it with et.ArrayLoader(arrays, batch_size)."
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        return iter(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    hint = "for arrays in memory, et.ArrayLoader(arrays, batch_size)"
    raise DataError(
        f"data is {type(data).__name__}, which yields no batches. Pass an iterable of batches, a "
        f"callable epoch -> iterable, or, {hint}."
    )


def batches_from(data: object, epoch: int, start: int, state: Any) -> Iterator[Batch]:
    """The batches of one epoch from batch number `start` on, as a resumed run needs them.

    Where the iterator has `set_state`, it gets `state`; where `data` takes `start=`, as an `ArrayLoader` does, nothing
    is made twice; else the first batches are made and left out, which is exact if the data is the same every time.
    """
    if start == 0:
        return epoch_batches(data, epoch)
    if state is None and callable(data) and "start" in _parameters(data):
        seekable: Any = data
        return iter(seekable(epoch, start=start))
    batches = epoch_batches(data, epoch)
    set_state = getattr(batches, "set_state", None)
    if state is not None and set_state is not None:
        set_state(state)
        return batches
    return itertools.islice(batches, start, None)


def place_of(data: object) -> Any:
    """The state of data that is one iterator with `get_state` and `set_state`; None for any other."""
    return _position(data) if isinstance(data, Iterator) and hasattr(data, "set_state") else None


@contextmanager
def rewound(data: object, place: Any) -> Generator[None]:
    """Data that is one iterator stands at `place` for the length of the block, and then where it stood.

    With `place` None nothing is moved.
    """
    if place is None:
        yield
        return
    iterator: Any = data
    there = iterator.get_state()
    iterator.set_state(place)
    try:
        yield
    finally:
        iterator.set_state(there)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


class Peeked(Iterator[Batch]):
    """An iterator whose first batch was looked at; `get_state` is that of what was handed out.

    Raises:
        StopIteration: it has no batch.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.first = next(batches)
        self._after_first = _position(batches)
        self._waiting = True

    def __next__(self) -> Batch:
        if self._waiting:
            self._waiting = False
            return self.first
        self._after_first = None
        return next(self._batches)

    def get_state(self) -> Any:
        """The state after the last batch handed out; None where the iterator has none."""
        return self._after_first if self._after_first is not None else _position(self._batches)

    def close(self) -> None:
        """Close the iterator, if it can be."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def on_device(batch: Batch) -> bool:
    """Whether every leaf of `batch` is a JAX array already, so that no transfer is needed."""
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(batch))


class BatchGroup(NamedTuple):
    """`steps_per_call` batches for one call, of which the first `steps` are real.

    A short group is padded by repeating its last batch. `positions[i]` is what the data iterator's
    `get_state()` said right after batch i, or None if it has no such method.
    """

    batches: tuple[Batch, ...]
    steps: int
    positions: tuple[Any, ...]


class Prefetcher:
    """Runs a data iterator in a thread of its own and puts batches on the device ahead of use.

    Args:
        batches: the iterator; from now on only the prefetch thread touches it (and, if it is a
            generator, closes it).
        steps_per_call: batches in a group. A group also ends where the next batch has another
            shape, dtype or structure, for one call needs them alike.
        depth: groups that may wait; this many batches of memory are used on top of the step's.
        sharding: where NumPy leaves are put; None is JAX's default device. Leaves that are JAX
            arrays already stay where they are, numbers stay numbers.
        on_ready: called on the prefetch thread after each group and at the end, when `ready()` holds.

    `ready` and `take` never block and belong to one consumer thread.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        *,
        steps_per_call: int = 1,
        depth: int = 4,
        sharding: jax.sharding.Sharding | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        if steps_per_call < 1 or depth < 1:
            raise ConfigurationError(
                f"Prefetcher(steps_per_call={steps_per_call}, depth={depth}): both count groups or "
                "batches, so they must be 1 at least."
            )
        self._batches = batches
        self._size = steps_per_call
        self._sharding = sharding
        self._on_ready = on_ready
        self._groups: collections.deque[BatchGroup] = collections.deque()
        self._room = threading.Semaphore(depth)
        self._closing = False
        self._ended = False  # set last: whoever sees it sees every group and the error too
        self._error: BaseException | None = None
        self._taken = 0
        self._x64 = bool(jax.config.read("jax_enable_x64"))  # a setting of each thread: handed on to ours
        self._thread = threading.Thread(target=self._run, name="eventtrain-prefetch", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether `take` has something to say: a group, the end, or an error."""
        return bool(self._groups) or self._ended

    def take(self) -> BatchGroup | None:
        """The next group, or None at the end of the data.

        Raises:
            DataError: the data ended before its first batch.
            RuntimeError: nothing is ready; ask `ready()`, or wait for `on_ready`.
            BaseException: what the user's iterator raised, unchanged, after the batches before it.
        """
        ended = self._ended  # read first: a group may be added, but not after this was true
        if self._groups:
            self._taken += 1
            self._room.release()
            return self._groups.popleft()
        if not ended:
            raise RuntimeError("Prefetcher.take(): nothing is ready; ask ready() first.")
        if self._error is not None:
            raise self._error
        if self._taken == 0:
            raise DataError(
                "The data is empty: it ended before its first batch. Check the files and the batch "
                "size; an iterator that was consumed once must be given as a callable "
                "epoch -> iterable."
            )
        return None

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Stop the thread and wait for it, `timeout_s` at most; may be called again.

        Returns whether it has ended: it has not while the user's iterator blocks.
        """
        self._closing = True
        self._room.release()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with sixty_four_bit(self._x64):
                self._fill()
        except BaseException as error:
            self._error = error
        finally:
            try:
                close = getattr(self._batches, "close", None)
                if close is not None:
                    close()
            except BaseException as error:
                self._error = self._error or error
            self._ended = True
            self._on_ready()

    def _fill(self) -> None:
        group: list[tuple[Batch, Any]] = []
        try:
            for batch in self._batches:
                position = _position(self._batches)
                batch = self._on_device(batch)
                if group and not _alike(group[-1][0], batch):
                    self._add(group)
                    group = []
                group.append((batch, position))
                if len(group) == self._size:
                    self._add(group)
                    group = []
                if self._closing:
                    return
        finally:  # also what came before an error
            if group:
                self._add(group)

    def _add(self, group: list[tuple[Batch, Any]]) -> None:
        if self._closing:
            return
        self._room.acquire()
        if self._closing:  # close() made the room, to end this wait
            return
        padded = group + group[-1:] * (self._size - len(group))
        batches = tuple(batch for batch, _ in padded)
        positions = tuple(position for _, position in group)
        self._groups.append(BatchGroup(batches, len(group), positions))
        self._on_ready()

    def _on_device(self, batch: Batch) -> Batch:
        def put(leaf: Any) -> Any:
            if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm":
                # A copy, since JAX may alias the memory or read it late, and an iterator that fills
                # one buffer again and again is legal.
                return jax.device_put(np.array(leaf), self._sharding)
            return leaf

        return jax.tree.map(put, batch)


def sixty_four_bit(enabled: bool) -> AbstractContextManager[Any]:
    """`jax.enable_x64`, wherever this version of JAX keeps it."""
    module: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return module.enable_x64(enabled)


def _position(batches: object) -> Any:
    get_state = getattr(batches, "get_state", None)
    return None if get_state is None else get_state()


def _alike(one: Batch, other: Batch) -> bool:
    first, first_tree = jax.tree_util.tree_flatten(one)
    second, second_tree = jax.tree_util.tree_flatten(other)
    return first_tree == second_tree and all(_kind(a) == _kind(b) for a, b in zip(first, second, strict=True))


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, leaf.sharding
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def _checked_arrays(arrays: Any) -> tuple[list[np.ndarray[Any, Any]], Any, int]:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    if not with_paths:
        raise DataError(
            f"ArrayLoader got {type(arrays).__name__} without any array. Pass a pytree of NumPy "
            "arrays, for example {'image': images, 'label': labels}."
        )
    leaves: list[np.ndarray[Any, Any]] = []
    lengths: dict[str, int] = {}
    for path, leaf in with_paths:
        name = f"arrays{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (np.ndarray, jax.Array)) or leaf.ndim == 0:
            raise DataError(
                f"ArrayLoader: {name} is {type(leaf).__name__}, but each leaf must be an array "
                "whose first axis counts the examples. Convert it with np.asarray."
            )
        leaves.append(np.asarray(leaf))
        lengths[name] = leaf.shape[0]
    if len(set(lengths.values())) > 1:
        raise DataError(
            "ArrayLoader: the arrays hold different numbers of examples ("
            + ", ".join(f"{name}: {length}" for name, length in lengths.items())
            + "), so they cannot be batched together. Make their first axes equally long."
        )
    (length,) = set(lengths.values())
    if length == 0:
        raise DataError(
            "ArrayLoader: the arrays hold no examples (their first axis has length 0). Check how "
            "they were loaded or filtered."
        )
    return leaves, treedef, length
