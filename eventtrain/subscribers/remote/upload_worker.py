"""``UploadWorker``: copies checkpoints and logs to a store, one checkpoint after the other, several files at once."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import BinaryIO, TypeVar

from eventtrain._version import __version__
from eventtrain.errors import EventTrainError, SnapshotError, StorageError
from eventtrain.events import CheckpointUploaded, CheckpointUploadFailed, Event, SubscriberFailed
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.checkpointing.directory import committed_in, files_in
from eventtrain.subscribers.checkpointing.manifest import MANIFEST as CHECKPOINT_MANIFEST
from eventtrain.subscribers.checkpointing.manifest import read_manifest
from eventtrain.subscribers.remote.object_store import ObjectStore
from eventtrain.subscribers.remote.parallel import in_parallel
from eventtrain.subscribers.remote.upload_manifest import UPLOAD_MANIFEST, UploadedFile, UploadManifest

logger = logging.getLogger("eventtrain")

T = TypeVar("T")

READ_BYTES = 8 * 2**20
OPEN_FILES = 200
"""Files of one checkpoint that are held open; a process may have some 1,000 open."""


@dataclass(frozen=True)
class UploadOptions:
    """How files are copied.

    Attributes:
        logs: patterns of the logs in the run's directory.
        max_concurrency: files at once.
        retries, retry_delay_s: of one file, after those of obstore itself; the delay doubles each time.
    """

    logs: Sequence[str]
    max_concurrency: int
    retries: int
    retry_delay_s: float


@dataclass(frozen=True)
class PendingUpload:
    """A committed checkpoint that is to be copied."""

    path: Path
    step: int
    tag: str | None


@dataclass(frozen=True)
class LocalFile:
    """A file as long as it was when it was opened. One thread at a time reads it.

    Attributes:
        path: of the file.
        name: its path below its folder, with slashes.
        size_bytes: how much of it is sent.
        file: the open file, which can be read after its deletion; None: it is opened for each part.
        stopping: once set, reading fails, so that transfers end.
    """

    path: Path
    name: str
    size_bytes: int
    file: BinaryIO | None
    stopping: threading.Event

    def read(self, offset: int, size: int) -> bytes:
        """Returns ``size`` bytes from ``offset`` on. Raises StorageError if they cannot be read."""
        if self.stopping.is_set():
            raise StorageError(f"{self.name}: it was given up at the end of the run")
        try:
            with ExitStack() as stack:
                file = self.file or stack.enter_context(self.path.open("rb"))
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise StorageError(f"{self.path} became shorter while it was copied")
        return data

    def sha256(self, size: int) -> str:
        """Returns the SHA-256 of the first ``size`` bytes. Raises StorageError if they cannot be read."""
        digest = hashlib.sha256()
        for offset in range(0, size, READ_BYTES):
            digest.update(self.read(offset, min(READ_BYTES, size - offset)))
        return digest.hexdigest()


class UploadWorker(WorkerThread):
    """Copies what is added, in that order.

    Args:
        owner: name of the Uploader.
        publish: ``EventBus.publish``.
        store: opened by the thread.
        run_dir: paths below it are kept in the store.
        options: how files are copied.
    """

    def __init__(
        self,
        owner: str,
        publish: Callable[[Event], None],
        *,
        store: ObjectStore,
        run_dir: Path,
        options: UploadOptions,
    ) -> None:
        super().__init__(owner, publish)
        self._owner = owner
        self._store = store
        self._run_dir = run_dir
        self._options = options
        self._copied: dict[Path, tuple[int, int]] = {}
        self._logs: dict[Path, UploadedFile] = {}
        self.waiting: list[PendingUpload] = []
        """Neither copied nor failed yet, in order."""

    @property
    def url(self) -> str:
        """URL of the store."""
        return self._store.url

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(self, upload: PendingUpload) -> None:
        """Has the logs copied, and then this checkpoint."""
        self.waiting.append(upload)
        self.put(partial(self._copy_logs, upload.step))
        self.put(partial(self._copy, upload))

    def add_all(self, directory: Path) -> None:
        """Has every checkpoint in ``directory`` copied that the store does not have yet."""
        self.put(partial(self._copy_all, directory))

    def add_logs(self, step: int) -> None:
        """Has the logs copied."""
        self.put(partial(self._copy_logs, step))

    # --- on the thread: checkpoints ---------------------------------------------------------------------------

    def _copy_all(self, directory: Path) -> None:
        try:
            found = [
                PendingUpload(one.path, one.manifest.step, one.manifest.tag)
                for one in committed_in(directory)
            ]
        except OSError as error:
            logger.error("The checkpoints in %s were not copied to %s: %s", directory, self.url, error)
            return
        self.waiting.extend(found)
        for upload in found:
            self._copy(upload)

    def _copy(self, upload: PendingUpload) -> None:
        began_s = monotonic()
        try:
            name, size_bytes = self._upload(upload.path)
        except Exception as error:
            if self.stopping.is_set():
                return  # the Uploader reports it
            self.waiting.remove(upload)
            self._failed(upload, error)
            return
        self.waiting.remove(upload)
        if size_bytes is None:
            logger.info("%s is at %s/%s already", upload.path, self.url, name)
            return
        self.publish(
            CheckpointUploaded(
                step=upload.step,
                path=str(upload.path),
                url=f"{self.url}/{name}",
                tag=upload.tag,
                size_bytes=size_bytes,
                duration_s=monotonic() - began_s,
            )
        )

    def _failed(self, upload: PendingUpload, error: Exception) -> None:
        reason = _text_of(error)
        if not upload.path.exists():
            reason = (
                "it was deleted before it was copied. Retain more checkpoints (max_to_keep), or write fewer"
            )
        logger.error("%s was not copied to %s: %s", upload.path, self.url, reason)
        self.publish(
            CheckpointUploadFailed(
                step=upload.step, path=str(upload.path), url=self.url, tag=upload.tag, error=reason
            )
        )

    def _upload(self, path: Path) -> tuple[str, int | None]:
        """Copies one checkpoint; returns its path in the store, and its size unless it was there already."""
        store, options = self._store, self._options
        store.open()
        with ExitStack() as stack:
            checkpoint = read_manifest(path)
            files = self._open_files(path, stack)
            name, is_there = self._retry(partial(self._place, path, files))
            if is_there:
                return name, None
            uploaded = in_parallel(
                lambda file: self._put(f"{name}/{file.name}", file),
                files,
                threads=options.max_concurrency,
                name=self._owner,
            )
        manifest = UploadManifest(
            eventtrain=__version__,
            step=checkpoint.step,
            tag=checkpoint.tag,
            run_id=checkpoint.run_id,
            time=checkpoint.time,
            resumable=checkpoint.facts is not None,
            files=tuple(uploaded),
            logs=tuple(self._logs.values()),
        )
        self._retry(lambda: store.write(f"{name}/{UPLOAD_MANIFEST}", manifest.to_bytes()))
        return name, manifest.size_bytes

    def _open_files(self, folder: Path, stack: ExitStack) -> list[LocalFile]:
        """Opens ``OPEN_FILES`` of the files of a folder until ``stack`` ends, so that their deletion does not matter.

        Raises:
            OSError: the folder was deleted before all of them were open.
        """
        inode = folder.stat().st_ino
        files: list[LocalFile] = []
        for path in files_in(folder):
            name = path.relative_to(folder).as_posix()
            if len(files) < OPEN_FILES:
                files.append(self._open(path, name, stack))
            else:
                files.append(LocalFile(path, name, path.stat().st_size, None, self.stopping))
        if (
            folder.stat().st_ino != inode
        ):  # it is renamed before its files are deleted, so some might be missing
            raise FileNotFoundError(f"{folder} was replaced while it was read")
        return files

    def _open(self, path: Path, name: str, stack: ExitStack) -> LocalFile:
        file = stack.enter_context(path.open("rb"))
        return LocalFile(path, name, file.seek(0, 2), file, self.stopping)

    def _place(self, path: Path, files: Sequence[LocalFile]) -> tuple[str, bool]:
        """Returns a free path for a checkpoint, or its path and True if it is in the store already."""
        identity = next(file.sha256(file.size_bytes) for file in files if file.name == CHECKPOINT_MANIFEST)
        try:
            name = path.relative_to(self._run_dir).as_posix()
        except ValueError:
            name = f"{path.parent.name}/{path.name}"
        for each in (name if n == 1 else f"{name}-{n}" for n in count(1)):
            data = self._store.read(f"{each}/{UPLOAD_MANIFEST}")
            if data is None:
                return each, False
            try:
                there = UploadManifest.parse(data)
            except SnapshotError:
                continue
            if there is not None and there.identity == identity:
                return each, True
        raise AssertionError("unreachable")

    def _put(self, path: str, file: LocalFile) -> UploadedFile:
        sha256 = self._retry(lambda: self._store.put(path, file.size_bytes, file.read))
        return UploadedFile(path=file.name, size_bytes=file.size_bytes, sha256=sha256)

    # --- on the thread: logs ----------------------------------------------------------------------------------

    def _copy_logs(self, step: int) -> None:
        paths = {path for pattern in self._options.logs for path in self._run_dir.glob(pattern)}
        for path in sorted(path for path in paths if path.is_file()):
            try:
                self._copy_log(path)
            except Exception as error:
                if self.stopping.is_set():
                    return
                text = f"{path.name} was not copied to {self.url}: {_text_of(error)}"
                logger.error("%s", text)
                kind = "checkpoint_committed"
                self.publish(SubscriberFailed(step=step, subscriber=self._owner, event_kind=kind, error=text))

    def _copy_log(self, path: Path) -> None:
        now = path.stat()
        version = (now.st_size, now.st_mtime_ns)
        if self._copied.get(path) == version:
            return
        name = path.relative_to(self._run_dir).as_posix()
        self._store.open()
        with ExitStack() as stack:
            file = self._open(path, name, stack)
            if path not in self._copied:
                self._retry(lambda: self._set_aside(file))
            self._logs[path] = self._put(name, file)
        self._copied[path] = version

    def _set_aside(self, file: LocalFile) -> None:
        """Renames an object that another process wrote under this name, unless this file begins with it."""
        store, name = self._store, file.name
        size = store.size_bytes(name)
        if size is None or (size <= file.size_bytes and file.sha256(size) == store.sha256(name)):
            return
        names = (f"{name}.before-{n}" for n in count(1))
        store.rename(name, next(each for each in names if store.size_bytes(each) is None))

    def _retry(self, action: Callable[[], T]) -> T:
        options = self._options
        return retry(action, retries=options.retries, delay_s=options.retry_delay_s, stopping=self.stopping)


def _text_of(error: Exception) -> str:
    return str(error) if isinstance(error, EventTrainError) else f"{type(error).__name__}: {error}"
