"""``RowFile``: a file of rows, each a line, to which groups are appended whole or not at all. Blocking."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar

from eventtrain.subscribers._shared.atomic_files import AppendedFile, cut_tail
from eventtrain.subscribers.loggers.row_buffer import Entry, WaitingRows

logger = logging.getLogger("eventtrain")

GROUP_ROWS = 4096
"""At least so many rows are written at once where they wait; more would only need more memory."""

Item = TypeVar("Item")


class RowFile(Generic[Item]):
    """Rows on their way to one file. The methods block; any thread but the event loop's.

    Args:
        path: of the file.
        rows: what waits; another thread puts into it.
        render: the lines of some items, without the last line end. What it raises leaves the items waiting.
        fsync: have the disk hold each group before it counts as written.
    """

    def __init__(
        self,
        path: Path,
        rows: WaitingRows[Item],
        render: Callable[[list[Item]], bytes],
        *,
        fsync: bool = False,
    ) -> None:
        self.path = path
        self.rows = rows
        self.size_bytes = 0
        """Where the file ended after the last row written to it."""
        self.row_count = 0
        """Rows written to it by this object."""
        self._render = render
        self._file = AppendedFile(path, fsync=fsync)
        self._lock = threading.Lock()

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

    def cut(self, offset: int, heading: bytes = b"") -> None:
        """Move what lies behind ``offset`` bytes to ``<path>.cut-1`` (or -2 ...), below ``heading``; synced first."""
        if self.size_bytes < offset:
            logger.error(
                "%s has %d bytes, but had %d when the checkpoint was written: rows are missing in it.",
                self.path, self.size_bytes, offset,
            )  # fmt: skip
        if self.size_bytes <= offset:
            return
        cut_tail(self.path, offset, free_name(self.path, "cut"), heading)
        self.size_bytes = offset

    def sync(self) -> None:
        """Have the disk hold what was written."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Write every waiting row, in groups, each of them whole or not at all.

        Raises:
            OSError: it failed; the file ends where the last group ended, and the other rows still wait.
        """
        with self._lock:
            self._file.repair()  # what renders may read the file
            entries, done = self.rows.take(), 0
            try:
                while done < len(entries):
                    group = _some(entries, done)
                    data = self._render([entry.item for entry in group]) + b"\n"
                    self.size_bytes = self._file.append(data)
                    self.row_count += self.rows.written(group)
                    done += len(group)
            except BaseException:
                self.rows.give_back(entries[done:])
                raise


def _some(entries: Sequence[Entry[Item]], begin: int) -> Sequence[Entry[Item]]:
    rows, end = 0, begin
    while end < len(entries) and rows < GROUP_ROWS:
        rows += entries[end].rows
        end += 1
    return entries[begin:end]


def free_name(path: Path, purpose: str) -> Path:
    """``<path>.<purpose>-1``, or the first number that nothing is called by."""
    names = (path.with_name(f"{path.name}.{purpose}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())
