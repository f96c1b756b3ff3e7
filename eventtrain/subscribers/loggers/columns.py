"""``Columns``: rows of numbers kept as columns, exactly, up to a bound; and as JSON data for a checkpoint. Pure."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

Column = np.ndarray[tuple[int], np.dtype[Any]]  # of booleans, integers or floats


class SavedColumn(BaseModel):
    """One column: ``dtype`` as NumPy writes it, ``data`` the bytes in base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Annotated[str, Field(pattern=r"^[<|][biuf][1248]$")]
    data: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]

    @classmethod
    def of(cls, column: Column) -> SavedColumn:
        """From an array."""
        portable = column.astype(column.dtype.newbyteorder("<"))
        return cls(dtype=portable.dtype.str, data=base64.b64encode(portable.tobytes()).decode())

    def column(self) -> Column:
        """The array. Raises ValueError where it is broken."""
        data = np.frombuffer(base64.b64decode(self.data, validate=True), np.dtype(self.dtype))
        return data.astype(data.dtype.newbyteorder("="))


class SavedColumns(BaseModel):
    """What survives a restart: ``dropped`` rows are no longer there, the others are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dropped: int = Field(ge=0)
    columns: dict[str, SavedColumn]

    @model_validator(mode="after")
    def _check(self) -> SavedColumns:
        if len({len(column.column()) for column in self.columns.values()}) > 1:
            raise ValueError("columns of different lengths")
        return self


class Columns:
    """Rows that come in chunks of columns; of more than ``limit`` the oldest are dropped. Any thread.

    A column keeps its dtype while all rows have it and agree; else it is float64, with NaN where a row has none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[Mapping[str, Column]] = []
        self._rows = 0
        self._total = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._rows, self._limit)

    @property
    def dropped(self) -> int:
        """How many rows there were and are no longer."""
        return self._total - len(self)

    def add(self, chunk: Mapping[str, Column]) -> None:
        """Take in some rows: columns of one length, at least one, which are not changed afterwards."""
        with self._lock:
            self._chunks.append(chunk)
            rows = _length(chunk)
            self._rows += rows
            self._total += rows
            # Two neighbours of like size are joined, so there are few chunks, and each row is copied few times.
            while len(self._chunks) > 1 and _length(self._chunks[-2]) <= 2 * _length(self._chunks[-1]):
                newer = self._chunks.pop()
                self._chunks[-1] = joined([self._chunks[-1], newer])
            while self._rows - _length(self._chunks[0]) >= self._limit:
                self._rows -= _length(self._chunks.pop(0))
            if self._rows >= 2 * self._limit:
                self._trim()

    def columns(self) -> dict[str, Column]:
        """All rows there are, as arrays of one's own."""
        with self._lock:
            whole = joined(self._chunks)
            return {name: column[-self._limit :].copy() for name, column in whole.items()}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._chunks.clear()
            self._rows = self._total = 0

    @property
    def saved(self) -> SavedColumns:
        """For a checkpoint."""
        columns = {name: SavedColumn.of(column) for name, column in self.columns().items()}
        return SavedColumns.model_construct(dropped=self.dropped, columns=columns)

    def load(self, saved: SavedColumns) -> None:
        """Go on from ``saved``."""
        self.clear()
        columns = {name: column.column() for name, column in saved.columns.items()}
        if columns and _length(columns):
            self.add(columns)
        self._total = saved.dropped + self._rows

    def _trim(self) -> None:
        whole = joined(self._chunks)
        self._chunks = [{name: column[-self._limit :].copy() for name, column in whole.items()}]
        self._rows = self._limit


def joined(chunks: list[Mapping[str, Column]]) -> Mapping[str, Column]:
    """One chunk out of several, in their order."""
    if len(chunks) == 1:
        return chunks[0]
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    return {name: _joined_column([chunk.get(name) for chunk in chunks], chunks) for name in names}


def _joined_column(parts: list[Column | None], chunks: list[Mapping[str, Column]]) -> Column:
    there = [part for part in parts if part is not None]
    if len(there) == len(parts) and len({part.dtype for part in there}) == 1:
        return np.concatenate(there)
    return np.concatenate(
        [
            np.full(_length(chunk), np.nan) if part is None else part.astype(np.float64)
            for part, chunk in zip(parts, chunks, strict=True)
        ]
    )


def _length(chunk: Mapping[str, Column]) -> int:
    return len(next(iter(chunk.values())))
