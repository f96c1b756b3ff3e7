"""``AppendedFile``: a file to which data is appended whole or not at all. Blocking."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class AppendedFile:
    """Appends to one file. One thread at a time; never the event loop's.

    Args:
        path: of the file; made with the first append where it is not there.
        fsync: have the disk hold what was appended before ``append`` returns.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        self._torn_at: int | None = None
        """Where a half begins that could not be taken back."""

    def append(self, data: bytes) -> int:
        """Append all of ``data``, or nothing: the file then ends where it ended before.

        Returns:
            Where the file ends now, in bytes.

        Raises:
            OSError: it failed. Where not even a half could be taken back, ``mend`` and the next ``append`` do that.
        """
        self.mend()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._torn_at = begin = os.lseek(descriptor, 0, os.SEEK_END)
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(descriptor, view) :]
                if self._fsync:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, begin)
                self._torn_at = None
                raise
            self._torn_at = None
        finally:
            os.close(descriptor)
        return begin + len(data)

    def mend(self) -> None:
        """Take back what a failed ``append`` left; for who reads the file before the next one. Raises OSError."""
        if self._torn_at is not None:
            with suppress(FileNotFoundError):  # somebody took it away, and the half with it
                os.truncate(self.path, self._torn_at)
            self._torn_at = None
