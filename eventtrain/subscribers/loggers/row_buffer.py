"""``WaitingRows``: what an event loop hands to the thread that writes it to a file, and how much of it there is."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class Entry(NamedTuple, Generic[Item]):
    """One thing that waits: of so many rows, and about so much memory."""

    item: Item
    rows: int
    size_bytes: int


class WaitingRows(Generic[Item]):
    """Rows that are not in a file yet. One thread puts, another takes and says what it has written."""

    def __init__(self) -> None:
        self._entries: deque[Entry[Item]] = deque()
        self._put_rows = self._put_bytes = 0  # by the one who puts
        self._done_rows = self._done_bytes = 0  # by the one who takes

    def put(self, item: Item, rows: int, size_bytes: int) -> None:
        """Add an item of so many rows that takes about so much memory."""
        self._put_rows += rows
        self._put_bytes += size_bytes
        self._entries.append(Entry(item, rows, size_bytes))

    def take(self) -> list[Entry[Item]]:
        """Every entry; they count as waiting until ``written``."""
        return [self._entries.popleft() for _ in range(len(self._entries))]

    def give_back(self, entries: Sequence[Entry[Item]]) -> None:
        """Put back, before all others, what ``take`` gave."""
        self._entries.extendleft(reversed(entries))

    def written(self, entries: Sequence[Entry[Item]]) -> int:
        """These are in the file; how many rows they are."""
        rows = sum(entry.rows for entry in entries)
        self._done_rows += rows
        self._done_bytes += sum(entry.size_bytes for entry in entries)
        return rows

    @property
    def rows(self) -> int:
        """How many wait."""
        return self._put_rows - self._done_rows

    @property
    def size_bytes(self) -> int:
        """About how much memory they take."""
        return self._put_bytes - self._done_bytes
