"""``Curve``: any number of points in bounded memory, downsampled without hiding spikes and gaps. Pure."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

BUCKETS = 1024
"""Most buckets of one curve; between 512 and 1024 once it has more points than that."""

Floats = NDArray[np.float64]
FIRST, LAST, FINITE, NOT_FINITE, SUM, LOW, HIGH = range(7)
ROWS = 7


@dataclass(frozen=True)
class Points:
    """A curve as it is drawn, one entry per bucket.

    Attributes:
        steps: the middle of the bucket's steps.
        means: of the finite values; NaN if there is none.
        lows, highs: the lowest and the highest finite value; NaN if there is none.
        not_finite: number of values that were NaN or infinite.
        exact: every bucket holds one point, so means, lows and highs are the values themselves.
    """

    steps: Floats
    means: Floats
    lows: Floats
    highs: Floats
    not_finite: Floats
    exact: bool

    def __len__(self) -> int:
        return len(self.steps)


class SavedCurve(BaseModel):
    """A curve in a checkpoint.

    ``data``: little-endian float64 in base64; the steps and then the values if each bucket holds one point, else the
    buckets in use, in seven rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    width: int = Field(ge=1)
    room: int = Field(ge=0)
    data: str


class Curve:
    """A growing curve.

    Each bucket of ``width`` consecutive points keeps the lowest and the highest value, the mean, and the number of
    values that are not finite. When all ``BUCKETS`` are full, neighbours are joined and the width doubles: 56 KiB at
    most, however long the run is. Which points share a bucket depends on their number alone, not on the windows in
    which they arrived.
    """

    def __init__(self) -> None:
        self.width = 1
        self._room = 0  # in the last bucket
        self._used = 0
        self._table: Floats = np.empty((ROWS, 16))

    def __len__(self) -> int:
        return self._used

    def put(self, step: float, value: float) -> None:
        """Adds one point."""
        self.add([step], [value])

    def add(self, steps: ArrayLike, values: ArrayLike) -> None:
        """Adds points, oldest first."""
        x = np.asarray(steps, np.float64)
        y = np.asarray(values, np.float64)
        begin, end = 0, len(y)
        while begin < end:
            if not self._room:
                if self._used == BUCKETS:
                    self._join_neighbours()
                count = min((end - begin) // self.width, BUCKETS - self._used)
                if count:
                    stop = begin + count * self.width
                    self._append(_buckets(x[begin:stop], y[begin:stop], count))
                    begin = stop
                    continue
                self._append(_EMPTY)
                self._room = self.width
            stop = min(begin + self._room, end)
            last = self._table[:, self._used - 1]
            last[:] = _joined(last, _buckets(x[begin:stop], y[begin:stop], 1)[:, 0])
            self._room -= stop - begin
            begin = stop

    @property
    def mark(self) -> tuple[int, int, int]:
        """A value that is another one after each change: width, buckets in use, points that still fit in the last."""
        return self.width, self._used, self._room

    def points(self, start: int = 0) -> Points:
        """Returns what to draw, from the bucket ``start`` on."""
        table = self._table[:, start : self._used]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = table[SUM] / table[FINITE]
        none = table[FINITE] == 0
        low, high = (np.where(none, np.nan, table[row]) for row in (LOW, HIGH))
        exact = self.width == 1
        return Points(
            (table[FIRST] + table[LAST]) / 2,
            low if exact else np.where(np.isfinite(means), means, np.nan),
            low,
            high,
            table[NOT_FINITE].copy(),
            exact,
        )

    def is_constant(self) -> bool:
        """Returns whether there are values, all equal and finite."""
        points = self.points()
        return len({*points.lows, *points.highs}) == 1

    def copy(self) -> Curve:
        """Returns another curve with the same points."""
        other = Curve()
        other.width, other._room, other._used = self.width, self._room, self._used
        other._table = self._table[:, : max(1, self._used)].copy()
        return other

    def save(self) -> SavedCurve:
        """Returns the curve for a checkpoint."""
        table = self._table[:, : self._used]
        if self.width == 1:
            table = np.stack([table[FIRST], np.where(table[FINITE] == 0, np.nan, table[LOW])])
        data = np.ascontiguousarray(table, dtype="<f8").tobytes()
        return SavedCurve(width=self.width, room=self._room, data=base64.b64encode(data).decode())

    @classmethod
    def load(cls, saved: SavedCurve) -> Curve:
        """Returns the curve from which ``save`` made ``saved``. Raises ValueError if there is none."""
        rows = 2 if saved.width == 1 else ROWS
        numbers = np.frombuffer(base64.b64decode(saved.data, validate=True), "<f8").astype(np.float64)
        if numbers.size % rows or numbers.size > rows * BUCKETS or not 0 <= saved.room < saved.width:
            raise ValueError("data is not a curve")
        table = numbers.reshape(rows, -1)
        curve = cls()
        curve.width, curve._room, curve._used = saved.width, saved.room, table.shape[1]
        if curve._used:
            curve._table = table if rows == ROWS else _buckets(table[0], table[1], curve._used)
        return curve

    def _append(self, columns: Floats) -> None:
        used = self._used + columns.shape[1]
        if used > self._table.shape[1]:
            table = np.empty((ROWS, min(BUCKETS, 2 * used)))
            table[:, : self._used] = self._table[:, : self._used]
            self._table = table
        self._table[:, self._used : used] = columns
        self._used = used

    def _join_neighbours(self) -> None:
        pairs = _joined(self._table[:, 0:BUCKETS:2], self._table[:, 1:BUCKETS:2])
        self._used = BUCKETS // 2
        self._table[:, : self._used] = pairs
        self.width *= 2


_EMPTY = np.array([[np.inf], [-np.inf], [0], [0], [0], [np.inf], [-np.inf]])


def _validated(given: Any) -> Curve:
    return given if isinstance(given, Curve) else Curve.load(SavedCurve.model_validate(given))


StateCurve = Annotated[Curve, PlainValidator(_validated), PlainSerializer(Curve.save, SavedCurve)]
"""A curve as a field of a saved state."""


def _buckets(steps: Floats, values: Floats, count: int) -> Floats:
    """Returns ``count`` buckets with the same number of points each."""
    steps, values = steps.reshape(count, -1), values.reshape(count, -1)
    made = np.empty((ROWS, count))
    made[FIRST], made[LAST] = steps[:, 0], steps[:, -1]
    # A sum beyond float64 has no mean, and then none is drawn.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = values.sum(axis=1)
        if np.isfinite(sums).all():
            made[FINITE], made[NOT_FINITE] = values.shape[1], 0
            made[SUM], made[LOW], made[HIGH] = sums, values.min(axis=1), values.max(axis=1)
            return made
        finite = np.isfinite(values)
        made[FINITE] = finite.sum(axis=1)
        made[NOT_FINITE] = values.shape[1] - made[FINITE]
        made[SUM] = np.where(finite, values, 0.0).sum(axis=1)
    made[LOW] = np.where(finite, values, np.inf).min(axis=1)
    made[HIGH] = np.where(finite, values, -np.inf).max(axis=1)
    return made


def _joined(one: Floats, other: Floats) -> Floats:
    """Returns a bucket for each bucket of ``one`` and its successor in ``other``."""
    made = np.empty(one.shape)
    made[FIRST], made[LAST] = np.minimum(one[FIRST], other[FIRST]), np.maximum(one[LAST], other[LAST])
    with np.errstate(over="ignore", invalid="ignore"):
        made[FINITE : SUM + 1] = one[FINITE : SUM + 1] + other[FINITE : SUM + 1]
    made[LOW], made[HIGH] = np.minimum(one[LOW], other[LOW]), np.maximum(one[HIGH], other[HIGH])
    return made
