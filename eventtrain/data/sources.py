"""Data of a run: batches of an epoch, and the position in them. A batch is any pytree of arrays."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import jax
import numpy as np

from eventtrain.errors import DataError
from eventtrain.validation.callables import require_result

# A batch is a pytree, which has no static type.
Batch: TypeAlias = Any


def epoch_batches(data: object, epoch: int) -> Iterator[Batch]:
    """Returns an iterator over the batches of one epoch.

    `data` is an iterable, iterated again each epoch, or a callable `epoch -> iterable`, as an `ArrayLoader` is. What
    the user's code raises passes unchanged.

    Raises:
        DataError: `data` is neither, or the callable did not return an iterable.
        ConfigurationError: the callable is async.
    """
    if callable(data):
        batches: object = data(epoch)
        if inspect.isawaitable(batches):
            require_result(f"data(epoch={epoch})", batches)
        if not isinstance(batches, Iterable):
            raise DataError(
                f"data(epoch={epoch}) returned {type(batches).__name__}, which cannot be iterated. A callable given "
                "as data must return an iterable of that epoch's batches."
            )
        return iter(batches)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(data, (np.ndarray, jax.Array)):
        raise DataError(
            f"data is one array of shape {tuple(data.shape)}, whose rows would be taken for batches. Pass a list of "
            "batches, or cut it with et.ArrayLoader(arrays, batch_size)."
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        return iter(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    raise DataError(
        f"data is {type(data).__name__}, which yields no batches. Pass an iterable of batches, a callable "
        "epoch -> iterable, or, for arrays in memory, et.ArrayLoader(arrays, batch_size)."
    )


def batches_from(data: object, epoch: int, start: int, state: Any) -> Iterator[Batch]:
    """Returns the batches of one epoch from batch number `start`, for a run that resumes.

    An iterator with `set_state` gets `state`. Data that takes `start=`, as an `ArrayLoader` does, seeks. Otherwise the
    first batches are made again and left out, which is exact if the data is the same every time.
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


def iterator_state(batches: object) -> Any:
    """Returns what `get_state` of an iterator returns; None where it has no such method."""
    get_state = getattr(batches, "get_state", None)
    return None if get_state is None else get_state()


def with_states(batches: Iterator[Batch], *first: tuple[Batch, Any]) -> Iterator[tuple[Batch, Any]]:
    """Yields `first`, which was taken from `batches` before, and the batches, each with `iterator_state` after it."""
    yield from first
    for batch in batches:
        yield batch, iterator_state(batches)


def position_in(data: object) -> Any:
    """Returns the state of data that is itself an iterator with `get_state` and `set_state`; None for other data."""
    return iterator_state(data) if isinstance(data, Iterator) and hasattr(data, "set_state") else None


@contextmanager
def rewound(data: object, position: Any) -> Generator[None]:
    """Sets data that is itself an iterator to `position` for the length of the block, and back after it.

    With `position` None nothing is moved.
    """
    if position is None:
        yield
        return
    iterator: Any = data
    before = iterator.get_state()
    iterator.set_state(position)
    try:
        yield
    finally:
        iterator.set_state(before)


def length_of(data: object) -> int | None:
    """Returns the number of batches of an epoch, if `data` knows it."""
    try:
        return len(data)  # pyright: ignore[reportArgumentType]
    except TypeError:  # also of an array without dimensions, which has a __len__
        return None


def on_device(batch: Batch) -> bool:
    """Whether every leaf of `batch` is a JAX array already, so that no transfer is needed."""
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(batch))


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()
