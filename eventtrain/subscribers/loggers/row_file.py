"""``LogFile``: where waiting rows are written in groups; ``RowFile``: a file of lines. Blocking."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
    """Rows that are not in a file yet. One thread puts them, and one thread at a time reads and removes them."""

    def __init__(self) -> None:
        self._put: deque[Entry[Item]] = deque()
        self._taken: list[Entry[Item]] = []  # the oldest; only the thread that removes uses it
        self._put_rows = self._put_bytes = 0  # written by the thread that puts
        self._written_rows = self._written_bytes = 0  # written by the thread that removes

    def put(self, item: Item, rows: int, size_bytes: int) -> None:
        """Adds an item of ``rows`` rows that uses about ``size_bytes`` bytes."""
        self._put_rows += rows
        self._put_bytes += size_bytes
        self._put.append(Entry(item, rows, size_bytes))

    def entries(self) -> list[Entry[Item]]:
        """Returns every entry, oldest first."""
        self._taken += [self._put.popleft() for _ in range(len(self._put))]
        return self._taken.copy()

    def remove(self, entries: Sequence[Entry[Item]]) -> None:
        """Removes the oldest entries, which are written."""
        del self._taken[: len(entries)]
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
    """A file, or a folder of files, into which the rows of ``waiting``, put by another thread, are written.

    The methods block; any thread but the event loop's.
    """

    def __init__(self, path: Path, waiting: RowBuffer[Item]) -> None:
        self.path = path
        self.waiting = waiting
        self._lock = threading.Lock()

    @abstractmethod
    def prepare(self) -> None:
        """Creates the folder, and repairs what a killed run left."""

    @property
    @abstractmethod
    def position(self) -> dict[str, int]:
        """How much is written, for a checkpoint."""

    def cut(self, position: Mapping[str, int]) -> None:
        """Moves what was written after ``position`` aside, to ``<path>.cut-1`` (or -2 ...).

        Drops the waiting rows, which an earlier run of this trainer could not write: their steps run again.
        """
        with self._lock:
            self.waiting.remove(self.waiting.entries())
        here, there = self.position, dict(position)
        if [*here.values()] < [*there.values()]:
            now, then = (", ".join(f"{name}={n}" for name, n in one.items()) for one in (here, there))
            logger.error(
                "%s lacks rows: it ends at %s, but ended at %s when the checkpoint was written.",
                self.path,
                now,
                then,
            )
        elif here != there:
            self._cut(position)

    @abstractmethod
    def _cut(self, position: Mapping[str, int]) -> None:
        """Does what ``cut`` promises; ``position`` is before the end."""

    @abstractmethod
    def sync(self) -> None:
        """Waits until everything written is on the disk."""

    def commit(self) -> None:
        """Writes every waiting row, in groups, each of them completely or not at all.

        Raises:
            OSError: the groups before are written, and the other rows still wait.
        """
        with self._lock:
            for group in self._groups(self.waiting.entries()):
                self._write([entry.item for entry in group], sum(entry.rows for entry in group))
                self.waiting.remove(group)

    @abstractmethod
    def _groups(self, entries: Sequence[Entry[Item]]) -> Iterator[Sequence[Entry[Item]]]:
        """Yields the entries in the groups in which they are written."""

    @abstractmethod
    def _write(self, items: list[Item], rows: int) -> None:
        """Writes a group, ``rows`` rows in all, completely or not at all."""


class RowFile(LogFile[Item]):
    """A file of rows, each a line. With ``fsync`` a group counts as written only when it is on the disk."""

    def __init__(self, path: Path, waiting: RowBuffer[Item], *, fsync: bool = False) -> None:
        super().__init__(path, waiting)
        self.size_bytes = 0
        """Size of the file after the last row written."""
        self._file = AppendedFile(path, fsync=fsync)

    @abstractmethod
    def _render(self, items: list[Item]) -> bytes:
        """Returns the lines of some items, each with its line end."""

    def prepare(self) -> None:
        """Creates the folder; moves a last row without a line end, as a killed run leaves it, to ``<path>.torn``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            size, length, tail = file.seek(0, os.SEEK_END), 0, b""
            while length < size and b"\n" not in tail:
                length = min(size, 2 * length + 4096)
                file.seek(size - length)
                tail = file.read()
            tail = tail.rpartition(b"\n")[2]
            self.size_bytes = size - len(tail)
            if not tail:
                return
            torn = self.path.with_name(self.path.name + ".torn")
            with open(torn, "ab") as beside:
                beside.write(tail + b"\n")
            file.truncate(self.size_bytes)
        logger.warning(
            "%s ended in a torn row of %d bytes, which was moved to %s", self.path, len(tail), torn
        )

    def _cut_at(self, offset: int, heading: bytes = b"") -> None:
        """Moves the bytes from ``offset`` on to a file beside, which begins with ``heading``."""
        cut_tail(self.path, offset, free_name(self.path, "cut"), heading)
        self.size_bytes = offset

    def sync(self) -> None:
        """Waits until everything written is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
        self.size_bytes = self._file.append(self._render(items))


def free_name(path: Path, purpose: str) -> Path:
    """Returns ``<path>.<purpose>-1``, or with the first number for which nothing exists."""
    names = (path.with_name(f"{path.name}.{purpose}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())
