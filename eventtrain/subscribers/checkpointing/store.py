"""``CheckpointStore``: writes checkpoints to disk, each completely or not at all. Blocking; not on the event loop."""

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
    """Writes checkpoints into one directory. All methods on the same thread, which owns Orbax.

    Args:
        directory: created if missing; the temporary folders of killed runs are removed from it.
        fsync: a checkpoint gets its name only when everything is on the disk.

    Raises:
        OSError: the directory cannot be created or read.
    """

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        self.directory = directory
        self._fsync = fsync
        directory.mkdir(parents=True, exist_ok=True)
        remove_stale(directory)
        self.found = committed_in(directory)
        """Checkpoints that were in it when it was opened."""
        self._number = max((committed.manifest.number for committed in self.found), default=0)
        self._leftovers: list[Path] = []
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def write(self, name: str, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Committed:
        """Writes a new checkpoint; after any exception nothing that looks like a checkpoint is left.

        Args:
            name: of the folder; a number is appended if it exists.
            parts: part -> path -> NumPy array, or key with ``data`` and ``impl``.
            manifest: without ``number``, ``time``, ``files`` and ``arrays``.
        """
        self._leftovers = [folder for folder in self._leftovers if not try_to_remove(folder)]
        staging = temporary_path(self.directory, name)
        try:
            atomic_files.make_folder(staging)
            manifest = self._fill(staging, parts, manifest)
            files = files_in(staging)
            size_bytes = sum(file.stat().st_size for file in files)
            if self._fsync:
                self._sync(staging, files)
            path = self._rename(staging, name)
        except BaseException:
            if not try_to_remove(staging):  # Orbax may still write other arrays into it
                self._leftovers.append(staging)
            raise
        try:
            if self._fsync:
                atomic_files.sync(self.directory)
        except BaseException:
            try:
                delete(path)  # it must not look durable
            except OSError as error:
                logger.error(
                    "%s could not be removed; it is complete, but a power cut may lose it: %s", path, error
                )
            raise
        self._number = manifest.number
        return Committed(path, manifest, size_bytes)

    def close(self) -> None:
        """Ends Orbax' own threads. Raises what failed in them."""
        self._orbax.close()

    def _rename(self, staging: Path, name: str) -> Path:
        """Gives the folder its name, or another one if another process was faster."""
        while True:
            path = free_path(self.directory, name)
            try:
                atomic_files.rename(staging, path)
            except OSError:
                if not path.exists():
                    raise
            else:
                return path

    def _sync(self, folder: Path, files: list[Path]) -> None:
        for path in (*files, *(Path(parent) for parent, _, _ in os.walk(folder, topdown=False))):
            atomic_files.sync(path)

    def _fill(self, folder: Path, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Manifest:
        arrays: dict[str, dict[str, Any]] = {}
        described: dict[str, dict[str, SavedArray]] = {}
        for part, leaves in parts.items():
            arrays[part], described[part] = {}, {}
            for path, leaf in leaves.items():
                array, described[part][path] = SavedArray.of(leaf)
                if array.size:
                    arrays[part][path] = array
        if tree := nested(arrays):
            self._orbax.save(folder / ARRAYS, tree)
        manifest = manifest.model_copy(
            update={
                "number": self._number + 1,
                "time": datetime.now(UTC),
                "files": {
                    file.relative_to(folder).as_posix(): file.stat().st_size for file in files_in(folder)
                },
                "arrays": described,
            }
        )
        atomic_files.write_text(folder / MANIFEST, manifest.to_text())
        return manifest
