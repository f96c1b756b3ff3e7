"""``EventFile``: one of TensorBoard's event files: records in frames with checksums, whole or not at all.

The frame is TFRecord's: the length, its masked CRC-32C, the bytes, their masked CRC-32C. Blocking; any thread, one at
a time.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from eventtrain.errors import StorageError
from eventtrain.subscribers._shared.atomic_files import AppendedFile, cut_tail, sync

OWN_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(\d{6})\.eventtrain")
"""TensorBoard reads the files of a folder in the order of their names, each to its end before it opens the next."""


class EventFile:
    """Appends records to one file, which is made at once. Raises OSError where it cannot be.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "xb"):
            self.size_bytes = 0
        self._file = AppendedFile(path)

    def append(self, records: Iterable[bytes]) -> None:
        """Write all of them, or none: the file then ends where it ended before.

        Raises:
            StorageError: it did not work, and may the next time.
        """
        try:
            self.size_bytes = self._file.append(b"".join(map(framed, records)))
        except OSError as error:
            raise self._failed(error) from None

    def sync(self) -> None:
        """Have the disk hold what was written. Raises StorageError."""
        try:
            sync(self.path)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {self.path}: {error.strerror or error}", may_pass=True)


def new_event_file(folder: Path) -> EventFile:
    """An empty file in ``folder``, which is made if need be, that is read after all that lie there. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max((_micros(path) for path in own_files(folder)), default=0)
    for micros in count(max(time.time_ns() // 1000, newest + 1)):
        try:
            return EventFile(
                folder / f"events.out.tfevents.{micros // 1_000_000:010d}.{micros % 1_000_000:06d}.eventtrain"
            )
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def own_files(folder: Path) -> list[Path]:
    """Those that this module made, in the order in which they are read."""
    return sorted(path for path in folder.glob("events.out.tfevents.*") if OWN_NAME.fullmatch(path.name))


def cut(folder: Path, name: str, offset: int | None) -> list[Path]:
    """Take what a checkpoint does not know away from the readers of ``folder``, and keep it beside.

    Args:
        folder: of the files.
        name: of the one that was written to at the checkpoint; "" for none, so that all of them go.
        offset: where it ended then; None: not known, so it stays whole.

    Returns:
        Where it lies now: ``events.out.cut. ...``, a name that TensorBoard reads nothing of.

    Raises:
        OSError: it did not work.
    """
    kept: list[Path] = []
    for path in own_files(folder):
        if path.name > name:
            path.rename(beside := _beside(path))
            kept.append(beside)
    path = folder / name
    if name and offset is not None and path.exists() and path.stat().st_size > offset:
        cut_tail(path, offset, beside := _beside(path))
        kept.append(beside)
    return kept


def _beside(path: Path) -> Path:
    cut = path.name.replace("tfevents", "cut")
    names = (path.with_name(cut if n == 1 else f"{cut}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())


def _micros(path: Path) -> int:
    found = OWN_NAME.fullmatch(path.name)
    return int(found[1] + found[2]) if found else 0


# --- frames -----------------------------------------------------------------------------------------------------


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRCS = [_crc_of(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum of ``data`` (RFC 3720)."""
    crc, crcs = 0xFFFFFFFF, _CRCS
    for byte in data:
        crc = crcs[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    """``record`` as it stands in a file."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _masked(length), record, _masked(record)))


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
