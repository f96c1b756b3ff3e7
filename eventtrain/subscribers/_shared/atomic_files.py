"""Files that are changed completely or not at all, and the system calls that this takes. Blocking.

Any thread but the event loop's; one thread at a time for each path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class AppendedFile:
    """Appends to one file; each append is written completely or not at all.

    Args:
        path: of the file; an append creates it, and its folder, if they do not exist (any more).
        fsync: ``append`` returns only when the data is on the disk.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        self._torn_at: int | None = None
        """Offset of a partial append that could not be removed."""

    def append(self, data: bytes) -> int:
        """Appends all of ``data``; after a failure the file ends where it ended before.

        Returns:
            The size of the file in bytes.

        Raises:
            OSError: nothing was appended. If a partial append could not be removed, ``repair`` or the next ``append``
                removes it.
        """
        self.repair()
        self.path.parent.mkdir(parents=True, exist_ok=True)
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

    def repair(self) -> None:
        """Removes what a failed ``append`` left; needed before the file is read. Raises OSError."""
        if self._torn_at is not None:
            with suppress(FileNotFoundError):  # the file was deleted, and the partial append with it
                os.truncate(self.path, self._torn_at)
            self._torn_at = None


@contextmanager
def open_replacement(temporary: Path, path: Path) -> Generator[BinaryIO]:
    """Opens the new file ``temporary``; at the end of the block it is synced and renamed to ``path``.

    Missing folders are created.

    Raises:
        OSError: ``path`` is unchanged, and ``temporary`` is removed.
    """
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to a temporary file that replaces ``path``; missing folders are created.

    A reader of ``path`` gets the old content or all of ``data``, also after a power failure.

    Raises:
        OSError: ``path`` is unchanged, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open_replacement(temporary, path) as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def cut_tail(path: Path, offset: int, beside: Path, heading: bytes = b"") -> None:
    """Moves the bytes of ``path`` from ``offset`` on to the new file ``beside``, which begins with ``heading``.

    If the process is killed meanwhile, the complete tail is in ``path``, in ``beside``, or in both.

    Raises:
        OSError: nothing was lost.
    """
    temporary = beside.with_name(f".{beside.name}.cutting")
    with open(path, "rb+") as file:
        with open_replacement(temporary, beside) as tail:
            tail.write(heading)
            file.seek(offset)
            shutil.copyfileobj(file, tail)
        file.truncate(offset)


# --- one system call each, so that tests can make each of them fail -----------------------------------------------


def make_folder(path: Path) -> None:
    """Creates one folder, and those above it if they are missing."""
    path.mkdir(parents=True)


def write_text(path: Path, text: str) -> None:
    """Writes a new file."""
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, name: Path) -> None:
    """Renames a folder in one step; ``name`` does not exist."""
    os.rename(path, name)


def remove(path: Path) -> None:
    """Removes a folder and everything in it."""
    shutil.rmtree(path)
