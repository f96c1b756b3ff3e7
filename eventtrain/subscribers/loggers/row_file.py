"""``LogFile``: where waiting rows are written in groups; ``RowFile``: a file of lines. Blocking."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from eventtrain.subscribers._shared.atomic_files import AppendedFile, cut_tail

logger = logging.getLogger("eventtrain")

GROUP_ROWS = 4096
"""Rows written at once, if that many wait; more would only need more memory."""

Item = TypeVar("Item")


class Entry(NamedTuple, Generic[Item]):
    """One item that waits, with its number of rows and approximate memory use."""

    item: Item
    rows: int
    size_bytes: int


class RowBuffer(Generic[Item]):
    """Rows that are not in a file yet. One thread puts them, and one thread at a time takes them."""

    def __init__(self) -> None:
        self._entries: deque[Entry[Item]] = deque()
        self._put_rows = self._put_bytes = 0  # written by the thread that puts
        self._written_rows = self._written_bytes = 0  # written by the thread that takes

    def put(self, item: Item, rows: int, size_bytes: int) -> None:
        """Adds an item of ``rows`` rows that uses about ``size_bytes`` bytes."""
        self._put_rows += rows
        self._put_bytes += size_bytes
        self._entries.append(Entry(item, rows, size_bytes))

    def take(self) -> list[Entry[Item]]:
        """Removes and returns every entry; they count as waiting until ``note_written``."""
        return [self._entries.popleft() for _ in range(len(self._entries))]

    def give_back(self, entries: Sequence[Entry[Item]]) -> None:
        """Puts entries that were taken back, before all others."""
        self._entries.extendleft(reversed(entries))

    def note_written(self, entries: Sequence[Entry[Item]]) -> None:
        """Stops counting these entries as waiting."""
        self._written_rows += sum(entry.rows for entry in entries)
        self._written_bytes += sum(entry.size_bytes for entry in entries)

    @property
    def rows(self) -> int:
        """Number of waiting rows."""
        return self._put_rows - self._written_rows

    @property
    def size_bytes(self) -> int:
        """Approximate memory use of the waiting rows."""
        return self._put_bytes - self._written_bytes


class LogFile(ABC, Generic[Item]):
    """A file, or a folder of files. The methods block; any thread but the event loop's.

    Args:
        path: of the file or folder.
        waiting: the rows to write; another thread puts them.
    """

    def __init__(self, path: Path, waiting: RowBuffer[Item]) -> None:
        self.path = path
        self.waiting = waiting
        self._lock = threading.Lock()

    @abstractmethod
    def prepare(self) -> None:
        """Creates the folder, and repairs what a killed run left."""

    @abstractmethod
    def sync(self) -> None:
        """Waits until everything written is on the disk."""

    def commit(self) -> None:
        """Writes every waiting row, in groups, each of them completely or not at all.

        Raises:
            OSError: the groups before are written, and the other rows still wait.
        """
        with self._lock:
            entries, done = self.waiting.take(), 0
            try:
                for group in self._groups(entries):
                    self._write([entry.item for entry in group], sum(entry.rows for entry in group))
                    self.waiting.note_written(group)
                    done += len(group)
            except BaseException:
                self.waiting.give_back(entries[done:])
                raise

    @abstractmethod
    def _groups(self, entries: Sequence[Entry[Item]]) -> Iterator[Sequence[Entry[Item]]]:
        """Yields the entries in the groups in which they are written."""

    @abstractmethod
    def _write(self, items: list[Item], rows: int) -> None:
        """Writes a group, ``rows`` rows in all, completely or not at all."""


class RowFile(LogFile[Item]):
    """A file of rows, each a line.

    Args:
        path: of the file.
        waiting: the rows to write; another thread puts them.
        fsync: a group counts as written only when it is on the disk.
    """

    def __init__(self, path: Path, waiting: RowBuffer[Item], *, fsync: bool = False) -> None:
        super().__init__(path, waiting)
        self.size_bytes = 0
        """Size of the file after the last row written."""
        self._file = AppendedFile(path, fsync=fsync)

    @abstractmethod
    def _render(self, items: list[Item]) -> bytes:
        """Returns the lines of some items, without the last line end."""

    def prepare(self) -> None:
        """Creates the folder; moves a last row without a line end, as a killed run leaves it, to ``<path>.torn``."""
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
        logger.warning(
            "%s ended in a torn row of %d bytes, which was moved to %s", self.path, len(tail), torn
        )

    def cut_at(self, offset: int, heading: bytes = b"") -> None:
        """Moves the bytes from ``offset`` on to ``<path>.cut-1`` (or -2 ...), which begins with ``heading``."""
        if self.size_bytes < offset:
            logger.error(
                "%s has %d bytes, but had %d when the checkpoint was written: it lacks rows.",
                self.path, self.size_bytes, offset,
            )  # fmt: skip
        if self.size_bytes <= offset:
            return
        cut_tail(self.path, offset, free_name(self.path, "cut"), heading)
        self.size_bytes = offset

    def sync(self) -> None:
        """Waits until everything written is on the disk."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def _groups(self, entries: Sequence[Entry[Item]]) -> Iterator[Sequence[Entry[Item]]]:
        begin = rows = 0
        for end, entry in enumerate(entries, 1):
            rows += entry.rows
            if rows >= GROUP_ROWS or end == len(entries):
                yield entries[begin:end]
                begin, rows = end, 0

    def _write(self, items: list[Item], rows: int) -> None:
        self._file.repair()  # _render may read the file
        self.size_bytes = self._file.append(self._render(items) + b"\n")


def free_name(path: Path, purpose: str) -> Path:
    """Returns ``<path>.<purpose>-1``, or with the first number for which nothing exists."""
    names = (path.with_name(f"{path.name}.{purpose}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())
