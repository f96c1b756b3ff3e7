"""``CheckpointStore``: how a checkpoint gets on disk in one piece. Blocking; no event loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.checkpointing.directory import (
    Committed,
    committed_in,
    delete,
    files_in,
    free_path,
    remove_stale,
    temporary_path,
    try_to_remove,
)
from eventtrain.subscribers.checkpointing.manifest import ARRAYS, MANIFEST, Manifest, SavedArray, nested
from eventtrain.subscribers.checkpointing.orbax import ocp

logger = logging.getLogger("eventtrain")


class CheckpointStore:
    """Writes checkpoints into one directory. All methods on one and the same thread: it owns Orbax.

    Args:
        directory: made if missing; what killed runs left half-written is removed from it.
        fsync: have the disk hold everything before a checkpoint gets its name.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        self.directory = directory
        self._fsync = fsync
        directory.mkdir(parents=True, exist_ok=True)
        remove_stale(directory)
        self.found = committed_in(directory)
        """What lay there when it was opened."""
        self._number = max((committed.manifest.number for committed in self.found), default=0)
        self._rubbish: list[Path] = []
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def write(self, name: str, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Committed:
        """Make ``parts`` (part -> path -> NumPy array, or key with ``data`` and ``impl``) durable.

        Args:
            name: of the folder, if nothing of that name is there; else with a number behind it.
            parts: what is stored.
            manifest: without what is known only when they are written.

        Raises:
            Exception: whatever went wrong; nothing that looks like a checkpoint has come of it then.
        """
        self._rubbish = [folder for folder in self._rubbish if not try_to_remove(folder)]
        staging = temporary_path(self.directory, name)
        try:
            atomic_files.make_folder(staging)
            manifest = self._fill(staging, parts, manifest)
            size_bytes = sum(file.stat().st_size for file in files_in(staging))
            self._sync(staging)
            path = self._named(staging, name)
        except BaseException:
            if not try_to_remove(staging):  # Orbax may still write other arrays into it
                self._rubbish.append(staging)
            raise
        try:
            if self._fsync:
                atomic_files.sync(self.directory)
        except BaseException:
            _take_back(path)
            raise
        self._number = manifest.number
        return Committed(path, manifest, size_bytes)

    def _named(self, staging: Path, name: str) -> Path:
        """Give the folder a name; another one where another process was faster."""
        while True:
            path = free_path(self.directory, name)
            try:
                atomic_files.rename(staging, path)
            except OSError:
                if not path.exists():
                    raise
            else:
                return path

    def close(self) -> None:
        """End Orbax' own threads. Raises what failed in them."""
        self._orbax.close()

    def _fill(self, folder: Path, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Manifest:
        stored = {
            part: {path: SavedArray.of(leaf) for path, leaf in leaves.items()}
            for part, leaves in parts.items()
        }
        tree = nested(
            {
                part: {path: array for path, (array, _) in arrays.items() if array.size}
                for part, arrays in stored.items()
            }
        )
        if tree:
            self._orbax.save(folder / ARRAYS, tree)
        manifest = manifest.model_copy(
            update={
                "number": self._number + 1,
                "time": datetime.now(UTC),
                "files": {
                    file.relative_to(folder).as_posix(): file.stat().st_size for file in files_in(folder)
                },
                "arrays": {
                    part: {path: saved for path, (_, saved) in arrays.items()}
                    for part, arrays in stored.items()
                },
            }
        )
        atomic_files.write_text(folder / MANIFEST, manifest.to_text())
        return manifest

    def _sync(self, folder: Path) -> None:
        if not self._fsync:
            return
        for file in files_in(folder):
            atomic_files.sync(file)
        for parent, _, _ in os.walk(folder, topdown=False):
            atomic_files.sync(Path(parent))


def _take_back(path: Path) -> None:
    """It could not be made durable, so it must not look as if it were."""
    try:
        delete(path)
    except OSError as error:
        logger.error("%s could not be removed; it is whole, but may not outlive a power cut: %s", path, error)
