"""``CSVLogger``: a table with one row for each step, or for each epoch; ``CSVFile`` writes it."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic_core import to_json

from eventtrain.bus.queues import Lossless
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.runs.column_names import HYPERPARAMS, metric_column
from eventtrain.subscribers._shared.atomic_files import open_replacement
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.loggers.file_logger import FileLogger, FileLoggerState
from eventtrain.subscribers.loggers.row_file import RowBuffer, RowFile, free_name
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice

OWN = {"step": ("step", "epoch", "batch"), "epoch": ("epoch", "step", "steps", "duration_s")}
"""The first columns of a file, by the subject of a row."""
CHUNK_BYTES = 1 << 20
WORDS = (
    (b"u", b"null", b""),
    (b"N", b"NaN", b"nan"),
    (b"I", b"Infinity", b"inf"),
    (b"u", b"true", b"True"),
    (b"f", b"false", b"False"),
)
"""Values that are written differently in JSON and CSV. Fields hold numbers only, so that nothing else contains these
words; a letter of each, since a search for one letter costs next to nothing."""


@dataclass(frozen=True, slots=True)
class CSVRows:
    """Some rows as columns: name -> one value for each row, or one for all of them."""

    count: int
    columns: Mapping[str, np.ndarray[Any, Any] | range | bool | int | float]


class CSVFile(RowFile[CSVRows]):
    """A CSV file whose header grows with the names of metrics; ``own``: of the first columns, which every row has.

    The header is written by renaming a complete file into place, so that no crash leaves half of one, or a row under
    the wrong columns: the file is either as it was, or wider, with every row.
    """

    def __init__(
        self, path: Path, waiting: RowBuffer[CSVRows], *, separator: str, own: tuple[str, ...], fsync: bool
    ) -> None:
        super().__init__(path, waiting, fsync=fsync)
        self.row_count = 0
        """Rows in the file, without the header."""
        self._separator = separator
        self._own = own
        self._header: list[str] = []
        self._header_bytes = b""

    def prepare(self, *, append: bool = True) -> None:
        """Creates the folder and reads the header; a torn last row is moved to ``<path>.torn``.

        Args:
            append: False: move an existing file to ``<path>.before-1`` (or -2 ...), and begin a new one.

        Raises:
            ConfigurationError: the existing file has other columns, so that rows cannot be appended to it.
        """
        if not append and self._has_content():
            self.path.rename(free_name(self.path, "before"))
        self._wider.unlink(missing_ok=True)
        super().prepare()
        self._header, self._header_bytes = self._read_header()
        with open(self.path, "rb") as file:
            file.seek(len(self._header_bytes))
            self.row_count = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))

    @property
    def position(self) -> dict[str, int]:
        """The number of rows."""
        return {"rows": self.row_count}

    def _cut(self, position: Mapping[str, int]) -> None:
        self.row_count = position["rows"]
        with open(self.path, "rb") as file:
            file.seek(len(self._header_bytes))
            deque(islice(file, self.row_count), maxlen=0)
            offset = file.tell()
        self._cut_at(offset, self._header_bytes)

    def _write(self, items: list[CSVRows], rows: int) -> None:
        super()._write(items, rows)
        self.row_count += rows

    def _render(self, items: list[CSVRows]) -> bytes:
        if self._header and not self._has_content():  # the file was deleted
            self._header, self._header_bytes, self.row_count = [], b"", 0
        known = set(self._header)
        names = dict.fromkeys(self._own if not self._header else ())
        for item in items:
            names |= dict.fromkeys(name for name in item.columns if name not in known)
        if names:
            self._widen(list(names))
        return b"\n".join([*map(self._lines, items), b""])

    def _lines(self, item: CSVRows) -> bytes:
        columns: list[Iterable[Any]] = []
        for name in self._header:
            column = item.columns.get(name)
            if isinstance(column, np.ndarray):
                columns.append(column.tolist())
            else:
                columns.append(column if isinstance(column, range) else repeat(column, item.count))
        text = to_json(list(zip(*columns, strict=True)), inf_nan_mode="constants")[2:-2]
        text = text.replace(b"],[", b"\n")
        for letter, in_json, in_csv in WORDS:
            if letter in text:
                text = text.replace(in_json, in_csv)
        return text if self._separator == "," else text.replace(b",", self._separator.encode())

    @property
    def _wider(self) -> Path:
        return self.path.with_name(f".{self.path.name}.wider")

    def _has_content(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _widen(self, names: list[str]) -> None:
        """Replaces the file by one with more columns, which are empty in the existing rows."""
        header = [*self._header, *names]
        heading = _heading(header, self._separator)
        line_end = self._separator.encode() * len(names) + b"\n" if self._header else b"\n"
        with open_replacement(self._wider, self.path) as new, open(self.path, "ab+") as old:
            new.write(heading)
            old.seek(len(self._header_bytes))
            while chunk := old.read(CHUNK_BYTES):
                new.write(chunk.replace(b"\n", line_end))
        self._header, self._header_bytes = header, heading

    def _read_header(self) -> tuple[list[str], bytes]:
        if not self._has_content():
            return [], b""
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                header = next(csv.reader(file, delimiter=self._separator, strict=True))
        except (ValueError, csv.Error) as error:
            raise self._refusal(f"its header cannot be read ({error})") from error
        heading = _heading(header, self._separator)
        with open(self.path, "rb") as file:
            as_written = file.read(len(heading)) == heading
        if tuple(header[: len(self._own)]) != self._own or not as_written or len({*header}) < len(header):
            raise self._refusal(f"its header begins {self._separator.join(header)[:80]!r}")
        return header, heading

    def _refusal(self, problem: str) -> ConfigurationError:
        return ConfigurationError(
            f"CSVLogger cannot add rows to {self.path}: {problem}, and should begin "
            f"{self._separator.join(self._own)!r}. Give another path, the separator and `per` it was written with, or "
            "append=False."
        )


def _heading(names: list[str], separator: str) -> bytes:
    special = {separator, '"', "\r", "\n"}
    quoting = csv.QUOTE_ALL if any(special & {*name} for name in names) else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n").writerow(names)
    return text.getvalue().encode()


class CSVLoggerState(FileLoggerState):
    """State of a ``CSVLogger``; ``rows`` is the number of rows in the file."""

    rows: int = 0


class CSVLogger(FileLogger[CSVFile]):
    """Appends one row for each step, or each epoch, to a CSV file.

    Args:
        path: relative to ``run_dir``; missing folders are created.
        separator: one character between fields.
        append: append to an existing file; False: a run that does not resume moves it to ``<path>.before-1`` (or -2
            ...).
        per: "step": ``step``, ``epoch``, ``batch`` and the metrics, made from whole windows, without an event for each
            step; "epoch": ``epoch``, ``step``, ``steps``, ``duration_s``, the metrics, and the hyperparameters as
            ``hyperparams.<name>``.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long.
        fsync: wait until each group of rows is on the disk, for machines that may lose power.

    Numbers are written with the shortest digits that are read back as the same number; NaN and infinities as ``nan``,
    ``inf`` and ``-inf``, booleans as ``True`` and ``False``. A metric that a row lacks is an empty field. One that
    appears later adds a column at the right: the whole file is written to a temporary one and renamed, so that no
    crash loses a row. A metric named like one of the file's own columns gets ``metrics.`` before its name.

    When rows are written, a resumed run and a failed write are as of ``JSONLLogger``.

    Raises:
        ConfigurationError: the path leaves ``run_dir`` by ``..``, or another argument is invalid; when a run starts,
            the existing file has other columns, or cannot be written.
    """

    _state_type = CSVLoggerState
    _urgent = frozenset({EpochCompleted})
    queue = Lossless(limit=256)  # windows of up to 1,024 steps

    @checked
    def __init__(
        self,
        path: str | Path,
        separator: str = ",",
        append: bool = True,
        *,
        per: Literal["step", "epoch"] = "step",
        flush_interval_s: float = 0.25,
        fsync: bool = False,
    ) -> None:
        super().__init__(path, flush_interval_s)
        if (
            len(separator) != 1
            or separator.isalnum()
            or not separator.isascii()
            or separator in '"+-._\r\n\0'
        ):
            raise ConfigurationError(
                f"CSVLogger(separator={separator!r}): separator must be one character that does not occur in numbers, "
                'such as "," or ";" or "\\t".'
            )
        require_choice("CSVLogger", "per", per, ("step", "epoch"))
        self.events = (StepsCompleted, EpochCompleted) if per == "step" else EpochCompleted
        self._separator = separator
        self._append = append
        self._own = OWN[per]
        self._per_step = per == "step"
        self._fsync = fsync

    def _make_file(self, path: Path) -> CSVFile:
        return CSVFile(path, self._waiting, separator=self._separator, own=self._own, fsync=self._fsync)

    def _prepare(self, file: CSVFile, run: RunContext) -> None:
        file.prepare(append=self._append or run.resumed or run.restarts)

    def _put(self, event: Event) -> None:
        if isinstance(event, StepsCompleted):
            table = StepTable.of(event, self.every)
            columns: dict[str, Any] = {"step": table.steps, "epoch": table.epoch, "batch": table.batches}
            columns |= {metric_column(name, self._own): column for name, column in table.metrics.items()}
            self._put_table(table, CSVRows(len(table.steps), columns))
        elif isinstance(event, EpochCompleted) and not self._per_step:
            columns = {name: getattr(event, name) for name in self._own}
            columns |= {metric_column(name, self._own): value for name, value in event.metrics.items()}
            columns |= {f"{HYPERPARAMS}{name}": value for name, value in event.hyperparams.items()}
            self._waiting.put(CSVRows(1, columns), 1, 200 * len(columns))
