"""``CSVJournal``: rows of a CSV log as events; ``TableJournal``: what it shares with the reader of Parquet logs.

The place of a reader is a number of rows, which stays right if a file gets a column. A resumed run that cuts rows off
leaves them in ``<path>.cut-1`` (or -2 ...): a new one tells the reader, with its first step, where to read again.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from eventtrain.errors import EventParseError
from eventtrain.events import EpochCompleted, Event, StepCompleted
from eventtrain.events.models import FrozenDict, Number, copies
from eventtrain.runs.column_names import HYPERPARAMS, metric_of
from eventtrain.runs.rows import Wanted

STEP_COLUMNS = ("step", "epoch", "batch")
EPOCH_COLUMNS = ("epoch", "step", "steps", "duration_s")
CHUNK_ROWS = 4096

Row = Mapping[str, Number]


class TableJournal(ABC):
    """Reads a table whose rows are steps, or epochs.

    Args:
        path: of the file or folder.
        wanted: the events to return.

    Attributes:
        rows: number of rows that were read.
    """

    knows_end = False
    ended = False

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self.path = path
        self.rows = 0
        self.unread_bytes = 0
        self._wanted = wanted
        self._cuts = set(self._cut_paths())

    def read(self) -> Iterator[Event]:
        """Yields the wanted events that were written since the last call.

        Raises:
            EventParseError: it is not a table of a logger. OSError: it cannot be read.
        """
        while True:
            rows = self._next_rows()
            if new := set(self._cut_paths()) - self._cuts:  # which may be why the rows make no sense
                self._cuts |= new
                self._go_back_to(min(self._first_step(path) for path in new))
                continue
            if not rows:
                return
            for event in self._events(rows):
                self.rows += 1
                if self._wanted.takes_event(event):
                    yield event

    def _events(self, rows: Sequence[Any]) -> Sequence[Event]:
        """Returns the events of ``_next_rows``."""
        return events_of(rows)

    def _go_back_to(self, step: int) -> None:
        """Continues at the row of ``step`` in the newest run of the table, if that was read."""
        steps = self._steps()
        row = len(steps)
        while row and steps[row - 1] >= step and (row == len(steps) or steps[row - 1] < steps[row]):
            row -= 1
        if row < self.rows:
            self.rows = row

    def _cut_paths(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}.cut-*"))

    @abstractmethod
    def _next_rows(self) -> Sequence[Any]:
        """Returns some rows from ``rows`` on; none at the end."""

    @abstractmethod
    def _steps(self) -> list[int]:
        """Returns the step of each row."""

    @abstractmethod
    def _first_step(self, path: Path) -> int:
        """Returns the step of the first row of a table that was cut off."""


def events_of(rows: Sequence[Row]) -> Sequence[Event]:
    """Returns StepCompleted, or EpochCompleted, for each row; only the first one is validated."""
    if not rows:
        return []
    if "batch" in rows[0]:
        own, first = STEP_COLUMNS, StepCompleted(step=0, epoch=0, batch=0, metrics={})
        changes = [
            {**{name: row[name] for name in own}, "metrics": FrozenDict(_metrics(row, own))} for row in rows
        ]
        return copies(first, changes)
    own = EPOCH_COLUMNS
    return [
        EpochCompleted(
            **{name: row[name] for name in own},  # pyright: ignore[reportArgumentType]
            metrics=_metrics(row, own),
            hyperparams={
                name.removeprefix(HYPERPARAMS): value
                for name, value in row.items()
                if name.startswith(HYPERPARAMS)
            },
        )
        for row in rows
    ]


def _metrics(row: Row, own: tuple[str, ...]) -> dict[str, Number]:
    return {
        metric_of(name, own): value
        for name, value in row.items()
        if name not in own and not name.startswith(HYPERPARAMS)
    }


class CSVJournal(TableJournal):
    """Reads a file of ``CSVLogger``. A field that is empty is a metric that the row lacks."""

    def __init__(self, path: Path, wanted: Wanted) -> None:
        super().__init__(path, wanted)
        self._header = b""
        self._offset = 0
        self._rows_at_offset = 0

    def _go_back_to(self, step: int) -> None:
        super()._go_back_to(step)
        self._header = b""

    def _next_rows(self) -> list[bytes]:
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            header = file.readline()
            if header != self._header:  # at first, and when a column was added
                self._header, self._offset, self._rows_at_offset = header, file.tell(), 0
            file.seek(self._offset)
            for line in islice(file, self.rows - self._rows_at_offset):
                self._offset += len(line)
            self._rows_at_offset = self.rows
            lines = list(islice(file, CHUNK_ROWS))
        self.unread_bytes = len(lines.pop()) if lines and not lines[-1].endswith(b"\n") else 0
        return lines

    def _events(self, rows: Sequence[bytes]) -> Sequence[Event]:
        names, separator = _columns(self.path, self._header)
        return events_of([
            self._row(names, line.decode().rstrip("\n").split(separator), self.rows + n)
            for n, line in enumerate(rows, 1)
        ])  # fmt: skip

    def _row(self, names: list[str], fields: list[str], number: int) -> dict[str, Number]:
        try:
            return {name: _number(field) for name, field in zip(names, fields, strict=True) if field}
        except ValueError as error:
            raise EventParseError(f"{self.path}, row {number}: {error}") from error

    def _steps(self) -> list[int]:
        with self.path.open("rb") as file:
            names, separator = _columns(self.path, file.readline())
            index = names.index("step")
            return [int(line.split(separator.encode())[index]) for line in file if line.endswith(b"\n")]

    def _first_step(self, path: Path) -> int:
        with path.open("rb") as file:
            names, separator = _columns(path, file.readline())
            return int(file.readline().split(separator.encode())[names.index("step")])


def _columns(path: Path, header: bytes) -> tuple[list[str], str]:
    """Returns the names of the columns, and the separator, which follows the first name."""
    text = header.decode()
    begin = text.lstrip('"')
    name = next((name for name in ("step", "epoch") if begin.startswith(name)), "")
    separator = begin.removeprefix(name).lstrip('"')[:1]
    names = next(csv.reader([text], delimiter=separator)) if name and separator else []
    if not (set(STEP_COLUMNS) <= set(names) or set(EPOCH_COLUMNS) <= set(names)):
        raise EventParseError(f"{path} is not a table of CSVLogger: its header begins {text[:80]!r}.")
    return names, separator


def _number(text: str) -> Number:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)
