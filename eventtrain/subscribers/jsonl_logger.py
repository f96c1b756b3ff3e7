"""``JSONLLogger``: one line of JSON per event, written in groups by a thread that never holds the event loop up."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread

from eventtrain.event_names import EventClass
from eventtrain.events import (
    TRAINING_SEQUENCE,
    CommandApplied,
    EpochCompleted,
    Event,
    RunCompleted,
    RunFailed,
    StepStarted,
)
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.subscribers.saved_state import SavedState

logger = logging.getLogger("eventtrain")

COMMIT_INTERVAL_S = 0.25
"""How often waiting rows are written; a row waits at most twice as long."""
ROW_LIMIT = 100_000
"""Unwritten rows (some 30 MB) at which the logger takes no more, so that training waits instead of memory growing."""
WRITTEN = tuple(kind for kind in TRAINING_SEQUENCE if kind is not StepStarted)
"""The training sequence but for StepStarted, which says nothing that StepCompleted does not: one row a step."""
URGENT = frozenset({EpochCompleted, RunCompleted, RunFailed})


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

    Rows are on disk (not synced) within 0.5 s, when an epoch's handler has returned, and after ``stop``; before a
    checkpoint is committed they are synced. A run that resumes from it cuts off what was written later, keeps that
    beside the file (``<path>.cut-1`` ...), and writes those rows again, so that each step has one row; so does a run
    that was to resume and found nothing saved, with all that the file holds. A failed
    write, a full disk say, is raised in the handler, and so said by SubscriberFailed, once for every time it fails;
    the rows are kept and written again when that works, none twice and none torn. While ``ROW_LIMIT`` rows wait,
    training waits too.
    """

    disable_after = None  # a full disk is no reason to stop logging once there is room again

    def __init__(self, path: str | Path, events: EventClass | tuple[EventClass, ...] | None = None) -> None:
        self.events = WRITTEN if events is None else events
        self._all_commands = events is not None
        self._path = Path(path)
        self._rows: deque[bytes] = deque()
        self._file: RowFile | None = None
        self._committer: Committer | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._saved: JSONLLoggerState | None = None

    async def start(self, run: RunContext) -> None:
        """Open the file, cut off a torn last row and what the run repeats, start the writing thread."""
        path = run.run_dir / self._path
        file = self._file if self._file is not None and self._file.path == path else RowFile(path, self._rows)
        self._limiter = anyio.CapacityLimiter(1)
        await anyio.to_thread.run_sync(file.prepare, limiter=self._limiter)
        saved, self._saved = self._saved, None
        if run.restarts:
            saved = JSONLLoggerState(path=str(self._path), offset=0)
        if saved is not None and saved.path == str(self._path):
            await anyio.to_thread.run_sync(file.cut, saved.offset, limiter=self._limiter)
        self._file = file
        self._committer = Committer(file)
        self._committer.start()

    async def handle(self, event: Event) -> None:
        """Take one row in."""
        if isinstance(event, CommandApplied) and not self._all_commands and event.command.due is None:
            return
        # What model_dump_json() decodes to a str, which would be encoded again here: 1.9 us instead of 2.7.
        self._rows.append(event.__pydantic_serializer__.to_json(event))
        committer = self._committer
        if (
            type(event) in URGENT
            or committer is None
            or committer.error is not None
            or len(self._rows) >= ROW_LIMIT
        ):
            await self._attend()

    async def stop(self) -> None:
        """Write what waits. Raises OSError if that fails."""
        committer, self._committer = self._committer, None
        if committer is not None:
            await anyio.to_thread.run_sync(committer.stop, limiter=self._limiter)
            await self._commit()

    async def flush(self) -> None:
        """Have every row so far on the disk, synced. Raises OSError if that fails."""
        if self._file is not None:
            await self._commit()
            await anyio.to_thread.run_sync(self._file.sync, limiter=self._limiter)

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

    async def _attend(self) -> None:
        committer = self._committer
        if committer is not None and committer.error is not None:
            error, committer.error = committer.error, None
            raise self._describe(error)
        try:
            await self._commit()
        except OSError:
            if len(self._rows) < ROW_LIMIT:
                raise
        while len(self._rows) >= ROW_LIMIT:  # noqa: ASYNC110  # the committer is a thread and this the rarest case
            await anyio.sleep(COMMIT_INTERVAL_S)

    async def _commit(self) -> None:
        if self._file is None:  # not started: the rows wait
            return
        try:
            await anyio.to_thread.run_sync(self._file.commit, limiter=self._limiter)
        except OSError as error:
            raise self._describe(error) from error

    def _describe(self, error: OSError) -> OSError:
        assert self._file is not None
        return OSError(
            error.errno,
            f"cannot write {self._file.path}: {error.strerror or error}; {self._file.waiting} rows are kept and "
            "will be written as soon as that works again",
        )


