"""``ParquetLogger``: the metrics of all steps as a folder of Parquet files."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from eventtrain.bus.queues import Lossless
from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.loggers.file_logger import FileLogger, FileLoggerState
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from eventtrain.subscribers.loggers.parquet_files import ParquetFiles

parquet_files: Any = import_optional(
    "eventtrain.subscribers.loggers.parquet_files", extra="parquet", used_by="ParquetLogger"
)

HURRY_S = 1.0
"""Shortest time between two parts written for the end of an epoch."""


class ParquetLoggerState(FileLoggerState):
    """State of a ``ParquetLogger``: the number of the last part, 0 if there is none, and its rows."""

    part: int = 0
    rows: int = 0


class ParquetLogger(FileLogger["ParquetFiles"]):
    """Appends one row for each step to a folder of Parquet files, ``part-00001.parquet`` and so on.

    Args:
        path: of the folder, relative to ``run_dir``; created if missing. Existing parts remain, and new ones follow.
        rows_per_part: number of rows at which the next part begins.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long, and until its part is
            written.

    Columns are ``step``, ``epoch``, ``batch`` and the metrics, each with its own type, made from whole windows, without
    an event for each step. A metric named like one of these three gets ``metrics.`` before its name.

    A reader of the folder finds complete files only, also after a crash or a kill: a part is written to a temporary
    file, synced and renamed. Until it is full, the last part is written again with the rows that were added; that is
    also done soon after the end of an epoch, before a checkpoint is committed and in ``stop``. Metrics that change, by
    name or type, begin another part.

    A resumed run and a failed write are as of ``JSONLLogger``.

    Raises:
        ConfigurationError: pyarrow is missing, the path leaves ``run_dir`` by ``..``, or another argument is invalid;
            when a run starts, the folder cannot be written.
    """

    _state_type = ParquetLoggerState
    _is_folder = True
    events = (StepsCompleted, EpochCompleted)
    queue = Lossless(limit=256)  # windows of up to 1,024 steps

    @checked
    def __init__(
        self, path: str | Path, *, rows_per_part: int = 50_000, flush_interval_s: float = 5.0
    ) -> None:
        require_installed(parquet_files)
        super().__init__(path, flush_interval_s)
        require_count("ParquetLogger", "rows_per_part", rows_per_part, at_least=1)
        self._rows_per_part = rows_per_part
        self._hurried_s = 0.0

    def _make_file(self, path: Path) -> ParquetFiles:
        return parquet_files.ParquetFiles(path, self._waiting, self._rows_per_part)

    def _put(self, event: Event) -> None:
        if isinstance(event, StepsCompleted):
            self._put_table(StepTable.of(event, self.every))
        elif self._commits is not None and monotonic() - self._hurried_s >= HURRY_S:
            self._hurried_s = monotonic()
            self._commits.hurry()
