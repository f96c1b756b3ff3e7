"""``JSONLLogger``: one line of JSON per event, written in groups by a thread that never holds the event loop up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from eventtrain.bus.queues import Lossless
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    TRAINING_SEQUENCE,
    CommandApplied,
    EpochCompleted,
    Event,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepsCompleted,
    StepStarted,
)
from eventtrain.events.names import EventClass
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import StepTable, json_lines
from eventtrain.subscribers._shared.validation import require_choice, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.group_commit import GroupCommit, open_in_thread
from eventtrain.subscribers.loggers.row_buffer import WaitingRows
from eventtrain.subscribers.loggers.row_file import RowFile

WRITTEN = tuple(kind for kind in TRAINING_SEQUENCE if kind is not StepStarted)
"""The training sequence but for StepStarted, which says nothing that StepCompleted does not: one row a step."""
URGENT = frozenset({EpochCompleted, RunCompleted, RunFailed})

Rows = RowFile[bytes | StepTable]


class JSONLLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    path: str
    offset: int
    """Bytes of the file at the cut."""


class JSONLLogger(Subscriber):
    """Appends one row per event to a file; a row is ``event.model_dump_json()``.

    Args:
        path: relative to ``run_dir``; missing folders are made, an existing file is appended to.
        events: a class, a union or a tuple of classes; if None the training sequence, of which CommandApplied only
            those with a finite lag, and without StepStarted, so that each step has one row.
        by: "step": each row is its event. "window": the rows of steps are made from StepsCompleted, some hundred at a
            time, without an event for each, at a tenth of the cost. They are the same, but that ``seq`` is 0, that
            ``time`` is that of the window, and that they follow the rows of what else was said during the window.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long.
        fsync: have the disk hold each group of rows, for machines that may lose power.

    Rows are in the file within 0.5 s, when an epoch's handler has returned, and after ``stop``; before a
    checkpoint is committed they are synced. A run that resumes from it cuts off what was written later, keeps that
    beside the file (``<path>.cut-1`` ...), and writes those rows again, so that each step has one row; so does a run
    that was to resume and found nothing saved, with all that the file holds. A failed
    write, a full disk say, is raised in the handler, and so said by SubscriberFailed, once for every time it fails;
    the rows are kept and written again when that works, none twice and none torn. While 32 MiB of rows wait,
    training waits too.

    Raises:
        ConfigurationError: the path leaves ``run_dir`` by ``..``, or an argument cannot work.
    """

    disable_after = None  # a full disk is no reason to stop logging once there is room again

    def __init__(
        self,
        path: str | Path,
        events: EventClass | tuple[EventClass, ...] | None = None,
        *,
        by: Literal["step", "window"] = "step",
        flush_interval_s: float = 0.25,
        fsync: bool = False,
    ) -> None:
        require_choice("JSONLLogger", "by", by, ("step", "window"))
        require_number("JSONLLogger", "flush_interval_s", flush_interval_s, above=0)
        self._all_commands = events is not None
        self.events = WRITTEN if events is None else events
        if by == "window":
            self.events = _by_window(WRITTEN if events is None else events)
            self.queue = Lossless(
                limit=4_096
            )  # windows, of up to 1,024 steps each, and batches of evaluations
        self._by_window = by == "window"
        self._path = file_path(path, "JSONLLogger")
        self._interval_s = flush_interval_s
        self._fsync = fsync
        self._rows: WaitingRows[bytes | StepTable] = WaitingRows()
        self._file: Rows | None = None
        self._commits: GroupCommit | None = None
        self._last: Event | None = None
        self._saved: JSONLLoggerState | None = None

    async def start(self, run: RunContext) -> None:
        """Open the file, cut off a torn last row and what the run repeats, start the writing thread.

        Raises:
            ConfigurationError: the file cannot be written there.
        """
        path, file = run.run_dir / self._path, self._file
        if file is None or file.path != path:
            file = RowFile(path, self._rows, render, fsync=self._fsync)
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = JSONLLoggerState(path=str(self._path), offset=0)

        def open_file() -> None:
            file.prepare()
            if saved is not None and saved.path == str(self._path):
                file.cut(saved.offset)

        await open_in_thread(self.name or "JSONLLogger", path, open_file)
        self._file = file
        self._commits = GroupCommit(file, self._interval_s)

    async def handle(self, event: Event) -> None:
        """Take one row in, or those of a window. Raises OSError where rows could not be written."""
        if event is not self._last:  # another attempt brings no other rows
            self._last = event
            self._put(event)
        commits = self._commits
        if commits is None:  # not started: the rows wait
            return
        if type(event) in URGENT:
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
        """Where the file ends, as plain JSON data."""
        offset = self._file.size_bytes if self._file is not None else 0
        return JSONLLoggerState(path=str(self._path), offset=offset).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, cut the file where it ended.

        Raises:
            StateError: another version, or broken.
        """
        self._saved = JSONLLoggerState.parse(self.name or "JSONLLogger", state)

    def _put(self, event: Event) -> None:
        if self._by_window and isinstance(event, StepsCompleted):
            table = StepTable.of(event, self.every)
            if table.steps:
                self._rows.put(table, len(table.steps), table.size_bytes)
            return
        if isinstance(event, CommandApplied) and not self._all_commands and event.command.due is None:
            return
        # What model_dump_json() decodes to a str, which would be encoded again here: 1.9 us instead of 2.7.
        row = event.__pydantic_serializer__.to_json(event)
        self._rows.put(row, 1, len(row))


def render(items: list[bytes | StepTable]) -> bytes:
    """The lines of rows and windows, without the last line end."""
    return b"\n".join(item if isinstance(item, bytes) else json_lines(item) for item in items)


def _by_window(events: Any) -> tuple[type[Event], ...]:
    given: tuple[type[Event], ...] = events if isinstance(events, tuple) else get_args(events) or (events,)
    if StepCompleted not in given or StepsCompleted in given:
        names = ", ".join(kind.__name__ for kind in given)
        raise ConfigurationError(
            f"JSONLLogger(by='window', events={names}): makes rows of StepCompleted from windows, so events need "
            "StepCompleted itself, and not StepsCompleted."
        )
    return tuple(StepsCompleted if kind is StepCompleted else kind for kind in given)
