"""``FileLogger``: base of the loggers that write rows to a file or a folder of files; ``GroupCommit``: its thread."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import anyio
import anyio.to_thread

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.subscribers._shared.paths import (
    directory_path,
    file_path,
    require_writable_file,
    require_writable_folder,
)
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.loggers.row_file import LogFile, RowBuffer
from eventtrain.validation.arguments import require_number

WAITING_LIMIT_BYTES = 32 << 20
"""Memory of waiting rows at which no more are accepted, so that training waits instead of memory growing."""
LOOK_AGAIN_S = 0.1
RETRY_S = 1.0
"""Shortest time before the thread tries again after a failure that was not raised in a handler yet."""


class FileLoggerState(SavedState):
    """Path of a file; a subclass adds how much of it was written."""

    version: Literal[1] = 1
    path: str


class GroupCommit(threading.Thread):
    """Writes a file's waiting rows every ``interval_s``, so that the event loop only puts them.

    The async methods are for one handler at a time, on the event loop.
    """

    def __init__(self, file: LogFile[Any], interval_s: float) -> None:
        super().__init__(name=f"eventtrain {file.path.name}", daemon=True)
        self.error: Exception | None = None
        """The thread's last failure, until ``attend`` raises it."""
        self._file = file
        self._interval_s = interval_s
        self._limiter = anyio.CapacityLimiter(1)
        self._due = threading.Event()
        self._stopping = False

    def run(self) -> None:
        """Writes until ``stop``."""
        while True:
            self._due.wait(self._interval_s if self.error is None else max(self._interval_s, RETRY_S))
            self._due.clear()
            if self._stopping:
                return
            try:
                self._file.commit()
            except Exception as error:  # any failure is raised in a handler, and the rows are tried again
                self.error = error

    @property
    def needs_attention(self) -> bool:
        """Whether ``attend`` would raise, wait or write; to be checked after each row."""
        return self._stopping or self.error is not None or self._is_full

    async def attend(self) -> None:
        """Waits while too many rows wait; after ``stop``, writes. Raises OSError once for each failure."""
        while self._is_full and not self._stopping:  # noqa: ASYNC110  # it is a thread that makes room
            await anyio.sleep(LOOK_AGAIN_S)
        if self._stopping:
            await self.commit()
        elif self.error is not None:
            error, self.error = self.error, None
            raise self._describe(error) from error

    async def commit(self) -> None:
        """Writes what waits. Raises OSError."""
        if self.error is not None and not self._stopping:
            await self.attend()
        try:
            await anyio.to_thread.run_sync(self._file.commit, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            raise self._describe(error) from error

    def hurry(self) -> None:
        """Makes the thread write now. Never blocks."""
        self._due.set()

    async def flush(self) -> None:
        """Writes what waits, and waits until it is on the disk. Raises OSError."""
        await self.commit()
        await anyio.to_thread.run_sync(self._file.sync, limiter=self._limiter)

    async def stop(self) -> None:
        """Ends the thread, and writes what waits. Raises OSError."""
        if self._stopping:
            return
        self._stopping = True
        self._due.set()
        # Abandoned if the disk hangs: the trainer's drain_timeout_s cancels this.
        await anyio.to_thread.run_sync(self.join, abandon_on_cancel=True, limiter=self._limiter)
        await self.commit()

    @property
    def _is_full(self) -> bool:
        return self._file.waiting.size_bytes >= WAITING_LIMIT_BYTES

    def _describe(self, error: Exception) -> OSError:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{error}"
        rows = self._file.waiting.rows
        if self._stopping:
            what = f"{rows} rows are not in the file, and are lost when the program ends"
        else:
            what = f"{rows} rows are kept, and will be written when that works again"
        return OSError(
            error.errno if isinstance(error, OSError) else None,
            f"cannot write {self._file.path}: {reason}; {what}",
        )


F = TypeVar("F", bound=LogFile[Any])


class FileLogger(Subscriber, ABC, Generic[F]):
    """Opens a file when the run starts, has a thread write its rows, and cuts it when a run resumes."""

    disable_after = None  # it writes again when a full disk has room
    _state_type: type[FileLoggerState]
    _is_folder: ClassVar[bool] = False
    _urgent: ClassVar[frozenset[type[Event]]] = frozenset()
    """Events whose handler returns only when their rows are in the file."""

    def __init__(self, path: str | Path, flush_interval_s: float) -> None:
        owner = type(self).__name__
        require_number(owner, "flush_interval_s", flush_interval_s, above=0)
        self._path = (directory_path if self._is_folder else file_path)(path, owner)
        self.output_paths = (self._path,)
        self._interval_s = flush_interval_s
        self._waiting: RowBuffer[Any] = RowBuffer()
        self._file: F | None = None
        self._commits: GroupCommit | None = None
        self._last: Event | None = None
        self._saved: FileLoggerState | None = None

    @abstractmethod
    def _make_file(self, path: Path) -> F:
        """Returns the file, into which the rows of ``_waiting`` are written."""

    def _prepare(self, file: F, run: RunContext) -> None:
        """Opens the file for a run. Blocks, on a worker thread."""
        file.prepare()

    @abstractmethod
    def _put(self, event: Event) -> None:
        """Puts the rows of an event into ``_waiting``."""

    async def start(self, run: RunContext) -> None:
        """Opens the file and sets repeated rows aside. Raises ConfigurationError if it cannot be written."""
        path, owner = run.run_dir / self._path, self.name or type(self).__name__
        file = self._make_file(path) if self._file is None or self._file.path != path else self._file
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = self._state_type(path=str(self._path))

        def open_file() -> None:
            (require_writable_folder if self._is_folder else require_writable_file)(path, owner)
            self._prepare(file, run)
            if saved is not None and saved.path == str(self._path):
                file.cut(saved.model_dump(exclude={"version", "path"}))

        try:
            await anyio.to_thread.run_sync(open_file, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            raise ConfigurationError(
                f"{owner} cannot write {path}: {error.strerror or error}. Give a path at which this process may write."
            ) from error
        self._file = file
        self._commits = GroupCommit(file, self._interval_s)
        self._commits.start()

    async def handle(self, event: Event) -> None:
        """Adds the rows of an event. Raises OSError if rows could not be written."""
        if event is not self._last:  # a retry of the handler adds no rows
            self._last = event
            self._put(event)
        if type(event) in self._urgent and self._commits is not None:
            await self._commits.commit()
        else:
            await self._attend()

    async def _attend(self) -> None:
        """Waits while too many rows wait. Raises OSError if rows could not be written."""
        if self._commits is not None and self._commits.needs_attention:  # not started: the rows wait
            await self._commits.attend()

    async def stop(self) -> None:
        """Writes what waits. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.stop()

    @property
    def unwritten(self) -> int:
        """Number of rows that are not in the file. The next run of the trainer writes them, unless it resumes."""
        return self._waiting.rows

    async def flush(self) -> None:
        """Writes every row so far, and waits until it is on the disk. Raises OSError if that fails."""
        if self._commits is not None:
            await self._commits.flush()

    def state_dict(self) -> dict[str, Any]:
        """Returns how much of the file is written, as plain JSON data."""
        position = {} if self._file is None else self._file.position
        return self._state_type.model_validate({"path": str(self._path), **position}).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next ``start`` set later rows aside. Raises StateError for another version or invalid data."""
        self._saved = self._state_type.parse(self.name or type(self).__name__, state)

    def _put_table(self, table: StepTable, item: Any = None) -> None:
        """Puts ``item``, which has the rows of ``table``; without one the table itself."""
        if table.steps:
            self._waiting.put(table if item is None else item, len(table.steps), table.size_bytes)
