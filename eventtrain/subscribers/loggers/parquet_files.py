"""``ParquetFiles``: a folder of Parquet files, each of them complete at any moment. Blocking; not for the event loop.

A Parquet file can only be read once its footer is written, and cannot be appended to. So the last part is written
again with the new rows, to a temporary file that replaces it, until it is large enough for the next one to begin.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from eventtrain.runs.column_names import metric_column
from eventtrain.subscribers._shared.atomic_files import sync
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.loggers.row_file import Entry, LogFile, RowBuffer, free_name

logger = logging.getLogger("eventtrain")

Table: TypeAlias = Any  # pyarrow has no types that a checker can read
OWN = ("step", "epoch", "batch")
LARGE_BYTES = 64 << 20
"""Size in memory at which a part is full, however few rows it has."""


class ParquetFiles(LogFile[StepTable]):
    """The files ``<path>/part-00001.parquet`` and so on; a part with ``rows_per_part`` rows is not written again."""

    def __init__(self, path: Path, waiting: RowBuffer[StepTable], rows_per_part: int) -> None:
        super().__init__(path, waiting)
        self.part = 0
        """Number of the last part; 0 if there is none."""
        self.rows_in_part = 0
        self._rows_per_part = rows_per_part

    def prepare(self) -> None:
        """Creates the folder, removes what a killed run did not finish, and finds the last part."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".part-*.unfinished"):
            unfinished.unlink()
        found = (re.fullmatch(r"part-(\d{5,})\.parquet", path.name) for path in self.path.iterdir())
        self.part = max((int(match[1]) for match in found if match), default=0)
        self.rows_in_part = 0
        if self.part:
            try:
                self.rows_in_part = parquet.read_metadata(self._file(self.part)).num_rows
            except pa.ArrowInvalid as error:
                logger.error("%s is not a Parquet file, and is left alone: %s", self._file(self.part), error)
                self.part += 1

    @property
    def position(self) -> dict[str, int]:
        """The number of the last part, and of its rows."""
        return {"part": self.part, "rows": self.rows_in_part}

    def _cut(self, position: Mapping[str, int]) -> None:
        part, rows = position["part"], position["rows"]
        beside = free_name(self.path, "cut")
        beside.mkdir()
        for number in range(self.part, part, -1):
            if self._file(number).exists():
                os.rename(self._file(number), beside / self._file(number).name)
        if part and self._file(part).exists():
            table = parquet.ParquetFile(self._file(part)).read()
            if table.num_rows > rows:
                _write(table.slice(rows), beside / self._file(part).name)
                _write(table.slice(0, rows), self._file(part))
        sync(beside)
        sync(self.path)
        self.part, self.rows_in_part = part, rows

    def sync(self) -> None:
        """Waits until the names of the parts are on the disk; their content is synced before they are renamed."""
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path)

    def _groups(self, entries: Sequence[Entry[StepTable]]) -> Iterator[Sequence[Entry[StepTable]]]:
        """Yields neighbours whose metrics have the same names and types."""
        for _, group in groupby(entries, lambda entry: {n: c.dtype for n, c in entry.item.metrics.items()}):
            yield list(group)

    def _write(self, items: list[StepTable], rows: int) -> None:
        table = _table(items)
        before = None
        if self.part and self.rows_in_part < self._rows_per_part:
            before = self._last_if_small(table.schema)
        if before is not None:
            _write(pa.concat_tables([before, table]), self._file(self.part))
        else:
            _write(table, self._file(self.part + 1))
            self.part, self.rows_in_part = self.part + 1, 0
        self.rows_in_part += rows

    def _last_if_small(self, schema: Any) -> Table | None:
        """Returns the last part, if rows of ``schema`` can be added to it, and it is not too large to write again."""
        try:
            # Not read_table, which interprets the names of folders.
            with parquet.ParquetFile(self._file(self.part)) as file:
                groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
                if (
                    sum(group.total_byte_size for group in groups) >= LARGE_BYTES
                    or not file.schema_arrow.equals(schema)
                    or file.metadata.num_rows != self.rows_in_part
                ):
                    return None
                return file.read()
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            logger.error(
                "%s was changed by another program, and is left alone: %s", self._file(self.part), error
            )
            return None

    def _file(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.parquet"


def _table(tables: Sequence[StepTable]) -> Table:
    columns: dict[str, Any] = {
        "step": np.concatenate([np.asarray(table.steps, np.int64) for table in tables]),
        "epoch": np.repeat([table.epoch for table in tables], [len(table.steps) for table in tables]),
        "batch": np.concatenate([np.asarray(table.batches, np.int64) for table in tables]),
    }
    for name in tables[0].metrics:
        columns[metric_column(name, OWN)] = np.concatenate([table.metrics[name] for table in tables])
    return pa.table(columns)


def _write(table: Table, path: Path) -> None:
    """Writes a temporary file, syncs it, and renames it to ``path``."""
    unfinished = path.with_name(f".{path.name.removesuffix('.parquet')}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, unfinished, row_group_size=max(1, table.num_rows), use_dictionary=False)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
