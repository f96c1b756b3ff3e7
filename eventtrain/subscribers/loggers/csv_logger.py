"""``CSVLogger``: a table with one row for each step, or for each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from eventtrain.bus.queues import Lossless
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers._shared.validation import require_choice
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.loggers.column_names import HYPERPARAMS, metric_column
from eventtrain.subscribers.loggers.csv_file import CSVFile, CSVRows
from eventtrain.subscribers.loggers.file_logger import FileLogger, FileLoggerState

OWN = {"step": ("step", "epoch", "batch"), "epoch": ("epoch", "step", "steps", "duration_s")}
"""The first columns of a file, by the subject of a row."""


class CSVLoggerState(FileLoggerState):
    """State of a ``CSVLogger``; ``rows`` is the number of rows in the file."""

    rows: int


class CSVLogger(FileLogger[CSVFile, CSVLoggerState]):
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

    Rows are in the file within 0.5 s, when an epoch's handler has returned, and after ``stop``; before a checkpoint is
    committed they are synced. A run that resumes from it moves rows that were written later to a file beside
    (``<path>.cut-1`` ...), and writes them again; so does a run that was to resume and found nothing saved, with all
    that the file contains. A failed write is raised in the handler, and so published as SubscriberFailed; the rows are
    kept and written when that works again. While 32 MiB of rows wait, training waits too.

    Raises:
        ConfigurationError: the path leaves ``run_dir`` by ``..``, or another argument is invalid; when a run starts,
            the existing file has other columns, or cannot be written.
    """

    _state_type = CSVLoggerState
    _urgent = frozenset({EpochCompleted})
    queue = Lossless(limit=256)  # windows of up to 1,024 steps

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

    def _state_of(self, file: CSVFile | None) -> CSVLoggerState:
        return CSVLoggerState(path=str(self._path), rows=0 if file is None else file.row_count)

    def _cut(self, file: CSVFile, saved: CSVLoggerState) -> None:
        file.cut_rows(saved.rows)
