"""The directory of a Checkpointer: which checkpoints are in it, what killed runs left, how one is deleted. Blocking."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
import uuid
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from eventtrain.errors import SnapshotError
from eventtrain.runs.owner import THIS_PROCESS, is_running
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing.manifest import TEMPORARY, Manifest, is_checkpoint, read_manifest

logger = logging.getLogger("eventtrain")

FOREIGN_AGE_S = 24 * 3600.0
"""Age from which a temporary folder of another machine, whose processes cannot be checked, is removed."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint on disk under its final name."""

    path: Path
    manifest: Manifest
    size_bytes: int = 0
    """Size of all files; known if it was just written."""


def read_directory(directory: Path) -> tuple[list[Committed], list[SnapshotError]]:
    """Returns the checkpoints in a directory, which may be missing, in the order of their commits.

    The second list has an error for each checkpoint that cannot be read.
    """
    found: list[Committed] = []
    unreadable: list[SnapshotError] = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if is_checkpoint(path):
            try:
                found.append(Committed(path, read_manifest(path)))
            except SnapshotError as error:
                unreadable.append(error)
    found.sort(key=lambda committed: (committed.manifest.number, committed.manifest.time))
    return found, unreadable


def committed_in(directory: Path) -> list[Committed]:
    """Returns the checkpoints as ``read_directory`` does; those that cannot be read are left out with a warning."""
    found, unreadable = read_directory(directory)
    for error in unreadable:
        logger.warning("%s", error)
    return found


def free_path(directory: Path, name: str) -> Path:
    """Returns ``directory / name``, with a number appended if that exists."""
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(path for path in (directory / each for each in names) if not path.exists())


def temporary_path(directory: Path, name: str) -> Path:
    """Returns the path of a folder for a checkpoint that is not complete yet, or is being deleted."""
    unique = f"{_machine()}-{os.getpid()}-{THIS_PROCESS}-{uuid.uuid4().hex[:8]}"
    return directory / f"{TEMPORARY}{unique}-{name}"


def delete(path: Path) -> None:
    """Deletes a checkpoint. Renames it first, so that a partly deleted one never looks complete. Raises OSError."""
    doomed = temporary_path(path.parent, path.name)
    atomic_files.rename(path, doomed)
    atomic_files.remove(doomed)


def remove_stale(directory: Path) -> None:
    """Removes the temporary folders of killed runs; those of running ones stay."""
    for left in directory.glob(f"{TEMPORARY}*"):
        if _is_stale(left):
            try_to_remove(left)


def try_to_remove(folder: Path) -> bool:
    """Removes a temporary folder; returns whether it is gone. A failure is only logged."""
    try:
        if folder.exists():
            atomic_files.remove(folder)
    except OSError as error:
        logger.warning("%s is not a checkpoint and could not be removed: %s", folder, error)
        return False
    return True


def files_in(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(path: Path) -> int:
    """Returns the bytes of all files of a checkpoint; 0 if it was deleted meanwhile."""
    try:
        return sum(file.stat().st_size for file in files_in(path))
    except FileNotFoundError:
        return 0


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", platform.node())[:60] or "machine"


def _is_stale(folder: Path) -> bool:
    """Returns whether the process that wrote ``folder`` has ended."""
    machine, _, rest = folder.name.removeprefix(TEMPORARY).partition("-")
    process, _, rest = rest.partition("-")
    if machine != _machine():
        try:
            return time.time() - folder.stat().st_mtime > FOREIGN_AGE_S
        except OSError:
            return False
    if process == str(os.getpid()):
        return not rest.startswith(THIS_PROCESS)
    return not (process.isdecimal() and is_running(int(process)))
