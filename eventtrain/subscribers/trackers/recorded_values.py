"""What functions of the user's may give a tracker, told apart: numbers, text, images, arrays for histograms. Pure."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events import Event

BINS = 64
"""Of a histogram."""

Array = np.ndarray[Any, Any]
Record = Mapping[type[Event], Callable[[Any], Mapping[str, Any]]]
"""Event class -> what to record of each of its events, by name."""


@dataclass
class Tracked:
    """By name; images are uint8[height, width, 1, 3 or 4], or PNG files."""

    numbers: dict[str, float] = field(default_factory=dict[str, float])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    images: dict[str, Array | bytes] = field(default_factory=dict[str, "Array | bytes"])
    arrays: dict[str, Array] = field(default_factory=dict[str, Array])


def told_apart(values: Mapping[str, Any]) -> Tracked:
    """A str is text; a number one point of a curve; a vector a histogram; a matrix, or an array of 3 dimensions whose
    last has 1, 3 or 4 entries, an image (floats from 0 to 1); bytes a PNG file; a figure of matplotlib's an image.

    Raises:
        StorageError: something is none of these, by name.
    """
    found = Tracked()
    for name, value in values.items():
        if isinstance(value, str):
            found.texts[name] = value
        elif isinstance(value, bytes):
            found.images[name] = value
        elif hasattr(value, "savefig"):
            buffer = io.BytesIO()
            value.savefig(buffer, format="png")
            found.images[name] = buffer.getvalue()
        else:
            _sort_in(found, name, np.asarray(value))
    return found


def check_record(owner: str, record: Record | None) -> Record:
    """Raises ConfigurationError unless it maps event classes to functions."""
    for kind, function in (record or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, Event)) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"{owner}(record={{{kind!r}: {function!r}}}): needs event classes, and functions that take such an "
                "event and return a dict of what to record, by name."
            )
    return dict(record or {})


def recorded(record: Record, event: Event) -> Tracked:
    """What the functions say to ``event``, which are called for its class and those that it is derived from.

    Raises:
        StorageError: one raised, or gave what cannot be recorded.
    """
    values: dict[str, Any] = {}
    for kind, function in record.items():
        if isinstance(event, kind):
            try:
                values.update(function(event))
            except Exception as error:
                raise StorageError(
                    f"record[{kind.__name__}] raised {type(error).__name__}: {error}"
                ) from error
    return told_apart(values)


def bin_edges(values: Array) -> Array:
    """Of the bins of a histogram of finite float64 values, of which there is one; each value lies in one of them."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
        return np.array([low, high]) if np.isfinite([low, high]).all() else np.array([values[0], values[0]])
    with np.errstate(over="ignore"):
        edges = (
            np.linspace(low / 2, high / 2, BINS + 1) * 2
        )  # halves: high - low may be more than a float64 holds
    edges[0], edges[-1] = low, high
    return np.unique(edges)


def _sort_in(found: Tracked, name: str, array: Array) -> None:
    if array.dtype.kind not in "biuf":
        raise StorageError(
            f"{name!r} cannot be recorded: {array.dtype.name}{list(array.shape)} is no number, text, image or vector"
        )
    if array.ndim == 0:
        found.numbers[name] = float(array)
    elif array.ndim == 1:
        found.arrays[name] = array
    elif array.ndim == 2:
        found.images[name] = _pixels(array[:, :, None])
    elif array.ndim == 3 and array.shape[2] in (1, 3, 4):
        found.images[name] = _pixels(array)
    else:
        raise StorageError(
            f"{name!r} cannot be recorded: an image is [height, width] or [height, width, 1, 3 or 4], not "
            f"{list(array.shape)}"
        )


def _pixels(array: Array) -> Array:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        return cast("Array", (np.clip(np.nan_to_num(array), 0.0, 1.0) * 255 + 0.5).astype(np.uint8))
    return np.clip(array, 0, 255).astype(np.uint8)
