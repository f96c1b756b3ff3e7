"""Files of this machine on their way to a store. Blocking; any thread."""

from __future__ import annotations

import hashlib
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from eventtrain.errors import StorageError
from eventtrain.subscribers.checkpointing.directory import files_in

READ_BYTES = 8 * 2**20
FILES_HELD = 200
"""Of one checkpoint; a process may have some 1,000 files open."""


@dataclass(frozen=True)
class LocalFile:
    """As much of a file as there was when it was opened. One thread at a time reads it.

    Attributes:
        path: of the file.
        name: its path below the folder that it was found in, with slashes.
        size_bytes: how much of it is sent.
        held: the open file, which can be read when its name is gone; None: it is opened for each part.
        stopping: from then on reading fails, so that what is on its way ends.
    """

    path: Path
    name: str
    size_bytes: int
    held: BinaryIO | None
    stopping: threading.Event

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on. Raises StorageError where they cannot be read."""
        if self.stopping.is_set():
            raise StorageError(f"{self.name}: it was given up at the end of the run")
        try:
            with ExitStack() as stack:
                file = self.held or stack.enter_context(self.path.open("rb"))
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise StorageError(f"{self.path} became shorter while it was copied")
        return data


def open_file(path: Path, name: str, stack: ExitStack, stopping: threading.Event) -> LocalFile:
    """One file, held until ``stack`` ends. Raises OSError."""
    file = stack.enter_context(path.open("rb"))
    return LocalFile(path, name, file.seek(0, 2), file, stopping)


def open_files(folder: Path, stack: ExitStack, stopping: threading.Event) -> list[LocalFile]:
    """All files of a folder, ``FILES_HELD`` of them held until ``stack`` ends, so that deleting them does no harm.

    Raises:
        OSError: the folder was deleted before all of them were open.
    """
    there = folder.stat().st_ino
    files: list[LocalFile] = []
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        if len(files) < FILES_HELD:
            files.append(open_file(path, name, stack, stopping))
        else:
            files.append(LocalFile(path, name, path.stat().st_size, None, stopping))
    if (
        folder.stat().st_ino != there
    ):  # it loses its name before its files: had it begun, some might be missing
        raise FileNotFoundError(f"{folder} was replaced while it was read")
    return files


def sha256_of(file: LocalFile, size: int | None = None) -> str:
    """Of the first ``size`` bytes, all if None. Raises StorageError."""
    digest = hashlib.sha256()
    size = file.size_bytes if size is None else size
    for offset in range(0, size, READ_BYTES):
        digest.update(file.read(offset, min(READ_BYTES, size - offset)))
    return digest.hexdigest()
