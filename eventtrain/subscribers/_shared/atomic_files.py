"""A file that is there whole or not at all. Blocking; any thread, one at a time for a path."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def named_when_whole(unfinished: Path, path: Path) -> Generator[BinaryIO]:
    """The new file ``unfinished``; behind the block it is synced, and called ``path``, in the place of one that is.

    Raises:
        OSError: it failed; what was there before is unchanged, and nothing half-written is left.
    """
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except Exception:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to a file beside, and give that the name ``path``; missing folders are made.

    Whoever opens ``path`` sees what was there before or all of ``data``, also after a power cut.

    Raises:
        OSError: it failed; what was there before is unchanged, and nothing half-written is left.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with named_when_whole(part, path) as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def cut_tail(path: Path, offset: int, beside: Path, heading: bytes = b"") -> None:
    """Move what lies behind ``offset`` bytes of ``path`` to a file ``beside``, below ``heading``; synced first.

    A process that is killed meanwhile leaves the tail in ``path``, whole, or beside it, whole, or in both.

    Raises:
        OSError: it failed; nothing was lost.
    """
    unfinished = beside.with_name(f".{beside.name}.cutting")
    with open(path, "rb+") as file:
        with named_when_whole(unfinished, beside) as tail:
            tail.write(heading)
            file.seek(offset)
            shutil.copyfileobj(file, tail)
        file.truncate(offset)
