"""``EventFile``: one of TensorBoard's event files, to which records are appended completely or not at all. Blocking.

The frame of a record is TFRecord's: the length, its masked CRC-32C, the bytes, their masked CRC-32C. Any thread, one at
a time.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable
from functools import lru_cache
from itertools import count
from pathlib import Path

from eventtrain.errors import StorageError
from eventtrain.subscribers._shared.atomic_files import AppendedFile, cut_tail, sync

OWN_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(\d{6})\.eventtrain")
"""TensorBoard reads the files of a folder in the order of their names, each to its end before it opens the next."""


class EventFile:
    """Appends records to one new file, created at once. Raises OSError if it exists, or cannot be created."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "xb"):
            self.size_bytes = 0
        self._file = AppendedFile(path)

    def append(self, records: Iterable[bytes]) -> None:
        """Writes all of ``records``, or none and raises StorageError: the file then ends where it ended before."""
        try:
            self.size_bytes = self._file.append(b"".join(map(framed, records)))
        except OSError as error:
            raise _failed(self.path, error) from None

    def sync(self) -> None:
        """Waits until the file is on the disk. Raises StorageError."""
        self.append(())  # creates it again if it was removed
        try:
            sync(self.path)
        except OSError as error:
            raise _failed(self.path, error) from None


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}", may_pass=True)


def new_event_file(folder: Path) -> EventFile:
    """Creates a file in ``folder``, created if missing, that is read after all that are in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max((_micros(path) for path in own_files(folder)), default=0)
    for micros in count(max(time.time_ns() // 1000, newest + 1)):
        seconds, rest = divmod(micros, 1_000_000)
        try:
            return EventFile(folder / f"events.out.tfevents.{seconds:010d}.{rest:06d}.eventtrain")
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def own_files(folder: Path) -> list[Path]:
    """Returns the files that this module created, in the order in which they are read."""
    return sorted(path for path in folder.glob("events.out.tfevents.*") if OWN_NAME.fullmatch(path.name))


def cut(folder: Path, name: str, offset: int | None) -> None:
    """Moves what was written after a checkpoint to files ``events.out.cut. ...``, which TensorBoard does not read.

    Args:
        folder: of the files.
        name: of the file that was written to at the checkpoint; "" if there was none, so that all files are moved.
        offset: size of that file in bytes at the checkpoint; None if unknown, so that it stays complete.

    Raises:
        OSError: it failed; nothing was lost.
    """
    for path in own_files(folder):
        if path.name > name:
            path.rename(_cut_path(path))
    path = folder / name
    if name and offset is not None and path.exists() and path.stat().st_size > offset:
        cut_tail(path, offset, _cut_path(path))


def _cut_path(path: Path) -> Path:
    cut = path.name.replace("tfevents", "cut")
    names = (path.with_name(cut if n == 1 else f"{cut}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())


def _micros(path: Path) -> int:
    found = OWN_NAME.fullmatch(path.name)
    return int(found[1] + found[2]) if found else 0


# --- frames -----------------------------------------------------------------------------------------------------
# Written here because tensorboardX's own CRC-32C, unless the package crc32c is installed besides, takes 2.4 times as
# long (0.88 s against 0.36 s for a megabyte), and it is most of what a row of steps costs.


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRCS = [_crc_of(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Returns the Castagnoli checksum of ``data`` (RFC 3720)."""
    crc, crcs = 0xFFFFFFFF, _CRCS
    for byte in data:
        crc = crcs[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    """Returns ``record`` in its frame."""
    return b"".join((_header(len(record)), record, _masked_crc(record)))


@lru_cache(1024)  # the records of steps have few lengths
def _header(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + _masked_crc(length)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
