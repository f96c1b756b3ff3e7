"""Data of a run: batches of an epoch, and the position in them. A batch is any pytree of arrays."""

from __future__ import annotations

import collections
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def require_batches(data: object, name: str) -> None:
    """Raises DataError if `data`, called `name`, is a tuple of whole arrays, as other libraries take `(x, y)`."""
    if not isinstance(data, tuple) or not all(isinstance(part, (np.ndarray, jax.Array)) for part in data):
        return
    arrays: tuple[Any, ...] = data
    rows = {array.shape[:1] for array in arrays}
    # Batches of one data set differ in their number of rows only.
    if len(rows) == 1 and len({(array.shape[1:], array.dtype) for array in arrays}) > 1:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise DataError(
            f"The {name} is a tuple of {len(arrays)} arrays of the shapes {shapes}, each of which would be taken for a "
            "batch. Pass et.ArrayLoader(arrays, batch_size), or a list of batches."
        )


def evaluation_sets(data: object) -> Mapping[str, Any]:
    """Returns evaluation data by name: that of a mapping, or ``data`` itself under the name "".

    Raises:
        DataError: a mapping has no entry, or a name that cannot be part of the name of a metric.
    """
    if not isinstance(data, Mapping):
        return {"": data}
    sets: Mapping[Any, Any] = data
    if not sets:
        raise DataError("The evaluation data is an empty mapping. Pass at least one set by name, or None.")
    for name in sets:
        if not isinstance(name, str) or not re.fullmatch(r"[\w./-]+", name):
            raise DataError(
                f"The evaluation data has a set named {name!r}, but its metrics are called val_<set>_<metric>. Name it "
                "with letters, digits and _ . - /, for example eval_data={'clean': ..., 'noisy': ...}."
            )
    return sets


class EpochReader:
    """The batches of one epoch from batch number ``start`` on. Runs the user's code, so every method may block.

    An iterator with ``set_state`` gets ``state``. Data that takes ``start=``, as an ``ArrayLoader`` does, seeks.
    Otherwise the first batches are made again and left out, which is exact if the data is the same every time.

    Attributes:
        epoch, start: the epoch, and the number of the first batch in it.
        last_skipped: the batch before ``start``, where it was made again.
        owned: whether the iterator was made here, from a callable or an iterable. One that the user made stays open.

    Raises:
        DataError: as ``epoch_batches``.
    """

    def __init__(
        self,
        data: Any,
        epoch: int,
        start: int = 0,
        state: Any = None,
        unread: Iterable[tuple[Batch, Any]] = (),
    ) -> None:
        self._data, self.epoch, self.start = data, epoch, start
        self._unread = collections.deque(unread)
        self._skipped: list[Batch] = []
        self.last_skipped: list[Batch] = []
        self._start_state: Any = None
        seeks = start > 0 and state is None and callable(data) and "start" in _parameters(data)
        length = length_of(data)
        if seeks and length is not None and start > length:
            raise DataError(
                f"The run resumes at batch {start} of epoch {epoch}, and the data has only {length} batches an epoch "
                "now. Resume with the data and the batch size of the checkpoint."
            )
        opened: Any = data(epoch, start=start - 1) if seeks else epoch_batches(data, epoch)
        self._batches: Any = iter(opened)
        self.owned = self._batches is not data
        if start and state is not None and hasattr(self._batches, "set_state"):
            self._start_state = iterator_state(self._batches)
            self._unread.clear()
            self._batches.set_state(state)
        elif start:
            skipped = itertools.islice(self, 1 if seeks else start)
            first = [] if seeks else [batch for batch, _ in itertools.islice(skipped, 1)]
            last = collections.deque(skipped, maxlen=1)
            self._skipped, self.last_skipped = first, [batch for batch, _ in last] or first

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        """Yields each batch with the state of the iterator after it, or None if it has no ``get_state``."""
        while self._unread:
            yield self._unread.popleft()
        if not hasattr(self._batches, "get_state"):
            yield from zip(self._batches, itertools.repeat(None))
            return
        for batch in self._batches:
            yield batch, self._batches.get_state()

    def sample(self) -> list[Batch]:
        """Returns a batch of the epoch, to compile for; none if there is none. It counts as not read."""
        if self._skipped:
            return self._skipped
        if self.owned:
            again = epoch_batches(self._data, self.epoch)
            batches = list(itertools.islice(again, 1))
            getattr(again, "close", lambda: None)()
        elif hasattr(self._data, "set_state") and hasattr(self._data, "get_state"):
            now = self._data.get_state()
            if self._start_state is not None:
                self._data.set_state(self._start_state)
            batches = list(itertools.islice(self._data, 1))
            self._data.set_state(now)
        else:
            self._unread.extendleft(itertools.islice(iter(self), 1))
            batches = [batch for batch, _ in itertools.islice(self._unread, 1)]
        return batches

    def close(self) -> list[tuple[Batch, Any]]:
        """Closes an iterator that was made here. Returns what was taken from the user's own and not read."""
        if self.owned:
            getattr(self._batches, "close", lambda: None)()
            return []
        return list(self._unread)


def iterator_state(batches: object) -> Any:
    """Returns what `get_state` of an iterator returns; None where it has no such method."""
    get_state = getattr(batches, "get_state", None)
    return None if get_state is None else get_state()


def describe(data: object) -> dict[str, Any]:
    """Returns what is known of `data`, as plain JSON data: its length, and what its `fingerprint()` returns.

    Raises:
        DataError: `fingerprint()` did not return a dict of plain JSON data.
    """
    length = length_of(data)
    known: dict[str, Any] = {} if length is None else {"length": length}
    fingerprint = getattr(data, "fingerprint", None)
    if not callable(fingerprint):
        return known
    given = fingerprint()
    try:
        return {**known, **json.loads(json.dumps(given))}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"fingerprint() of {type(data).__name__} must return a dict of plain JSON data, got {given!r} ({error})."
        ) from error


def shapes_of(batch: Batch) -> list[str]:
    """Returns dtype and shape of each leaf of `batch`, such as "float32[32, 4]"."""
    leaves = jax.tree_util.tree_leaves(batch)
    return [f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}" for leaf in leaves]


def length_of(data: object) -> int | None:
    """Returns the number of batches of an epoch, if `data` knows it."""
    try:
        return len(data)  # pyright: ignore[reportArgumentType]
    except TypeError:  # also of an array without dimensions, which has a __len__
        return None


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()
