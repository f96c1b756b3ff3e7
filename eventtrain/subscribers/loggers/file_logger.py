"""``FileLogger``: base of the loggers that write rows to a file or a folder of files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import anyio
import anyio.to_thread

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.group_commit import GroupCommit
from eventtrain.subscribers.loggers.row_file import LogFile, RowBuffer


class FileLoggerState(SavedState):
    """Path of a file; a subclass adds how far it was written."""

    version: Literal[1] = 1
    path: str


F = TypeVar("F", bound=LogFile[Any])
S = TypeVar("S", bound=FileLoggerState)


class FileLogger(Subscriber, ABC, Generic[F, S]):
    """Opens a file when the run starts, has a thread write its rows, and cuts it when a run resumes.

    Args:
        path: relative to ``run_dir``, or absolute.
        flush_interval_s: how often waiting rows are written.

    Raises:
        ConfigurationError: the path leaves ``run_dir``, or the interval is not positive.
    """

    disable_after = None  # a full disk is no reason to stop logging once there is room again
    _state_type: type[S]
    _urgent: ClassVar[frozenset[type[Event]]] = frozenset()
    """Events whose handler returns only when their rows are in the file."""

    def __init__(self, path: str | Path, flush_interval_s: float) -> None:
        owner = type(self).__name__
        require_number(owner, "flush_interval_s", flush_interval_s, above=0)
        self._path = file_path(path, owner)
        self._interval_s = flush_interval_s
        self._waiting: RowBuffer[Any] = RowBuffer()
        self._file: F | None = None
        self._commits: GroupCommit | None = None
        self._last: Event | None = None
        self._saved: S | None = None

    # --- what a subclass defines --------------------------------------------------------------------------------

    @abstractmethod
    def _make_file(self, path: Path) -> F:
        """Returns the file, into which the rows of ``_waiting`` are written."""

    def _prepare(self, file: F, run: RunContext) -> None:
        """Opens the file for a run. Blocks, on a worker thread."""
        file.prepare()

    @abstractmethod
    def _put(self, event: Event) -> None:
        """Puts the rows of an event into ``_waiting``."""

    @abstractmethod
    def _state_of(self, file: F | None) -> S:
        """Returns how far ``file`` is written; None means an empty one."""

    @abstractmethod
    def _cut(self, file: F, saved: S) -> None:
        """Moves the rows that were written after ``saved`` to a file beside. Blocks, on a worker thread."""

    # --- life cycle ---------------------------------------------------------------------------------------------

    async def start(self, run: RunContext) -> None:
        """Opens the file, moves a torn last row and the rows that the run repeats aside, starts the writing thread.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        path = run.run_dir / self._path
        file = self._make_file(path) if self._file is None or self._file.path != path else self._file
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = self._state_of(None)

        def open_file() -> None:
            self._prepare(file, run)
            if saved is not None and saved.path == str(self._path):
                self._cut(file, saved)

        try:
            await anyio.to_thread.run_sync(open_file, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            raise ConfigurationError(
                f"{self.name or type(self).__name__} cannot write {path}: {error.strerror or error}. Give a path in a "
                "folder in which this process may create files."
            ) from error
        self._file = file
        self._commits = GroupCommit(file, self._interval_s)
        self._commits.start()

    async def handle(self, event: Event) -> None:
        """Adds the rows of an event. Raises OSError if rows could not be written."""
        if event is not self._last:  # a retry of the handler adds no rows
            self._last = event
            self._put(event)
        commits = self._commits
        if commits is None:  # not started: the rows wait
            return
        if type(event) in self._urgent:
            await commits.commit()
        elif commits.needs_attention:
            await commits.attend()

    async def stop(self) -> None:
        """Writes what waits. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.stop()

    async def flush(self) -> None:
        """Writes every row so far, and waits until it is on the disk. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.flush()

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the file is written, as plain JSON data."""
        return self._state_of(self._file).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next ``start`` move the rows that were written later aside.

        Raises:
            StateError: another version, or invalid data.
        """
        self._saved = self._state_type.parse(self.name or type(self).__name__, state)

    def _put_table(self, table: StepTable, item: Any = None) -> None:
        """Puts ``item``, which has the rows of ``table``; without one the table itself."""
        if table.steps:
            self._waiting.put(table if item is None else item, len(table.steps), table.size_bytes)
