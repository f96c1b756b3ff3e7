"""The directory that checkpoints lie in: which are there, what is left of killed runs, how one is deleted. Blocking."""

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
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing.manifest import TEMPORARY, Manifest, is_checkpoint, read_manifest

logger = logging.getLogger("eventtrain")

FOREIGN_AGE_S = 24 * 3600.0
"""So long a half-written folder of another machine, whose processes cannot be asked for, is left alone."""

THIS_PROCESS = uuid.uuid4().hex[:8]
"""Tells a run from one that was killed and had the same process number, as in a container that starts anew."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint on disk under its final name."""

    path: Path
    manifest: Manifest
    size_bytes: int = 0
    """Of all files, where it was just written."""


def committed_in(directory: Path) -> list[Committed]:
    """The checkpoints in a directory, the one committed last as the last; one that cannot be read is left out, loudly.

    A directory that is not there has none.
    """
    found: list[Committed] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_checkpoint(path):
            try:
                found.append(Committed(path, read_manifest(path)))
            except SnapshotError as error:
                logger.warning("%s", error)
    return sorted(found, key=lambda committed: (committed.manifest.number, committed.manifest.time))


def free_path(directory: Path, name: str) -> Path:
    """Where a checkpoint called ``name`` can lie without touching what is there."""
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(path for path in (directory / each for each in names) if not path.exists())


def temporary_path(directory: Path, name: str) -> Path:
    """A folder for what is not a checkpoint yet, or no longer."""
    unique = f"{_machine()}-{os.getpid()}-{THIS_PROCESS}-{uuid.uuid4().hex[:8]}"
    return directory / f"{TEMPORARY}{unique}-{name}"


def delete(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that half a one never looks whole. Raises OSError."""
    doomed = temporary_path(path.parent, path.name)
    atomic_files.rename(path, doomed)
    atomic_files.remove(doomed)


def remove_stale(directory: Path) -> None:
    """Remove what killed runs left half-written or half-deleted; what a running one writes stays."""
    for left in directory.glob(f"{TEMPORARY}*"):
        if _is_stale(left):
            try_to_remove(left)


def try_to_remove(folder: Path) -> bool:
    """Remove what is no checkpoint; whether it is gone. Where it is not, that is only said."""
    try:
        if folder.exists():
            atomic_files.remove(folder)
    except OSError as error:
        logger.warning("%s is no checkpoint and could not be removed: %s", folder, error)
        return False
    return True


def files_in(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", platform.node())[:60] or "machine"


def _is_stale(folder: Path) -> bool:
    """Whether whoever wrote ``folder`` is gone."""
    machine, _, rest = folder.name.removeprefix(TEMPORARY).partition("-")
    process, _, rest = rest.partition("-")
    if machine != _machine():
        try:
            return time.time() - folder.stat().st_mtime > FOREIGN_AGE_S
        except OSError:
            return False
    if process == str(os.getpid()):
        return not rest.startswith(THIS_PROCESS)
    return not _is_running(process)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True
