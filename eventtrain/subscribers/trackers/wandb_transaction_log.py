"""W&B's transaction log: which steps W&B's process has written to its file on this machine. Blocking.

W&B's public API does not report them, and resumes nothing offline, but a resumed run must log each step exactly once.
The file ``.wandb`` is a log in LevelDB's format (blocks of 32 KiB, records in one or several fragments) of Protobuf
messages. Only the steps are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# Protobuf makes its classes when it is imported, so no type checker knows them.
Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]

BLOCK_BYTES = 32 * 1024
HEADER = struct.Struct("<IHB")
"""Checksum, length, kind of a fragment: 1 whole, 2 first, 3 middle, 4 last."""
IDENTIFIER_BYTES = 7


class TransactionLog:
    """The file of a run that may still be written; each call reads what is new.

    Args:
        path: of the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = IDENTIFIER_BYTES
        self._last_step = -1

    def last_step(self) -> int:
        """Returns the last step in the file; -1 if there is none."""
        if self._path.exists():
            for end, record in _records(self._path, self._offset):
                self._offset = end
                if record.WhichOneof("record_type") == "history":
                    self._last_step = max(self._last_step, record.history.step.num)
        return self._last_step


def last_step(folder: Path, run_id: str) -> int:
    """Returns the last step in the files of all attempts of a run below ``folder``; -1 if there is none."""
    paths = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return max((TransactionLog(path).last_step() for path in paths), default=-1)


def records(path: Path) -> Iterator[Any]:
    """Yields the complete records of a file; a torn tail is left out."""
    return (record for _, record in _records(path, IDENTIFIER_BYTES))


def _records(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    """Yields the records from byte ``start`` on, each after the offset where it ends."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    at, end = start, start + len(data)
    message = b""
    while at + HEADER.size <= end:
        if BLOCK_BYTES - at % BLOCK_BYTES < HEADER.size:
            at += BLOCK_BYTES - at % BLOCK_BYTES  # the rest of a block is too small for a header
            continue
        _, length, kind = HEADER.unpack_from(data, at - start)
        at += HEADER.size
        if at + length > end or not kind:
            return
        fragment = data[at - start : at - start + length]
        message = fragment if kind in (1, 2) else message + fragment
        at += length
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(message)
            except Exception:  # torn in a place that only Protobuf notices
                return
            yield at, record