class RowFile:
    """Rows on their way to one file. One thread appends to ``rows``; the methods block, on any other thread."""

    def __init__(self, path: Path, rows: deque[bytes]) -> None:
        self.path = path
        self.rows = rows
        self._torn_at: int | None = None
        self._lock = threading.Lock()
        self.size_bytes = 0
        """Where the file ended after the last row written to it."""

    @property
    def waiting(self) -> int:
        """Rows that are not in the file yet."""
        return len(self.rows)

    def prepare(self) -> None:
        """Make the folder; move a last row without a line end, as a killed run leaves it, to ``<path>.torn``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            begin = end = self.size_bytes = file.seek(0, os.SEEK_END)
            while begin > 0:
                chunk = min(4096, begin)
                file.seek(begin - chunk)
                found = file.read(chunk).rfind(b"\n")
                if found >= 0:
                    begin += found + 1 - chunk
                    break
                begin -= chunk
            if begin == end:
                return
            file.seek(begin)
            tail = file.read()
            torn = self.path.with_name(self.path.name + ".torn")
            with open(torn, "ab") as beside:
                beside.write(tail + b"\n")
            file.truncate(begin)
            self.size_bytes = begin
        logger.warning("%s ended in a torn row of %d bytes, which now lies in %s", self.path, len(tail), torn)

    def cut(self, offset: int) -> None:
        """Move what lies behind ``offset`` bytes to ``<path>.cut-1`` (or -2 ...), which is synced first."""
        if self.size_bytes < offset:
            logger.error(
                "%s has %d bytes, but had %d when the checkpoint was written: rows are missing in it.",
                self.path, self.size_bytes, offset,
            )  # fmt: skip
        if self.size_bytes <= offset:
            return
        names = (self.path.with_name(f"{self.path.name}.cut-{n}") for n in count(1))
        with open(self.path, "rb+") as file, open(next(n for n in names if not n.exists()), "xb") as beside:
            file.seek(offset)
            shutil.copyfileobj(file, beside)
            beside.flush()
            os.fsync(beside.fileno())
            file.truncate(offset)
        self.size_bytes = offset

    def sync(self) -> None:
        """Have the disk hold what was written."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Write every waiting row, whole or not at all.

        Raises:
            OSError: it failed; the file ends where it ended before, and the rows still wait.
        """
        with self._lock:
            group = [self.rows.popleft() for _ in range(len(self.rows))]
            if not group:
                return
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    self._append(descriptor, b"\n".join(group) + b"\n")
                finally:
                    os.close(descriptor)
            except OSError:
                self.rows.extendleft(reversed(group))
                raise

    def _append(self, descriptor: int, data: bytes) -> None:
        if self._torn_at is not None:
            os.ftruncate(descriptor, self._torn_at)
        self._torn_at = begin = os.lseek(descriptor, 0, os.SEEK_END)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError:
            os.ftruncate(descriptor, begin)
            self._torn_at = None
            raise
        self._torn_at = None
        self.size_bytes = begin + len(data)


class Committer(threading.Thread):
    """Commits waiting rows again and again. ``error`` is the last failure nobody has taken note of yet."""

    def __init__(self, file: RowFile) -> None:
        super().__init__(name=f"eventtrain {file.path.name}", daemon=True)
        self.error: OSError | None = None
        self._file = file
        self._stopping = threading.Event()

    def run(self) -> None:
        """Until ``stop``."""
        while not self._stopping.wait(COMMIT_INTERVAL_S):
            try:
                self._file.commit()
            except OSError as error:
                self.error = error

    def stop(self) -> None:
        """End the thread; blocks until it has."""
        self._stopping.set()
        self.join()
