"""``CSVLogger``: a table with one row for each step, or for each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from eventtrain.bus.queues import Lossless
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers._shared.validation import require_choice, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.column_names import HYPERPARAMS, metric_column
from eventtrain.subscribers.loggers.csv_file import CSVFile, CSVRows
from eventtrain.subscribers.loggers.group_commit import GroupCommit, open_in_thread
from eventtrain.subscribers.loggers.row_buffer import WaitingRows

OWN = {"step": ("step", "epoch", "batch"), "epoch": ("epoch", "step", "steps", "duration_s")}
"""The first columns of a file, by what has a row."""


class CSVLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    path: str
    rows: int
    """Of the file at the cut."""


class CSVLogger(Subscriber):
    """Appends one row per step, or per epoch, to a CSV file.

    Args:
        path: relative to ``run_dir``; missing folders are made.
        separator: one character between fields.
        append: add to a file that is there; False: a run that begins moves it to ``<path>.before-1`` (or -2 ...).
        per: "step": ``step``, ``epoch``, ``batch`` and the metrics, made from whole windows, without an event for each
            step; "epoch": ``epoch``, ``step``, ``steps``, ``duration_s``, the metrics, and the hyperparameters as
            ``hyperparams.<name>``.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long.
        fsync: have the disk hold each group of rows, for machines that may lose power.

    Numbers are written with the shortest digits that are read back as the same number; NaN and infinities as ``nan``,
    ``inf`` and ``-inf``, booleans as ``True`` and ``False``. A metric that a row lacks is an empty field. One that
    appears later adds a column at the right: the file is written anew beside itself and renamed, so that no
    crash loses a row. A metric named like one of the file's own columns gets ``metrics.`` before its name.

    Rows are in the file within 0.5 s, when an epoch's handler has returned, and after ``stop``; before a checkpoint is
    committed they are synced. A run that resumes from it cuts off what was written later, keeps that beside the
    file (``<path>.cut-1`` ...), and writes those rows again; so does a run that was to resume and found nothing saved,
    with all that the file holds. A failed write is raised in the handler, and so said by SubscriberFailed; the
    rows are kept and written again when that works. While 32 MiB of rows wait, training waits too.

    Raises:
        ConfigurationError: the path leaves ``run_dir`` by ``..``, or an argument cannot work; when a run starts, that
            the file there has other columns, or cannot be written.
    """

    disable_after = None  # a full disk is no reason to stop logging once there is room again
    queue = Lossless(limit=256)  # windows, of up to 1,024 steps each

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
        if (
            len(separator) != 1
            or separator.isalnum()
            or not separator.isascii()
            or separator in '"+-._\r\n\0'
        ):
            raise ConfigurationError(
                f"CSVLogger(separator={separator!r}): fields are separated by one character that stands in no number, "
                'such as "," or ";" or "\\t".'
            )
        require_choice("CSVLogger", "per", per, ("step", "epoch"))
        require_number("CSVLogger", "flush_interval_s", flush_interval_s, above=0)
        self.events = (StepsCompleted, EpochCompleted) if per == "step" else EpochCompleted
        self._path = file_path(path, "CSVLogger")
        self._separator = separator
        self._append = append
        self._own = OWN[per]
        self._per_step = per == "step"
        self._interval_s = flush_interval_s
        self._fsync = fsync
        self._rows: WaitingRows[CSVRows] = WaitingRows()
        self._file: CSVFile | None = None
        self._commits: GroupCommit | None = None
        self._last: Event | None = None
        self._saved: CSVLoggerState | None = None

    async def start(self, run: RunContext) -> None:
        """Open the file, cut off a torn last row and what the run repeats, start the writing thread.

        Raises:
            ConfigurationError: the file there has other columns, or cannot be written.
        """
        path, file = run.run_dir / self._path, self._file
        if file is None or file.path != path:
            file = CSVFile(path, self._rows, separator=self._separator, own=self._own, fsync=self._fsync)
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = CSVLoggerState(path=str(self._path), rows=0)
        goes_on = self._append or run.resumed or run.restarts

        def open_file() -> None:
            file.prepare(append=goes_on)
            if saved is not None and saved.path == str(self._path):
                file.cut(saved.rows)

        await open_in_thread(self.name or "CSVLogger", path, open_file)
        self._file = file
        self._commits = GroupCommit(file, self._interval_s)

    async def handle(self, event: StepsCompleted | EpochCompleted) -> None:
        """Take rows in. Raises OSError where rows could not be written."""
        if event is not self._last:  # another attempt brings no other rows
            self._last = event
            if isinstance(event, EpochCompleted):
                self._put_epoch(event)
            else:
                self._put_steps(StepTable.of(event, self.every))
        commits = self._commits
        if commits is None:  # not started: the rows wait
            return
        if isinstance(event, EpochCompleted):
            await commits.commit()
        elif commits.needs_attention:
            await commits.attend()

    async def stop(self) -> None:
        """Write what waits. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.stop()

    async def flush(self) -> None:
        """Have every row so far on the disk, synced. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.flush()

    def state_dict(self) -> dict[str, Any]:
        """How many rows the file has, as plain JSON data."""
        rows = self._file.row_count if self._file is not None else 0
        return CSVLoggerState(path=str(self._path), rows=rows).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, cut the file behind so many rows.

        Raises:
            StateError: another version, or broken.
        """
        self._saved = CSVLoggerState.parse(self.name or "CSVLogger", state)

    def _put_steps(self, table: StepTable) -> None:
        if not table.steps:
            return
        columns: dict[str, Any] = {"step": table.steps, "epoch": table.epoch, "batch": table.batches}
        for name, column in table.metrics.items():
            columns[metric_column(name, self._own)] = column
        self._rows.put(CSVRows(len(table.steps), columns), len(table.steps), table.size_bytes)

    def _put_epoch(self, event: EpochCompleted) -> None:
        if self._per_step:
            return
        columns: dict[str, Any] = {
            "epoch": event.epoch,
            "step": event.step,
            "steps": event.steps,
            "duration_s": event.duration_s,
        }
        columns |= {metric_column(name, self._own): value for name, value in event.metrics.items()}
        columns |= {f"{HYPERPARAMS}{name}": value for name, value in event.hyperparams.items()}
        self._rows.put(CSVRows(1, columns), 1, 200 * len(columns))
