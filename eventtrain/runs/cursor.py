"""``Cursor``: how far a consumer has read a run, kept beside the log in a file that survives its process."""

from __future__ import annotations

import os
import re
from time import monotonic
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eventtrain.errors import ConfigurationError
from eventtrain.runs.journal import JSONLJournal
from eventtrain.runs.rows import Identity, digest, identity_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FOLDER = ".eventtrain.cursors"
SAVE_S = 0.1
"""Shortest time between two writes of the file, while events follow one another without a wait."""


class CursorState(BaseModel):
    """Content of the file: where the next row begins, and which row is before it.

    Attributes:
        log: name of the log.
        offset: in bytes.
        size, sha256: of the row before ``offset``, without its line end.
        attempt, stream, seq: of the newest row that was read.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    log: str
    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    sha256: str
    attempt: int
    stream: str
    seq: int


class Cursor:
    """The position of one consumer in a log. One process at a time has it. Blocking; one thread at a time.

    Args:
        name: of the consumer: letters, digits, ``_ . -``.
        journal: continues where the consumer stopped.

    Raises:
        ConfigurationError: the name is invalid, another reader uses the cursor, or its file is damaged, or belongs to
            another log.
    """

    def __init__(self, name: str, journal: JSONLJournal) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            raise ConfigurationError(
                f"read_events(cursor={name[:80]!r}): a cursor must be named by at most 64 letters, digits and _ . -"
            )
        folder = journal.path.parent / FOLDER
        folder.mkdir(exist_ok=True)
        self._path = folder / f"{name}.json"
        self._journal = journal
        self._saved_s = 0.0
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take_lock(lock, name)
            self._load()
        except BaseException:
            os.close(lock)
            raise
        self._lock: int | None = lock
        self._saved = self._acknowledged = self._position()

    def _take_lock(self, lock: int, name: str) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigurationError(
                    f"read_events(cursor={name!r}): another reader uses this cursor of {self._path.parent.parent}. "
                    "Close that one, or give this consumer a name of its own."
                ) from error
            except OSError:
                pass  # a file system without locks

    def _load(self) -> None:
        journal = self._journal
        try:
            state = CursorState.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return
        except ValidationError as error:
            raise ConfigurationError(
                f"{self._path} is not a cursor. Delete it to read from the beginning again."
            ) from error
        if state.log != journal.path.name:
            raise ConfigurationError(
                f"{self._path} belongs to {state.log}, and {journal.path.name} is to be read. Give another cursor."
            )
        journal.skip_to(
            state.offset, state.size, state.sha256, Identity(state.attempt, state.stream, state.seq)
        )

    def _position(self) -> tuple[int, bytes]:
        return self._journal.offset, self._journal.last

    def acknowledge(self) -> None:
        """Counts what the journal has read so far as handled; that is written at most every ``SAVE_S`` seconds."""
        self._acknowledged = self._position()
        if monotonic() - self._saved_s >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Writes what was acknowledged; a complete file replaces the one before. Raises OSError."""
        if self._acknowledged == self._saved:
            return
        offset, last = self._acknowledged
        newest = self._journal.newest if last is self._journal.last else identity_of(last)
        state = CursorState(
            log=self._journal.path.name,
            offset=offset,
            size=len(last),
            sha256=digest(last),
            attempt=newest.attempt,
            stream=newest.stream,
            seq=newest.seq,
        )
        temporary = self._path.with_name(f".{self._path.name}.new")
        with open(temporary, "wb") as file:
            file.write(state.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._saved, self._saved_s = self._acknowledged, monotonic()

    def close(self) -> None:
        """Saves, and leaves the cursor to other readers. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            self.save()
        finally:
            os.close(lock)
