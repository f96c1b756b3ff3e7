"""``JSONLJournal``: the rows of a JSONL log, also while a run appends to it, and after a resumed run has cut it.

A run that resumes truncates the log to where it was at the checkpoint, and appends rows of a higher attempt. A reader
may have read beyond that place, and the file may have grown beyond its position again. So each read begins with the
last row read: if the file no longer has it there, reading continues at the first row that is later than that one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from eventtrain.errors import EventParseError
from eventtrain.events import Event
from eventtrain.events.parsing import parse_event
from eventtrain.runs.rows import Identity, Wanted, digest, ends_run, identity_of

CHUNK_BYTES = 1 << 20
LOOK_BACK_BYTES = 1 << 16


class Journal(Protocol):
    """A log of a run that can be read again and again, each time for what is new. Blocking; one thread at a time."""

    path: Path
    knows_end: bool
    """Whether it has RunCompleted and RunFailed."""

    @property
    def ended(self) -> bool:
        """Whether the newest attempt that was read has ended."""
        ...

    @property
    def unread_bytes(self) -> int:
        """Size of a last row without a line end, as of the last read."""
        ...

    def read(self) -> Iterator[Event]:
        """Yields the events that were written since the last call."""
        ...


class JSONLJournal:
    """Reads a file of rows as they are appended; each is an event in JSON.

    Args:
        path: of the file; it may be missing for a while.
        wanted: the rows to return.
        types: event classes of the user.

    Attributes:
        offset: where the next row begins, in bytes.
        last: the row before it, without its line end.
    """

    knows_end = True

    def __init__(self, path: Path, wanted: Wanted, types: tuple[type[Event], ...] = ()) -> None:
        self.path = path
        self.offset = 0
        self.last = b""
        self.unread_bytes = 0
        self._wanted = wanted
        self._types = types
        self._newest: Identity | None = None
        """Of the newest row that was read, if that is not ``last``."""
        self._ended_attempt: int | None = None

    @property
    def newest(self) -> Identity:
        """The newest row that was read."""
        return self._newest or (identity_of(self.last) if self.last else Identity())

    @property
    def ended(self) -> bool:
        """Whether the newest attempt that was read has ended."""
        return self._ended_attempt is not None

    def read(self) -> Iterator[Event]:
        """Yields the wanted events that were written since the last call.

        Raises:
            EventParseError: a row is not a known event; it is skipped by the next call. OSError: the file cannot be
                read.
        """
        for line in self.lines():
            yield self._event(line)

    def lines(self) -> Iterator[bytes]:
        """Yields the wanted rows that were written since the last call, without parsing them.

        Raises:
            EventParseError: a row is not JSON; it is skipped by the next call. OSError: the file cannot be read.
        """
        while lines := self._next_lines():
            done = 0
            for index in self._wanted.candidates(lines):
                line = lines[index]
                before = self._advance(lines[done : index + 1])
                done = index + 1
                try:
                    if ends_run(line):
                        self._ended_attempt = identity_of(line).attempt
                    takes = self._wanted.takes(line)
                except ValueError as error:
                    self._newest = self._identity(before)
                    raise self._refusal(line, f"the text is not JSON ({error})") from error
                if takes:
                    yield line
            self._advance(lines[done:])

    def _advance(self, lines: list[bytes]) -> bytes:
        """Goes behind ``lines``. Returns the row before the last of them."""
        before = self.last
        if not lines:
            return before
        if self._ended_attempt is not None and self._identity(lines[-1]).attempt > self._ended_attempt:
            self._ended_attempt = None
        self.offset += sum(map(len, lines)) + len(lines)
        self.last, self._newest = lines[-1], None
        return lines[-2] if len(lines) > 1 else before

    def skip_to(self, offset: int, size: int, sha256: str, newest: Identity) -> None:
        """Continues at ``offset`` if the row before it has this size and digest; otherwise behind ``newest``."""
        if offset == 0:
            return
        before = self._bytes_at(
            max(0, offset - max(size + 1, LOOK_BACK_BYTES)), max(size + 1, LOOK_BACK_BYTES)
        )
        before = before[: min(offset, len(before))]
        last = before[-size - 1 : -1]
        if digest(last) != sha256:
            self.skip_past(newest)
            return
        self.offset, self.last, self._newest = offset, last, newest
        ending = next((line for line in reversed(before.split(b"\n")) if ends_run(line)), None)
        if ending is not None and identity_of(ending).attempt == newest.attempt:
            self._ended_attempt = newest.attempt

    def skip_near_end(self, size: int) -> None:
        """Continues at the first row of about the last ``size`` bytes."""
        end = self.path.stat().st_size
        _, _, rest = self._bytes_at(end - size, size).partition(b"\n")
        first, is_row, _ = rest.partition(b"\n")
        if end > size and is_row:
            self.offset, self.last = end - len(rest) + len(first) + 1, first

    def skip_past(self, newest: Identity) -> None:
        """Continues behind the row ``newest``; if it is no longer there, at the first row that is later."""
        self._newest = newest
        if os.path.exists(self.path):
            self._search(newest)

    def _event(self, line: bytes) -> Event:
        try:
            return parse_event(line, self._types)
        except EventParseError as error:
            raise self._refusal(line, str(error)) from error

    def _refusal(self, line: bytes, reason: str) -> EventParseError:
        return EventParseError(f"{self.path}, byte {self.offset - len(line) - 1}: {reason}")

    def _next_lines(self) -> list[bytes]:
        """Returns the next complete rows, of about 1 MiB; none at the end of the file."""
        size = CHUNK_BYTES
        while True:
            guard = self.last + b"\n" if self.offset else b""
            data = self._bytes_at(self.offset - len(guard), len(guard) + size)
            if not data.startswith(guard):
                if not os.path.exists(self.path):  # until a run creates it again
                    return []
                self._ended_attempt = None
                self._search(self.newest)
                continue
            lines = data[len(guard) :].split(b"\n")
            self.unread_bytes = len(lines.pop())
            if lines or len(data) < len(guard) + size:
                return lines
            size *= 2  # a row of more than that

    def _search(self, newest: Identity) -> None:
        """Goes behind ``newest``, or, if it is not in the file, to the first row that is later."""
        self._newest, self.offset, self.last = newest, 0, b""
        with open(self.path, "rb") as file:
            for line in file:
                row = line.removesuffix(b"\n")
                found = self._identity(row)
                if row is line or newest.is_before(found):
                    return
                self.offset += len(line)
                self.last = row
                if found == newest and newest.seq:
                    return

    def _identity(self, line: bytes) -> Identity:
        try:
            return identity_of(line)
        except ValueError:
            return Identity()

    def _bytes_at(self, offset: int, size: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(max(0, offset))
                return file.read(size)
        except FileNotFoundError:
            return b""
