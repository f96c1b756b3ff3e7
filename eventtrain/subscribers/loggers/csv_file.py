"""``CSVFile``: a CSV file whose header grows with the names of metrics. Blocking; any thread but the event loop's.

The header is written by renaming a whole file into place, so no crash leaves half of one, and a row is never torn from
its columns: the file is either as it was, or wider, with every row.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.atomic_files import open_replacement
from eventtrain.subscribers.loggers.row_buffer import WaitingRows
from eventtrain.subscribers.loggers.row_file import RowFile, free_name

logger = logging.getLogger("eventtrain")

CHUNK_BYTES = 1 << 20
WORDS = (
    (b"u", b"null", b""),
    (b"N", b"NaN", b"nan"),
    (b"I", b"Infinity", b"inf"),
    (b"u", b"true", b"True"),
    (b"f", b"false", b"False"),
)
"""What JSON calls values that CSV calls otherwise. No field holds anything but a number, so these can be nothing else;
a letter of each, since looking for one costs next to nothing."""


@dataclass(frozen=True, slots=True)
class CSVRows:
    """Some rows by columns: name -> one value for each, or one for all of them."""

    count: int
    columns: Mapping[str, np.ndarray[Any, Any] | range | bool | int | float]


class CSVFile:
    """Rows on their way to one CSV file.

    Args:
        path: of the file.
        rows: what waits; another thread puts into it.
        separator: one character between fields.
        own: the names of the first columns, which every row has.
        fsync: have the disk hold each group of rows before it counts as written.
    """

    def __init__(
        self, path: Path, rows: WaitingRows[CSVRows], *, separator: str, own: tuple[str, ...], fsync: bool
    ) -> None:
        self.path = path
        self.rows = rows
        self._file = RowFile(path, rows, self._render, fsync=fsync)
        self._separator = separator
        self._own = own
        self._header: list[str] = []
        self._header_bytes = b""
        self._rows_before = 0

    def prepare(self, *, append: bool = True) -> None:
        """Make the folder and read the header; a torn last row is moved to ``<path>.torn``.

        Args:
            append: False: move a file that is there to ``<path>.before-1`` (or -2 ...), and begin another.

        Raises:
            ConfigurationError: the file there has other columns, so that rows cannot be added to it.
        """
        if not append and self.path.exists() and self.path.stat().st_size:
            self.path.rename(free_name(self.path, "before"))
        self._wider.unlink(missing_ok=True)
        self._file.prepare()
        self._header, self._header_bytes = self._read_header()
        self._rows_before = self._count_rows() - self._file.row_count

    @property
    def row_count(self) -> int:
        """Rows in the file, without the header."""
        return self._rows_before + self._file.row_count

    def cut(self, row_count: int) -> None:
        """Move what lies behind so many rows to ``<path>.cut-1`` (or -2 ...), with the header."""
        if row_count > self.row_count:
            logger.error(
                "%s has %d rows, but had %d when the checkpoint was written: rows are missing in it.",
                self.path, self.row_count, row_count,
            )  # fmt: skip
        elif row_count < self.row_count:
            self._file.cut(self._offset_of(row_count), self._header_bytes)
            self._rows_before = row_count - self._file.row_count

    def commit(self) -> None:
        """Write every waiting row, whole or not at all. Raises OSError, and then they still wait."""
        self._file.commit()

    def sync(self) -> None:
        """Have the disk hold what was written."""
        self._file.sync()

    # --- rows ---------------------------------------------------------------------------------------------------

    def _render(self, items: list[CSVRows]) -> bytes:
        if self._header and not (self.path.exists() and self.path.stat().st_size):  # somebody took it away
            self._header, self._header_bytes, self._rows_before = [], b"", -self._file.row_count
        known = set(self._header)
        names = dict.fromkeys(self._own if not self._header else ())
        for item in items:
            names |= dict.fromkeys(name for name in item.columns if name not in known)
        if names:
            self._widen(list(names))
        return b"\n".join(self._lines(item) for item in items)

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
        for letter, json, here in WORDS:
            if letter in text:
                text = text.replace(json, here)
        return text if self._separator == "," else text.replace(b",", self._separator.encode())

    # --- the header ---------------------------------------------------------------------------------------------

    @property
    def _wider(self) -> Path:
        return self.path.with_name(f".{self.path.name}.wider")

    def _widen(self, names: list[str]) -> None:
        """Write the whole file with more columns, empty in the rows there are, and put it in the place of this one."""
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
        if not self.path.stat().st_size:
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

    def _refusal(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"CSVLogger cannot add rows to {self.path}: {what}, and should begin "
            f"{self._separator.join(self._own)!r}. Give another path, the separator and `per` it was written with, or "
            "append=False."
        )

    def _count_rows(self) -> int:
        with open(self.path, "rb") as file:
            file.seek(len(self._header_bytes))
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))

    def _offset_of(self, row_count: int) -> int:
        """Where row ``row_count`` ends, or the header."""
        offset = len(self._header_bytes)
        with open(self.path, "rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                lines = chunk.count(b"\n")
                if lines >= row_count:
                    break
                row_count -= lines
                offset += len(chunk)
        place = 0
        for _ in range(row_count):
            place = chunk.index(b"\n", place) + 1
        return offset + place


def _heading(names: Iterable[str], separator: str) -> bytes:
    names = list(names)
    special = {separator, '"', "\r", "\n"}
    quoting = csv.QUOTE_ALL if any(special & {*name} for name in names) else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n").writerow(names)
    return text.getvalue().encode("utf-8")
