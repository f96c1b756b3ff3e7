"""``ColumnStore``: rows of numbers kept as columns, exactly, up to a limit; and as JSON data for a checkpoint. Pure."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

ColumnArray = np.ndarray[tuple[int], np.dtype[Any]]  # of booleans, integers or floats


class SavedColumn(BaseModel):
    """One column: ``dtype`` as NumPy writes it, ``data`` the bytes in base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Annotated[str, Field(pattern=r"^[<|][biuf][1248]$")]
    data: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]

    @classmethod
    def of(cls, column: ColumnArray) -> SavedColumn:
        """Returns the saved form of an array."""
        portable = column.astype(column.dtype.newbyteorder("<"))
        return cls(dtype=portable.dtype.str, data=base64.b64encode(portable.tobytes()).decode())

    def column(self) -> ColumnArray:
        """Returns the array. Raises ValueError if the data is invalid."""
        data = np.frombuffer(base64.b64decode(self.data, validate=True), np.dtype(self.dtype))
        return data.astype(data.dtype.newbyteorder("="))


class SavedColumns(BaseModel):
    """State of a ``ColumnStore``; ``dropped`` is the number of rows that it no longer has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dropped: int = Field(ge=0)
    columns: dict[str, SavedColumn]

    @model_validator(mode="after")
    def _check(self) -> SavedColumns:
        if len({len(column.column()) for column in self.columns.values()}) > 1:
            raise ValueError("columns of different lengths")
        return self


class ColumnStore:
    """The newest ``limit`` rows, added in chunks of columns. Any thread.

    A column keeps its dtype while all rows have it in that dtype; else it is float64, with NaN in rows that lack it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[Mapping[str, ColumnArray]] = []
        self._rows = 0
        self._total = 0
        self._lock = threading.Lock()

    @property
    def dropped(self) -> int:
        """Number of rows that were added and are no longer there."""
        return self._total - min(self._rows, self._limit)

    def add(self, chunk: Mapping[str, ColumnArray]) -> None:
        """Adds some rows: columns of one length, at least one, which must not be changed afterwards."""
        with self._lock:
            self._chunks.append(chunk)
            self._rows += _length(chunk)
            self._total += _length(chunk)
            # Neighbours of similar size are joined, so that there are few chunks, and each row is copied few times.
            while len(self._chunks) > 1 and _length(self._chunks[-2]) <= 2 * _length(self._chunks[-1]):
                self._chunks[-2:] = [_joined(self._chunks[-2:])]
            while self._rows - _length(self._chunks[0]) >= self._limit:
                self._rows -= _length(self._chunks.pop(0))
            if self._rows >= 2 * self._limit:
                self._chunks = [self._newest()]
                self._rows = self._limit

    def columns(self) -> dict[str, ColumnArray]:
        """Returns copies of all columns."""
        with self._lock:
            return self._newest()

    def clear(self) -> None:
        """Removes all rows."""
        with self._lock:
            self._chunks.clear()
            self._rows = self._total = 0

    @property
    def saved(self) -> SavedColumns:
        """The state for a checkpoint."""
        columns = {name: SavedColumn.of(column) for name, column in self.columns().items()}
        return SavedColumns.model_construct(dropped=self.dropped, columns=columns)

    def load(self, saved: SavedColumns) -> None:
        """Continues from ``saved``."""
        self.clear()
        columns = {name: column.column() for name, column in saved.columns.items()}
        if columns and _length(columns):
            self.add(columns)
        self._total = saved.dropped + self._rows

    def _newest(self) -> dict[str, ColumnArray]:
        return {name: column[-self._limit :].copy() for name, column in _joined(self._chunks).items()}


def _joined(chunks: list[Mapping[str, ColumnArray]]) -> Mapping[str, ColumnArray]:
    """Returns one chunk with the rows of all, in their order."""
    if len(chunks) == 1:
        return chunks[0]
    joined: dict[str, ColumnArray] = {}
    for name in dict.fromkeys(name for chunk in chunks for name in chunk):
        parts = [chunk.get(name) for chunk in chunks]
        if len({None if part is None else part.dtype for part in parts}) > 1:
            parts = [
                np.full(_length(chunk), np.nan) if part is None else part.astype(np.float64)
                for part, chunk in zip(parts, chunks, strict=True)
            ]
        joined[name] = np.concatenate([part for part in parts if part is not None])
    return joined


def _length(chunk: Mapping[str, ColumnArray]) -> int:
    return len(next(iter(chunk.values())))
