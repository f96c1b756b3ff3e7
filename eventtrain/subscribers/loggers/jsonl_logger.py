"""``JSONLLogger``: one line of JSON for each event."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from eventtrain.bus.queues import Lossless
from eventtrain.bus.step_series import StepSeries
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    TRAINING_SEQUENCE,
    CommandApplied,
    EpochCompleted,
    Event,
    RunCompleted,
    RunFailed,
    RunResumed,
    SampleTaken,
    StepCompleted,
    StepsCompleted,
    StepStarted,
)
from eventtrain.events.commands import Command
from eventtrain.events.names import EventClass
from eventtrain.subscribers._shared.step_table import StepTable, json_lines
from eventtrain.subscribers.loggers.file_logger import FileLogger, FileLoggerState
from eventtrain.subscribers.loggers.row_file import RowFile
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice

WRITTEN = (*(kind for kind in TRAINING_SEQUENCE if kind not in (RunResumed, StepStarted)), SampleTaken)
"""The training sequence without StepStarted, which adds nothing to StepCompleted: one row for each step. And without
RunResumed, so that the rows of a resumed run are those of an uninterrupted one. Samples beside it."""


class JSONLFile(RowFile[bytes | StepTable]):
    """A file of JSON lines, of single rows and of windows."""

    @property
    def position(self) -> dict[str, int]:
        """The size in bytes."""
        return {"offset": self.size_bytes}

    def _cut(self, position: Mapping[str, int]) -> None:
        self._cut_at(position["offset"])

    def _render(self, items: list[bytes | StepTable]) -> bytes:
        lines = [item if isinstance(item, bytes) else json_lines(item) for item in items]
        return b"\n".join([*lines, b""])


class JSONLLoggerState(FileLoggerState):
    """State of a ``JSONLLogger``; ``offset`` is the size of the file in bytes."""

    offset: int = 0


class JSONLLogger(FileLogger[JSONLFile]):
    """Appends one row for each event to a file; a row is ``event.model_dump_json()``.

    Args:
        path: relative to ``run_dir``; missing folders are created, an existing file is appended to.
        events: a class, a union or a tuple of classes; if None the training sequence, of which CommandApplied only
            those with a finite lag or from outside the program, and without StepStarted, so that each step has one row,
            and RunResumed, so that a resumed run writes the rows of an uninterrupted one.
        by: "step": each row is its event, though no event is built for it unless another subscriber wants it.
            "window": the rows of steps are made from StepsCompleted. They are the same, except that ``seq`` is 0,
            ``time`` is that of the window, and they follow the rows of other events published during the window.
        flush_interval_s: how often waiting rows are written; a row waits at most twice as long.
        fsync: wait until each group of rows is on the disk, for machines that may lose power.

    Rows are in the file within 0.5 s, when an epoch's handler has returned, and after ``stop``; before a checkpoint is
    committed they are synced. A run that resumes from it moves rows that were written later to a file beside
    (``<path>.cut-1`` ...), and writes them again, so that each step has one row; so does a run that was to resume and
    found nothing saved, with all that the file contains. A failed write, for example on a full disk, is raised in the
    handler, and so published as SubscriberFailed, once for each failure; the rows are kept and written when that works
    again, none twice and none torn. While 32 MiB of rows wait, training waits too. ``FitResult.undelivered`` counts
    the rows that are still not in the file when the run has ended; the next ``fit`` of the trainer writes them.

    Raises:
        ConfigurationError: the path leaves ``run_dir`` by ``..``, or another argument is invalid; when a run starts,
            the file cannot be written.
    """

    _state_type = JSONLLoggerState
    _urgent = frozenset({EpochCompleted, RunCompleted, RunFailed})

    @checked
    def __init__(
        self,
        path: str | Path,
        events: EventClass | tuple[EventClass, ...] | None = None,
        *,
        by: Literal["step", "window"] = "step",
        flush_interval_s: float = 0.25,
        fsync: bool = False,
    ) -> None:
        super().__init__(path, flush_interval_s)
        require_choice("JSONLLogger", "by", by, ("step", "window"))
        self._all_commands = events is not None
        self.events = WRITTEN if events is None else events
        self._by_window = by == "window"
        if self._by_window:
            self.events = _by_window(self.events)
            self.queue = Lossless(limit=4_096)  # windows of up to 1,024 steps, and batches of evaluations
        self._fsync = fsync

    def _make_file(self, path: Path) -> JSONLFile:
        return JSONLFile(path, self._waiting, fsync=self._fsync)

    async def handle_series(self, series: StepSeries) -> None:
        """As ``handle`` for each of its events: the same rows, at a tenth of the cost."""
        self._put_table(StepTable.of_series(series))
        await self._attend()

    def _put(self, event: Event) -> None:
        if self._by_window and isinstance(event, StepsCompleted):
            self._put_table(StepTable.of(event, self.every))
            return
        if isinstance(event, CommandApplied) and not self._all_commands and _depends_on_timing(event.command):
            return
        # model_dump_json() decodes to a str, which would be encoded again here: 1.9 us instead of 2.7.
        row = event.__pydantic_serializer__.to_json(event)
        self._waiting.put(row, 1, len(row))


def _depends_on_timing(command: Command) -> bool:
    """Whether a rerun need not repeat a command: its lag is None, and it cannot be given to a rerun from outside."""
    return command.due is None and command.source is None


def _by_window(events: Any) -> tuple[type[Event], ...]:
    given: tuple[type[Event], ...] = events if isinstance(events, tuple) else get_args(events) or (events,)
    if StepCompleted not in given or StepsCompleted in given:
        names = ", ".join(kind.__name__ for kind in given)
        raise ConfigurationError(
            f"JSONLLogger(by='window', events={names}): events must include StepCompleted, whose rows are made from "
            "windows, and not StepsCompleted."
        )
    return tuple(StepsCompleted if kind is StepCompleted else kind for kind in given)
