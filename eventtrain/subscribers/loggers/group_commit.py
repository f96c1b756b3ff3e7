"""``GroupCommit``: a thread that writes a file's waiting rows in groups, so that the event loop only puts them."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread

from eventtrain.subscribers.loggers.row_file import LogFile

WAITING_LIMIT_BYTES = 32 << 20
"""Memory of waiting rows at which no more are accepted, so that training waits instead of memory growing."""
LOOK_AGAIN_S = 0.1
RETRY_S = 1.0
"""Shortest time before the thread tries again after a failure that was not raised in a handler yet."""


class GroupCommit(threading.Thread):
    """Writes waiting rows at intervals. The async methods are for one handler at a time, on the event loop.

    Args:
        file: prepared.
        interval_s: how often waiting rows are written; a row waits at most twice as long.
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
        """Waits while too many rows wait; after ``stop``, writes.

        Raises:
            OSError: the thread could not write; raised once for each failure.
        """
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
        return OSError(
            error.errno if isinstance(error, OSError) else None,
            f"cannot write {self._file.path}: {reason}; {self._file.waiting.rows} rows are kept, and will be written "
            "when that works again",
        )
