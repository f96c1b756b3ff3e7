"""``download_checkpoint``: fetches a checkpoint from a store and verifies it. Blocking; any thread."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eventtrain.errors import SnapshotError, StorageError
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers.checkpointing.directory import temporary_path, try_to_remove
from eventtrain.subscribers.remote.object_store import ObjectStore, Options, in_parallel
from eventtrain.subscribers.remote.upload_manifest import (
    UPLOAD_MANIFEST,
    UploadedFile,
    UploadManifest,
    leads_below,
)
from eventtrain.validation.annotations import checked

logger = logging.getLogger("eventtrain")


@checked
def download_checkpoint(
    url: str,
    directory: str | Path,
    which: str | int = "newest",
    *,
    logs: str | Path | None = None,
    options: Options | None = None,
    max_concurrency: int = 8,
    retries: int = 5,
    retry_delay_s: float = 1.0,
    timeout_s: float = 120.0,
) -> Path:
    """Fetches a checkpoint that an ``Uploader`` copied, so that a run can resume from it or ``et.load_state`` read it.

    Blocks; any thread. The files are written to a temporary folder, which gets its name when the SHA-256 of each was
    right and all are on the disk. Nothing that comes from the store is run.

    Args:
        url: the Uploader's, or that of one checkpoint (``CheckpointUploaded.url``).
        directory: of the new folder; created if missing. To resume: the Checkpointer's.
        which: "newest", a step, a tag, or the checkpoint's path below ``url``. "newest" is the one written last that a
            run can resume from; if there is none, the one written last.
        logs: folder for the logs, as they were when the checkpoint was copied. To resume: the new ``run_dir``, so that
            a JSONLLogger continues them. None: they are not fetched.
        options, timeout_s: as of the Uploader.
        max_concurrency: files at once.
        retries, retry_delay_s: as of the Uploader.

    Returns:
        The folder of the checkpoint. If it exists already, it is verified and not changed.

    Raises:
        SnapshotError: there is no such checkpoint, or other files are at its path or at that of a log.
        StorageError: the store cannot be reached, or what it has is not what was uploaded.
        ConfigurationError: obstore is not installed, or ``url`` or ``options`` are invalid.
        OSError: the files cannot be written.
    """
    folder_path = local_path(directory, "download_checkpoint(directory=...)").absolute()
    logs = None if logs is None else local_path(logs, "download_checkpoint(logs=...)")
    store = ObjectStore("download_checkpoint", url, options, timeout_s=timeout_s)
    again = partial(retry, retries=retries, delay_s=retry_delay_s, stopping=threading.Event())
    for_each = partial(in_parallel, threads=max_concurrency, name="download")

    def fetch(files: Sequence[UploadedFile], base: str, folder: Path) -> None:
        for_each(lambda file: again(lambda: _fetch(store, base, file, folder)), files)

    store.open(make=False)
    paths = [
        path
        for path in again(store.names)
        if path.rpartition("/")[2] == UPLOAD_MANIFEST and leads_below(path)
    ]
    found = for_each(lambda path: again(lambda: _manifest(store, path)), paths)
    place, manifest = _chosen([one for one in found if one is not None], which, store.url)
    path = folder_path / (place or store.url).rpartition("/")[2]
    if not _is_at(path, manifest.files):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = temporary_path(path.parent, path.name)
        try:
            fetch(manifest.files, place, folder)
            for parent, _, _ in os.walk(folder, topdown=False):
                atomic_files.sync(Path(parent))
            atomic_files.rename(folder, path)
            atomic_files.sync(path.parent)
        except BaseException:
            try_to_remove(folder)
            raise
    if logs is not None:
        if manifest.logs and not place:
            raise SnapshotError(f"{store.url} is not the URL of the Uploader, which the logs are below.")
        missing = [log for log in manifest.logs if not _is_at(logs / log.path, [log])]
        fetch(missing, "", logs)
    return path


def _manifest(store: ObjectStore, path: str) -> tuple[str, UploadManifest] | None:
    """Returns the manifest with its folder; None if it is something else, or not valid, which is logged."""
    place = path.rpartition("/")[0]
    try:
        manifest = UploadManifest.parse(store.read(path) or b"")
    except SnapshotError as error:
        logger.warning("%s/%s is left out: %s", store.url, place, error)
        return None
    return None if manifest is None else (place, manifest)


def _chosen(
    found: list[tuple[str, UploadManifest]], which: str | int, url: str
) -> tuple[str, UploadManifest]:
    if which == "newest":
        matching = found
    elif isinstance(which, int):
        matching = [one for one in found if one[1].step == which]
    else:
        matching = [one for one in found if which in (one[1].tag, one[0], one[0].rpartition("/")[2])]
    if not matching:
        names = ", ".join(sorted(place for place, _ in found)) or "none"
        raise SnapshotError(f"There is no checkpoint {which!r} at {url}; found: {names}.")
    return max(matching, key=lambda one: (one[1].resumable, one[1].time))


def _fetch(store: ObjectStore, base: str, file: UploadedFile, folder: Path) -> None:
    """Writes and syncs one file; removes it again if it is not the one that was uploaded."""
    digest = hashlib.sha256()
    target = folder / file.path
    path = f"{base}/{file.path}".lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("wb") as out:
            for part in store.parts(path, file.size_bytes):
                digest.update(part)
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise StorageError(f"{path}: the store has another file than was uploaded", may_pass=True)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _is_at(path: Path, files: Sequence[UploadedFile]) -> bool:
    """Returns whether these files are at ``path``: in it if it is a folder, otherwise it is the one.

    Raises:
        SnapshotError: other files are.
    """
    if not path.exists():
        return False
    for file in files:
        one = path / file.path if path.is_dir() else path
        if one.is_file() and one.stat().st_size == file.size_bytes:
            with one.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                    continue
        raise SnapshotError(
            f"{path} exists and differs from the one in the store. Choose another directory, or delete it."
        )
    return True
