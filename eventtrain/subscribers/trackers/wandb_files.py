"""W&B's own files on this machine, as far as they have to be read: which steps an earlier attempt wrote. Blocking.

A ``.wandb`` file is a log in LevelDB's format (blocks of 32 KiB, records in one or several fragments) of Protobuf
messages. Only the parts that say a step are looked at.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# Protobuf makes its classes when it is imported, so no checker of types knows them.
Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")
"""Checksum, length, kind of a fragment: 1 whole, 2 first, 3 middle, 4 last."""
IDENTIFIER_BYTES = 7


class WrittenSteps:
    """How far W&B's process is with the file of a run under way, of which each call reads what is new.

    Args:
        path: of the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = IDENTIFIER_BYTES
        self._last = -1

    def last(self) -> int:
        """The last step in it; -1 where there is none."""
        if self._path.exists():
            for end, record in records_from(self._path, self._at):
                self._at = end
                if record.WhichOneof("record_type") == "history":
                    self._last = max(self._last, record.history.step.num)
        return self._last


def last_step(folder: Path, run_id: str) -> int:
    """The last step in the files of all attempts of a run below ``folder``; -1 where there is none."""
    found = -1
    for path in folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb"):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                found = max(found, record.history.step.num)
    return found


def records(path: Path) -> Iterator[Any]:
    """All that is whole; a tail that was torn off is left out."""
    return (record for _, record in records_from(path, IDENTIFIER_BYTES))


def records_from(path: Path, start: int) -> Iterator[tuple[int, Any]]:
    """The same from the byte on where a record begins, each with the byte where it ends."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    at, end = start, start + len(data)
    message = b""
    while at + HEADER.size <= end:
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK  # the rest of a block, too small for a header
            continue
        _, length, kind = HEADER.unpack_from(data, at - start)
        at += HEADER.size
        if at + length > end or not kind:
            return
        piece = data[at - start : at - start + length]
        message = piece if kind in (1, 2) else message + piece
        at += length
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(message)
            except Exception:  # torn in a place that only Protobuf notices
                return
            yield at, record


def is_id(text: str) -> bool:
    """Whether it can be a run's: it becomes part of paths."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text) is not None
