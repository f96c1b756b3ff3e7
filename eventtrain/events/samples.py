"""The value of a ``SampleTaken``: text, an image, an array or a table, read-only, with a form in JSON. Pure."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema

from eventtrain.events.models import FrozenDict, escape_surrogates, read_only_array

Media: TypeAlias = Literal["text", "image", "array", "table"]

PNG = b"\x89PNG\r\n\x1a\n"


def _value(given: Any, info: ValidationInfo) -> Any:
    """Returns the value of a sample, whose ``media`` was validated before. From Python or from JSON."""
    match info.data.get("media"):
        case "text":
            if not isinstance(given, str):
                raise ValueError(f"a text must be a str, got {type(given).__name__}")
            return escape_surrogates(given)
        case "image":
            image = _from_base64(given) if isinstance(given, str) else given
            if not isinstance(image, bytes) or not image.startswith(PNG):
                raise ValueError(f"an image must be the bytes of a PNG file, got {type(image).__name__}")
            return image
        case "array":
            return read_only_array(given)
        case "table":
            return _table(given)
        case _:
            raise ValueError("the media is not valid")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("an image in JSON must be base64") from error


def _table(given: Any) -> FrozenDict[str, tuple[Any, ...]]:
    """Returns name -> column of a table; columns have numbers, text and None."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a table must be a dict of columns, got {type(given).__name__}")
    table: dict[str, tuple[Any, ...]] = {}
    columns: Any = given.items()  # pyright: ignore[reportUnknownVariableType]
    for name, column in columns:
        if not isinstance(name, str) or not isinstance(column, (list, tuple, np.ndarray)):
            raise ValueError("a table must be a dict of names and columns, each a list or a flat array")
        values: Any = column.tolist() if isinstance(column, np.ndarray) else column
        table[escape_surrogates(name)] = tuple(map(_cell, values))
    if len({len(column) for column in table.values()}) > 1:
        raise ValueError("the columns of a table must have the same length")
    return FrozenDict(table)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON would have text in its place
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"a cell of a table must be a number, text or None, got {type(value).__name__}")


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray):
        flat: Any = value.ravel()
        return {"dtype": value.dtype.name, "shape": list(value.shape), "values": flat.tolist()}
    return value


SampleValue = Annotated[
    Any,  # as ``media`` says
    PlainValidator(_value),
    PlainSerializer(_json, when_used="json"),
    WithJsonSchema({"type": ["string", "object"]}),
]
