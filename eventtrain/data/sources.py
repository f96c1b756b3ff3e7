"""What counts as data, and where in it a run is. A batch is any pytree of arrays."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import jax
import numpy as np

from eventtrain.errors import DataError

__all__ = [
    "Batch",
    "Peeked",
    "batches_from",
    "epoch_batches",
    "on_device",
    "place_of",
    "position_of",
    "rewound",
]

# A batch is a pytree, which has no static type.
Batch: TypeAlias = Any


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
    return position_of(data) if isinstance(data, Iterator) and hasattr(data, "set_state") else None


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
        self._after_first = position_of(batches)
        self._waiting = True

    def __next__(self) -> Batch:
        if self._waiting:
            self._waiting = False
            return self.first
        self._after_first = None
        return next(self._batches)

    def get_state(self) -> Any:
        """The state after the last batch handed out; None where the iterator has none."""
        return self._after_first if self._after_first is not None else position_of(self._batches)

    def close(self) -> None:
        """Close the iterator, if it can be."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def on_device(batch: Batch) -> bool:
    """Whether every leaf of `batch` is a JAX array already, so that no transfer is needed."""
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(batch))


def position_of(batches: object) -> Any:
    """What its `get_state` says; None where it has none."""
    get_state = getattr(batches, "get_state", None)
    return None if get_state is None else get_state()
