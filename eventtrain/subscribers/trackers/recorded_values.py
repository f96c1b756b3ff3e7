"""``recorded_values``: what the user's functions return for an event, sorted for a tracker. Pure."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events import Event

Array = np.ndarray[Any, Any]
Record = Mapping[type[Event], Callable[[Any], Mapping[str, Any]]]
"""Event class -> function that returns what to record of such an event, by name."""


@dataclass
class RecordedValues:
    """Values by name. Images are uint8[height, width, 1, 3 or 4], or PNG files; arrays become histograms."""

    numbers: dict[str, float] = field(default_factory=dict[str, float])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    images: dict[str, Array | bytes] = field(default_factory=dict[str, "Array | bytes"])
    arrays: dict[str, Array] = field(default_factory=dict[str, Array])

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RecordedValues:
        """Sorts values by what they are.

        A str is text; a number is a point of a curve; a vector is a histogram; a matrix, or an array of 3 dimensions
        whose last has 1, 3 or 4 entries, is an image (floats from 0 to 1); bytes are a PNG file; a figure of
        matplotlib is an image.

        Raises:
            StorageError: a value is none of these; the message names it.
        """
        found = cls()
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
                found._add_array(name, np.asarray(value))
        return found

    def _add_array(self, name: str, array: Array) -> None:
        if array.dtype.kind not in "biuf":
            raise StorageError(
                f"{name!r} cannot be recorded: expected a number, text, image or vector, got "
                f"{array.dtype.name}{list(array.shape)}"
            )
        if array.ndim == 0:
            self.numbers[name] = float(array)
        elif array.ndim == 1:
            self.arrays[name] = array
        elif array.ndim == 2:
            self.images[name] = _pixels(array[:, :, None])
        elif array.ndim == 3 and array.shape[2] in (1, 3, 4):
            self.images[name] = _pixels(array)
        else:
            raise StorageError(
                f"{name!r} cannot be recorded: an image is [height, width] or [height, width, 1, 3 or 4], not "
                f"{list(array.shape)}"
            )


def check_record(owner: str, record: Record | None) -> Record:
    """Returns ``record`` as a dict. Raises ConfigurationError unless it maps event classes to functions."""
    for kind, function in (record or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, Event)) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"{owner}(record={{{kind!r}: {function!r}}}): record must map event classes to functions that take "
                "such an event and return a dict of values by name."
            )
    return dict(record or {})


def recorded_values(record: Record, event: Event) -> RecordedValues:
    """Calls the functions for the class of ``event`` and its base classes.

    Raises:
        StorageError: a function raised, or returned a value that cannot be recorded.
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
    return RecordedValues.of(values)


def _pixels(array: Array) -> Array:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        return cast("Array", (np.clip(np.nan_to_num(array), 0.0, 1.0) * 255 + 0.5).astype(np.uint8))
    return np.clip(array, 0, 255).astype(np.uint8)
