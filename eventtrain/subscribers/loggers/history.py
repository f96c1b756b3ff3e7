"""``History``: the metrics of a run's epochs and steps, kept in memory as columns; ``ColumnStore`` has them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.notebook import html
from eventtrain.subscribers._shared.metric_html import metrics_html, newest
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    import pandas

ColumnArray = np.ndarray[tuple[int], np.dtype[Any]]  # of booleans, integers or floats
OWN = ("epoch", "step", "steps", "duration_s")
"""The first columns of ``History.epochs``."""


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
        return self._total - self.rows

    @property
    def rows(self) -> int:
        """Number of rows."""
        return min(self._rows, self._limit)

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


class HistoryState(SavedState):
    """State of a ``History``."""

    version: Literal[1] = 1
    epochs: SavedColumns
    steps: SavedColumns


class History(Subscriber):
    """Keeps the metrics and hyperparameters of each epoch, and optionally of each step.

    Args:
        steps: also keep every step's metrics, by windows: no event is built for a step.
        max_epochs, max_steps: rows kept; older ones are dropped and counted. A step takes 16 bytes and what its metrics
            take, twice that at most: of three float32, 100,000 steps are 2.8 to 5.6 MB in memory, and 3.7 MB in each
            checkpoint.

    A run that resumes has the history of the whole run. After the run, ``trainer.fit`` again adds to it. Any thread
    may read it, at any time.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    @checked
    def __init__(self, steps: bool = False, *, max_epochs: int = 100_000, max_steps: int = 100_000) -> None:
        require_count("History", "max_epochs", max_epochs, at_least=1)
        require_count("History", "max_steps", max_steps, at_least=1)
        self.events = EpochCompleted | StepsCompleted if steps else EpochCompleted
        self._epochs = ColumnStore(max_epochs)
        self._steps = ColumnStore(max_steps)

    @property
    def epochs(self) -> dict[str, ColumnArray]:
        """One row for each epoch.

        ``epoch``, ``step`` (its last), ``steps``, ``duration_s``, then the metrics, those of evaluations with ``val_``,
        then the hyperparameters. A metric with one of the first four names is called ``metric_<name>``, a
        hyperparameter whose name is taken ``hyperparam_<name>``.
        """
        return self._epochs.columns()

    @property
    def steps(self) -> dict[str, ColumnArray]:
        """One row for each step: ``step``, ``epoch``, then the metrics, with the dtype they had on the device."""
        return self._steps.columns()

    @property
    def dropped_epochs(self) -> int:
        """Number of the oldest rows that were dropped."""
        return self._epochs.dropped

    @property
    def dropped_steps(self) -> int:
        """Number of the oldest rows that were dropped."""
        return self._steps.dropped

    def __repr__(self) -> str:
        epochs = self.epochs
        values = newest(epochs, OWN)
        return f"<History of {self._counted(epochs)}{': ' if values else ''}{values}>"

    def _repr_html_(self) -> str:
        epochs, steps = self.epochs, self.steps
        return html.box(html.title("History", self._counted(epochs)), metrics_html(epochs, steps, OWN))

    def _counted(self, epochs: Mapping[str, ColumnArray]) -> str:
        rows, steps = len(epochs.get("epoch", ())), self._steps.rows
        return f"{rows:,} epochs" + (f" and {steps:,} steps" if steps else "")

    def to_dataframe(self, rows: Literal["epochs", "steps"] = "epochs") -> pandas.DataFrame:
        """Returns ``epochs`` or ``steps`` as a pandas DataFrame.

        Raises:
            ConfigurationError: pandas is missing, or ``rows`` is neither.
        """
        require_choice("History.to_dataframe", "rows", rows, ("epochs", "steps"))
        frames = import_optional("pandas", extra="dataframe", used_by="History.to_dataframe()")
        require_installed(frames)
        return frames.DataFrame(self.epochs if rows == "epochs" else self.steps)

    async def start(self, run: RunContext) -> None:
        """Removes the rows of an attempt of which nothing was saved."""
        if run.restarts:
            self._epochs.clear()
            self._steps.clear()

    async def handle(self, event: Event) -> None:
        """Adds a row, or the rows of a window."""
        if isinstance(event, StepsCompleted):
            numbers = np.arange(event.first_step, event.last_step + 1)
            chunk = {"step": numbers, "epoch": np.full(len(numbers), event.epoch)}
            self._steps.add(_with_names(chunk, event.metrics, "metric"))
        elif isinstance(event, EpochCompleted):
            self._epochs.add(_epoch_row(event))

    def state_dict(self) -> dict[str, Any]:
        """Returns all rows, as plain JSON data."""
        return HistoryState(epochs=self._epochs.saved, steps=self._steps.saved).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the rows of a checkpoint. Raises StateError for another version or invalid data."""
        saved = HistoryState.parse(self.name or "History", state)
        self._epochs.load(saved.epochs)
        self._steps.load(saved.steps)


def epoch_columns(events: Sequence[EpochCompleted]) -> dict[str, ColumnArray]:
    """Returns the columns of ``History.epochs`` for these epochs."""
    store = ColumnStore(max(1, len(events)))
    for event in events:
        store.add(_epoch_row(event))
    return store.columns()


def _epoch_row(event: EpochCompleted) -> dict[str, ColumnArray]:
    row = _with_names(_row({name: getattr(event, name) for name in OWN}), _row(event.metrics), "metric")
    return _with_names(row, _row(event.hyperparams), "hyperparam")


def _row(values: Mapping[str, Number]) -> dict[str, ColumnArray]:
    columns = {name: np.asarray([value]) for name, value in values.items()}
    return {name: c if c.dtype.kind in "biuf" else c.astype(np.float64) for name, c in columns.items()}


def _with_names(
    columns: Mapping[str, ColumnArray], more: Mapping[str, ColumnArray], prefix: str
) -> dict[str, ColumnArray]:
    """Returns both; the names of ``more`` that are taken get ``prefix``."""
    together = dict(columns)
    for name, column in more.items():
        free = name
        while free in together or (free != name and free in more):
            free = f"{prefix}_{free}"
        together[free] = column
    return together
