"""``CSVFile``: a CSV file whose header grows with the names of metrics. Blocking; any thread but the event loop's.

The header is written by renaming a complete file into place, so that no crash leaves half of one, or a row under the
wrong columns: the file is either as it was, or wider, with every row.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.atomic_files import open_replacement
from eventtrain.subscribers.loggers.row_file import RowBuffer, RowFile, free_name

logger = logging.getLogger("eventtrain")

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
    """A CSV file.

    Args:
        path: of the file.
        waiting: the rows to write; another thread puts them.
        separator: one character between fields.
        own: the names of the first columns, which every row has.
        fsync: a group of rows counts as written only when it is on the disk.
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

    def cut_rows(self, row_count: int) -> None:
        """Moves all but the first ``row_count`` rows to ``<path>.cut-1`` (or -2 ...), with the header."""
        if row_count > self.row_count:
            logger.error(
                "%s has %d rows, but had %d when the checkpoint was written: it lacks rows.",
                self.path, self.row_count, row_count,
            )  # fmt: skip
        elif row_count < self.row_count:
            self.cut_at(self._offset_of(row_count), self._header_bytes)
            self.row_count = row_count

    # --- rows ---------------------------------------------------------------------------------------------------

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

    # --- the header ---------------------------------------------------------------------------------------------

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

    def _offset_of(self, row_count: int) -> int:
        """Returns the offset at which row ``row_count`` ends, or the header."""
        with open(self.path, "rb") as file:
            file.seek(len(self._header_bytes))
            deque(islice(file, row_count), maxlen=0)
            return file.tell()


def _heading(names: list[str], separator: str) -> bytes:
    special = {separator, '"', "\r", "\n"}
    quoting = csv.QUOTE_ALL if any(special & {*name} for name in names) else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n").writerow(names)
    return text.getvalue().encode()
