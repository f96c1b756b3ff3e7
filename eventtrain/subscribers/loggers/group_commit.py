"""``GroupCommit``: has a thread write a file's waiting rows in groups, while the event loop only puts them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import anyio
import anyio.to_thread

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers.loggers.row_buffer import WaitingRows

WAITING_LIMIT_BYTES = 32 << 20
"""Memory of unwritten rows at which no more are taken, so that training waits instead of memory growing."""
LOOK_AGAIN_S = 0.1
RETRY_S = 1.0
"""How long the thread waits at least after a failure that nobody has taken note of."""


class GroupFile(Protocol):
    """What can be written in groups. Its methods block, and may be called from any thread but the event loop's."""

    path: Path
    rows: WaitingRows[Any]

    def commit(self) -> None:
        """Write every waiting row. Raises OSError, and then they still wait."""

    def sync(self) -> None:
        """Have the disk hold what was written. Raises OSError."""


class GroupCommit:
    """One file of a subscriber. On the event loop, for one handler at a time.

    Args:
        file: prepared.
        interval_s: how often waiting rows are written; a row waits at most twice as long.
    """

    def __init__(self, file: GroupFile, interval_s: float) -> None:
        self._file = file
        self._committer: Committer | None = Committer(file, interval_s)
        self._committer.start()
        self._limiter = anyio.CapacityLimiter(1)

    @property
    def needs_attention(self) -> bool:
        """Whether ``attend`` has something to say or to wait for; to be asked after each row."""
        committer = self._committer
        return committer is None or committer.error is not None or self._full

    async def attend(self) -> None:
        """Wait while too much waits; after ``stop``, write.

        Raises:
            OSError: the thread could not write; said once each time.
        """
        while self._committer is not None and self._full:  # noqa: ASYNC110  # it is a thread that makes room
            await anyio.sleep(LOOK_AGAIN_S)
        committer = self._committer
        if committer is None:
            await self.commit()
        elif committer.error is not None:
            error, committer.error = committer.error, None
            raise self._describe(error) from error

    async def commit(self) -> None:
        """Write what waits. Raises OSError."""
        if self._committer is not None and self._committer.error is not None:
            await self.attend()
        try:
            await anyio.to_thread.run_sync(self._file.commit, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            raise self._describe(error) from error

    def hurry(self) -> None:
        """Have the thread write what waits now."""
        if self._committer is not None:
            self._committer.due.set()

    async def flush(self) -> None:
        """Have the disk hold every row so far. Raises OSError."""
        await self.commit()
        await anyio.to_thread.run_sync(self._file.sync, limiter=self._limiter)

    async def stop(self) -> None:
        """End the thread, and write what waits. Raises OSError."""
        committer, self._committer = self._committer, None
        if committer is not None:
            # Abandoned where the disk hangs: the trainer's drain_timeout_s cancels this.
            await anyio.to_thread.run_sync(committer.stop, abandon_on_cancel=True, limiter=self._limiter)
            await self.commit()

    @property
    def _full(self) -> bool:
        return self._file.rows.size_bytes >= WAITING_LIMIT_BYTES

    def _describe(self, error: Exception) -> OSError:
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{error}"
        return OSError(
            error.errno if isinstance(error, OSError) else None,
            f"cannot write {self._file.path}: {reason}; {self._file.rows.rows} rows are kept and "
            "will be written as soon as that works again",
        )


async def open_in_thread(owner: str, path: Path, open_file: Callable[[], None]) -> None:
    """Have a thread do ``open_file``, when a run starts.

    Args:
        owner: name of the subscriber.
        path: what is opened.
        open_file: blocks, and may raise OSError.

    Raises:
        ConfigurationError: it raised OSError.
    """
    try:
        await anyio.to_thread.run_sync(open_file, limiter=anyio.CapacityLimiter(1))
    except OSError as error:
        raise ConfigurationError(
            f"{owner} cannot write {path}: {error.strerror or error}. Give a path in a folder in which this process "
            "may make files."
        ) from error


class Committer(threading.Thread):
    """Commits waiting rows again and again. ``error`` is the last failure nobody has taken note of yet."""

    def __init__(self, file: GroupFile, interval_s: float) -> None:
        super().__init__(name=f"eventtrain {file.path.name}", daemon=True)
        self.error: Exception | None = None
        self.due = threading.Event()
        """Commit now instead of later."""
        self._file = file
        self._interval_s = interval_s
        self._stopping = False

    def run(self) -> None:
        """Until ``stop``."""
        while True:
            self.due.wait(self._interval_s if self.error is None else max(self._interval_s, RETRY_S))
            self.due.clear()
            if self._stopping:
                return
            try:
                self._file.commit()
            except Exception as error:  # whatever it is, it is said, and the next rows are tried
                self.error = error

    def stop(self) -> None:
        """End the thread; blocks until it has."""
        self._stopping = True
        self.due.set()
        self.join()
