"""``ParquetLogger``: the metrics of all steps as a folder of Parquet files."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from eventtrain.bus.queues import Lossless
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, Event, StepsCompleted
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.group_commit import GroupCommit, open_in_thread
from eventtrain.subscribers.loggers.row_buffer import WaitingRows

if TYPE_CHECKING:
    from eventtrain.subscribers.loggers.parquet_files import ParquetParts

try:
    from eventtrain.subscribers.loggers import parquet_files as parquet_parts
except ModuleNotFoundError:
    parquet_parts = None

HURRY_S = 1.0
"""Epochs that follow each other faster do not each have a part written."""


class ParquetLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    path: str
    part: int
    """The last one at the cut; 0: there was none."""
    rows: int
    """Of that part."""


class ParquetLogger(Subscriber):
    """Appends one row per step to a folder of Parquet files, ``part-00001.parquet`` and so on.

    Args:
        path: of the folder, relative to ``run_dir``; made if it is missing. Parts that lie there stay, and others
            follow.
        rows_per_part: at which a part is done and the next one begins.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long, and until its part is
            written.

    Columns are ``step``, ``epoch``, ``batch`` and the metrics, each with its own type, made from whole windows, without
    an event for each step. A metric named like one of these three gets ``metrics.`` before its name.

    Whoever reads the folder finds whole files only, also after a crash or a kill: a part is written beside itself,
    synced and renamed. Until it is done the last part is written anew, with the rows that came; that is also
    done soon after an epoch's end, before a checkpoint is committed and in ``stop``. Metrics that change, by name or
    type, begin another part.

    A run that resumes from a checkpoint moves rows that were written later to a folder beside (``<path>.cut-1`` ...),
    and writes them again, so that each step has one row; so does a run that was to resume and found nothing saved, with
    all that the folder holds. A failed write is raised in the handler, and so said by SubscriberFailed; the rows are
    kept and written again when that works. While 32 MiB of rows wait, training waits too.

    Raises:
        ConfigurationError: pyarrow is missing, the path leaves ``run_dir`` by ``..``, or an argument cannot work; when
            a run starts, that the folder cannot be written.
    """

    disable_after = None  # a full disk is no reason to stop logging once there is room again
    events = (StepsCompleted, EpochCompleted)
    queue = Lossless(limit=256)  # windows, of up to 1,024 steps each

    def __init__(
        self, path: str | Path, *, rows_per_part: int = 50_000, flush_interval_s: float = 5.0
    ) -> None:
        if parquet_parts is None:
            raise ConfigurationError(
                "ParquetLogger needs pyarrow. Install it: pip install 'eventtrain[parquet]'."
            )
        require_count("ParquetLogger", "rows_per_part", rows_per_part, at_least=1)
        require_number("ParquetLogger", "flush_interval_s", flush_interval_s, above=0)
        self._path = file_path(path, "ParquetLogger")
        self._new_parts = parquet_parts.ParquetParts
        self._rows_per_part = rows_per_part
        self._interval_s = flush_interval_s
        self._rows: WaitingRows[StepTable] = WaitingRows()
        self._parts: ParquetParts | None = None
        self._commits: GroupCommit | None = None
        self._last: Event | None = None
        self._hurried_s = 0.0
        self._saved: ParquetLoggerState | None = None

    async def start(self, run: RunContext) -> None:
        """Find the last part, set aside what the run repeats, start the writing thread.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        path = run.run_dir / self._path
        parts = self._new_parts(path, self._rows, self._rows_per_part)
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = ParquetLoggerState(path=str(self._path), part=0, rows=0)

        def open_folder() -> None:
            parts.prepare()
            if saved is not None and saved.path == str(self._path):
                parts.cut(saved.part, saved.rows)

        await open_in_thread(self.name or "ParquetLogger", path, open_folder)
        self._parts = parts
        self._commits = GroupCommit(parts, self._interval_s)

    async def handle(self, event: StepsCompleted | EpochCompleted) -> None:
        """Take rows in. Raises OSError where rows could not be written."""
        if isinstance(event, StepsCompleted):
            if event is not self._last:  # another attempt brings no other rows
                self._last = event
                table = StepTable.of(event, self.every)
                if table.steps:
                    self._rows.put(table, len(table.steps), table.size_bytes)
        elif self._commits is not None and monotonic() - self._hurried_s >= HURRY_S:
            self._hurried_s = monotonic()
            self._commits.hurry()
        if self._commits is not None and self._commits.needs_attention:
            await self._commits.attend()

    async def stop(self) -> None:
        """Write what waits. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.stop()

    async def flush(self) -> None:
        """Have every row so far on the disk, synced. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.flush()

    def state_dict(self) -> dict[str, Any]:
        """Where the last part ends, as plain JSON data."""
        part, rows = (self._parts.part, self._parts.rows_in_part) if self._parts is not None else (0, 0)
        return ParquetLoggerState(path=str(self._path), part=part, rows=rows).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, set aside what lies behind that.

        Raises:
            StateError: another version, or broken.
        """
        self._saved = ParquetLoggerState.parse(self.name or "ParquetLogger", state)
