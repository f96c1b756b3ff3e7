"""``ParquetParts``: a folder of Parquet files, each of them whole at any moment. Blocking; not for the event loop.

A Parquet file can only be read once its footer is written, and not be appended to. So the last part is written anew,
with what came, beside itself and renamed, until it is large enough for the next one to begin.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from eventtrain.subscribers._shared.atomic_files import sync
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.loggers.column_names import metric_column
from eventtrain.subscribers.loggers.row_buffer import WaitingRows
from eventtrain.subscribers.loggers.row_file import free_name

logger = logging.getLogger("eventtrain")

Table: TypeAlias = Any  # pyarrow has no types that a checker can read
OWN = ("step", "epoch", "batch")
LARGE_BYTES = 64 << 20
"""In memory, at which a part is large enough, however few rows it has."""


class ParquetParts:
    """Rows on their way to ``<path>/part-00001.parquet`` and so on. The methods block; one thread at a time or several.

    Args:
        path: of the folder.
        rows: what waits; another thread puts into it.
        rows_per_part: a part of so many rows is not written again.
    """

    def __init__(self, path: Path, rows: WaitingRows[StepTable], rows_per_part: int) -> None:
        self.path = path
        self.rows = rows
        self.part = 0
        """Number of the last part; 0: there is none."""
        self.rows_in_part = 0
        self._rows_per_part = rows_per_part
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Make the folder, remove what a killed run did not finish, find the last part."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".part-*.unfinished"):
            unfinished.unlink()
        self.part = self._last_part()
        self.rows_in_part = 0
        if self.part:
            try:
                self.rows_in_part = parquet.read_metadata(self._file(self.part)).num_rows
            except pa.ArrowInvalid as error:
                logger.error("%s is no Parquet file, and stays as it is: %s", self._file(self.part), error)
                self.part += 1

    def cut(self, part: int, rows: int) -> None:
        """Move what lies behind row ``rows`` of part ``part`` to a folder ``<path>.cut-1`` (or -2 ...)."""
        if (self.part, self.rows_in_part) < (part, rows):
            logger.error(
                "%s ends with row %d of part %d, but ended with row %d of part %d when the checkpoint was written: "
                "rows are missing in it.",
                self.path, self.rows_in_part, self.part, rows, part,
            )  # fmt: skip
        if (self.part, self.rows_in_part) <= (part, rows):
            return
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

    def commit(self) -> None:
        """Write every waiting row, in whole parts.

        Raises:
            OSError: it failed; every part is as it was before, and the rows that are in none still wait.
        """
        with self._lock:
            entries, done = self.rows.take(), 0
            try:
                for _, group in groupby(entries, lambda entry: _kinds(entry.item)):
                    alike = list(group)
                    self._extend(_table([entry.item for entry in alike]))
                    self.rows_in_part += self.rows.written(alike)
                    done += len(alike)
            except BaseException:
                self.rows.give_back(entries[done:])
                raise

    def sync(self) -> None:
        """Have the disk hold the names of the parts; what is in them is synced before they get them."""
        sync(self.path)

    def _extend(self, table: Table) -> None:
        if self.part and self.rows_in_part < self._rows_per_part:
            before = self._last_if_small(table.schema)
            if before is not None:
                _write(pa.concat_tables([before, table]), self._file(self.part))
                return
        _write(table, self._file(self.part + 1))
        self.part, self.rows_in_part = self.part + 1, 0

    def _last_if_small(self, schema: Any) -> Table | None:
        """The last part, if rows of ``schema`` can be added to it, and it is not too large to be written again."""
        try:
            with parquet.ParquetFile(
                self._file(self.part)
            ) as file:  # and not read_table, which looks at folders' names
                groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
                small = sum(group.total_byte_size for group in groups) < LARGE_BYTES
                if (
                    not small
                    or not file.schema_arrow.equals(schema)
                    or file.metadata.num_rows != self.rows_in_part
                ):
                    return None
                return file.read()
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            logger.error("%s was changed by somebody, and stays as it is: %s", self._file(self.part), error)
            return None

    def _file(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.parquet"

    def _last_part(self) -> int:
        found = (re.fullmatch(r"part-(\d{5,})\.parquet", path.name) for path in self.path.iterdir())
        return max((int(match[1]) for match in found if match), default=0)


def _kinds(table: StepTable) -> dict[str, Any]:
    return {name: column.dtype for name, column in table.metrics.items()}


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
    """Write a whole file and give it its name, in the place of one that has it."""
    unfinished = path.with_name(f".{path.name.removesuffix('.parquet')}.unfinished")
    try:
        parquet.write_table(table, unfinished, row_group_size=max(1, table.num_rows), use_dictionary=False)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
