"""``CheckpointStore``: writes checkpoints to disk, each completely or not at all. Blocking; not on the event loop."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers._shared.display_text import size_text
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
from eventtrain.subscribers.checkpointing.manifest import (
    ARRAYS,
    MANIFEST,
    Manifest,
    Read,
    SavedArray,
    array_of,
    is_sharded,
    nested,
    stored,
)
from eventtrain.subscribers.checkpointing.orbax import ArrayFiles, Put
from eventtrain.subscribers.checkpointing.processes import CheckpointPeers, HostPart, own_folder

logger = logging.getLogger("eventtrain")

FILES_BYTES = 64 << 10
"""Upper bound for what a checkpoint of a small state needs beside its arrays."""


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
        """Folders of failed attempts. Orbax may still write into them, and so create them again."""
        self._failed = False
        """Whether the last attempt failed."""
        self._orbax = ArrayFiles()

    def write(
        self,
        name: str,
        parts: Mapping[str, Mapping[str, Any]],
        manifest: Manifest,
        *,
        put: Put | None = None,
        read: Read = np.asarray,
        peers: CheckpointPeers | None = None,
    ) -> Committed:
        """Writes a new checkpoint; after any exception nothing that looks like a checkpoint is left.

        Args:
            name: of the folder; a number is appended if it exists.
            parts: part -> path -> JAX array, or key on the host with ``data`` and ``impl``.
            manifest: without ``number``, ``time``, ``files`` and ``arrays``.
            put: see ``ArrayFiles``; for arrays that are on an accelerator.
            read: returns an array in host memory, for its checksum.
            peers: the other processes, which write their parts; None if there are none.
        """
        self._remove_leftovers()
        staging = temporary_path(self.directory, name)
        try:
            atomic_files.make_folder(staging)
            if peers is not None:
                peers.begin(staging)
            manifest = self._fill(staging, parts, manifest, put, read, peers)
            files = files_in(staging)
            size_bytes = sum(file.stat().st_size for file in files)
            if self._fsync:
                self._sync(staging, files)
            path = self._rename(staging, name)
        except BaseException:
            self._failed = True
            try_to_remove(staging)
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
        self._failed = False
        self._number = manifest.number
        return Committed(path, manifest, size_bytes)

    def write_part(
        self,
        folder: Path,
        index: int,
        parts: Mapping[str, Mapping[str, Any]],
        facts: RunRecord | None,
        *,
        put: Put | None = None,
        read: Read = np.asarray,
    ) -> None:
        """Writes the part of the process ``index``, which is not 0, into the folder that process 0 has made.

        Raises:
            SnapshotError: the folder is not there, so the processes do not share the directory.
        """
        if not folder.is_dir():
            raise SnapshotError(
                f"{folder}, which process 0 has made, is not there. All processes need the same directory, on a file "
                "system that they share."
            )
        part = HostPart(arrays=self._write_arrays(folder, parts, put, read), facts=facts)
        file = HostPart.path(folder, index)
        atomic_files.write_text(file, part.model_dump_json())
        own = own_folder(folder, index)
        if self._fsync:  # what the others write is not complete yet
            self._sync(own, [*files_in(own), file])

    def close(self) -> None:
        """Ends Orbax' own threads. Raises what failed in them."""
        self._orbax.close()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        self._leftovers = [folder for folder in self._leftovers if not try_to_remove(folder)]

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

    def _fill(
        self,
        folder: Path,
        parts: Mapping[str, Mapping[str, Any]],
        manifest: Manifest,
        put: Put | None,
        read: Read,
        peers: CheckpointPeers | None,
    ) -> Manifest:
        described = self._write_arrays(folder, parts, put, read)
        if peers is not None:
            peers.wait_for_parts()
            described, manifest = self._merged(folder, described, manifest, peers.count)
        if (folder / ARRAYS).exists():
            self._orbax.finalize(folder / ARRAYS)
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

    @staticmethod
    def _merged(
        folder: Path, described: dict[str, dict[str, SavedArray]], manifest: Manifest, count: int
    ) -> tuple[dict[str, dict[str, SavedArray]], Manifest]:
        """Returns description and manifest with the parts of the other processes, whose files it removes."""
        records: dict[int, RunRecord] = {}
        for index in range(1, count):
            file = HostPart.path(folder, index)
            part = HostPart.model_validate_json(file.read_bytes())
            file.unlink()
            described = {
                name: {path: array.with_shards(part.arrays[name][path]) for path, array in arrays.items()}
                for name, arrays in described.items()
            }
            if part.facts is not None:
                records[index] = part.facts
        if manifest.facts is not None:
            manifest = manifest.model_copy(update={"facts": manifest.facts.with_hosts(records)})
        return described, manifest

    def _write_arrays(
        self, folder: Path, parts: Mapping[str, Mapping[str, Any]], put: Put | None, read: Read
    ) -> dict[str, dict[str, SavedArray]]:
        """Writes the arrays, or the shards that this process has of them, and returns their description."""
        arrays = {
            part: {path: stored(leaf, read) for path, leaf in leaves.items() if array_of(leaf).size}
            for part, leaves in parts.items()
        }
        self._require_space(folder, [array for leaves in arrays.values() for array in leaves.values()])
        with ThreadPoolExecutor(1) as executor:  # both release the GIL
            description = executor.submit(_described, parts, read)
            if tree := nested(arrays):
                if put is None:
                    self._orbax.save(folder / ARRAYS, tree)
                else:
                    description.result()  # both need the same memory
                    with closing(ArrayFiles(put)) as orbax:
                        orbax.save(folder / ARRAYS, tree)
            return description.result()

    def _require_space(self, folder: Path, arrays: list[Any]) -> None:
        """Raises OSError if the arrays cannot have room on the disk: Orbax would log a page of tracebacks for each.

        Only a lack of room beyond doubt counts, without what is reserved for root, until an attempt has failed.
        """
        needed = sum(_stored_bytes(array) for array in arrays)
        disk = os.statvfs(folder)
        free = disk.f_bfree * disk.f_frsize
        if self._failed:
            needed += needed // 50 + FILES_BYTES
            free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and free < needed:
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: the checkpoint needs about {size_text(needed)}, and {size_text(free)} are "
                f"free in {self.directory}",
            )


def _stored_bytes(array: Any) -> int:
    """Returns the size of what this process writes of an array."""
    if is_sharded(array):
        return sum(shard.data.nbytes for shard in array.addressable_shards if shard.replica_id == 0)
    return array.nbytes


def _described(parts: Mapping[str, Mapping[str, Any]], read: Read) -> dict[str, dict[str, SavedArray]]:
    return {
        part: {path: SavedArray.of(leaf, read) for path, leaf in leaves.items()}
        for part, leaves in parts.items()
    }
