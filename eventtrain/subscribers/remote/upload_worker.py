"""``UploadThread``: copies checkpoints and logs to a store, one checkpoint after the other, several files at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from eventtrain._version import __version__
from eventtrain.errors import EventTrainError, SnapshotError
from eventtrain.events import CheckpointUploaded, CheckpointUploadFailed, Event, SubscriberFailed
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.checkpointing.directory import committed_in
from eventtrain.subscribers.checkpointing.manifest import MANIFEST as CHECKPOINT_MANIFEST
from eventtrain.subscribers.checkpointing.manifest import read_manifest
from eventtrain.subscribers.remote.local_file import LocalFile, open_file, open_files, sha256_of
from eventtrain.subscribers.remote.parallel import in_parallel
from eventtrain.subscribers.remote.upload_manifest import UPLOAD_MANIFEST, UploadedFile, UploadManifest

if TYPE_CHECKING:
    from eventtrain.subscribers.remote.object_store import ObjectStore

logger = logging.getLogger("eventtrain")

T = TypeVar("T")


@dataclass(frozen=True)
class UploadOptions:
    """How to copy.

    Attributes:
        owner: name of the Uploader.
        run_dir: the paths below it are kept in the store.
        logs: patterns of the logs in it.
        max_concurrency: files at once.
        retries, retry_delay_s: of one file, after what obstore itself tries again; the delay doubles each time.
    """

    owner: str
    run_dir: Path
    logs: Sequence[str]
    max_concurrency: int
    retries: int
    retry_delay_s: float


@dataclass(frozen=True)
class Wanted:
    """A committed checkpoint that is to be copied."""

    path: Path
    step: int
    tag: str | None


class UploadThread(WorkerThread):
    """Copies what it is told to, in that order.

    Args:
        store: where to; opened by the thread.
        options: how.
        publish: ``EventBus.publish``.
    """

    def __init__(self, store: ObjectStore, options: UploadOptions, publish: Callable[[Event], None]) -> None:
        super().__init__(options.owner, publish)
        self._store = store
        self._options = options
        self._copied: dict[Path, tuple[int, int]] = {}
        self._logs: dict[Path, UploadedFile] = {}
        self.waiting: list[Wanted] = []
        """Neither there nor failed, in order."""

    @property
    def url(self) -> str:
        """Where to."""
        return self._store.url

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(self, wanted: Wanted) -> None:
        """Have the logs copied, and then this checkpoint."""
        self.waiting.append(wanted)
        self.put(partial(self._copy_logs, wanted.step))
        self.put(partial(self._copy, wanted))

    def add_all(self, directory: Path) -> None:
        """Have every checkpoint in ``directory`` copied that is not there yet."""
        self.put(partial(self._copy_all, directory))

    def add_logs(self, step: int) -> None:
        """Have the logs copied."""
        self.put(partial(self._copy_logs, step))

    # --- on the thread ----------------------------------------------------------------------------------------

    def _copy_all(self, directory: Path) -> None:
        try:
            found = [Wanted(one.path, one.manifest.step, one.manifest.tag) for one in committed_in(directory)]
        except OSError as error:
            logger.error("What lies in %s was not copied to %s: %s", directory, self.url, error)
            return
        self.waiting.extend(found)
        for wanted in found:
            self._copy(wanted)

    def _copy(self, wanted: Wanted) -> None:
        began_s = monotonic()
        try:
            name, size_bytes = self._upload(wanted.path)
        except Exception as error:
            if self.stopping.is_set():
                return  # whoever gave up says it
            self.waiting.remove(wanted)
            reason = _told(error)
            if not wanted.path.exists():
                reason = (
                    "it was deleted before it was copied. Keep more checkpoints (max_to_keep), or write fewer"
                )
            logger.error("%s was not copied to %s: %s", wanted.path, self.url, reason)
            self.publish(
                CheckpointUploadFailed(
                    step=wanted.step,
                    path=str(wanted.path),
                    url=self.url,
                    tag=wanted.tag,
                    error=reason,
                )
            )
            return
        self.waiting.remove(wanted)
        if size_bytes is None:
            logger.info("%s lies at %s/%s already", wanted.path, self.url, name)
            return
        self.publish(
            CheckpointUploaded(
                step=wanted.step,
                path=str(wanted.path),
                url=f"{self.url}/{name}",
                tag=wanted.tag,
                size_bytes=size_bytes,
                duration_s=monotonic() - began_s,
            )
        )

    def _upload(self, path: Path) -> tuple[str, int | None]:
        """Copies one checkpoint; returns its path in the store, and its size unless it was there already."""
        store, options = self._store, self._options
        store.open()
        with ExitStack() as stack:
            checkpoint = read_manifest(path)
            files = open_files(path, stack, self.stopping)
            name, there = self._retried(partial(self._place, path, files))
            if there:
                return name, None
            uploaded = in_parallel(
                lambda file: self._put(f"{name}/{file.name}", file),
                files,
                threads=options.max_concurrency,
                name=options.owner,
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
        self._retried(lambda: store.write(f"{name}/{UPLOAD_MANIFEST}", manifest.to_bytes()))
        return name, manifest.size_bytes

    def _place(self, path: Path, files: Sequence[LocalFile]) -> tuple[str, bool]:
        """Where a checkpoint can lie without touching another one, and whether this one lies there already."""
        identity = next(sha256_of(file) for file in files if file.name == CHECKPOINT_MANIFEST)
        try:
            name = path.relative_to(self._options.run_dir).as_posix()
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
        sha256 = self._retried(lambda: self._store.put(path, file))
        return UploadedFile(path=file.name, size_bytes=file.size_bytes, sha256=sha256)

    def _copy_logs(self, step: int) -> None:
        paths = {path for pattern in self._options.logs for path in self._options.run_dir.glob(pattern)}
        for path in sorted(path for path in paths if path.is_file()):
            try:
                self._copy_log(path)
            except Exception as error:
                if self.stopping.is_set():
                    return
                text = f"{path.name} was not copied to {self.url}: {_told(error)}"
                logger.error("%s", text)
                self.publish(
                    SubscriberFailed(
                        step=step,
                        subscriber=self._options.owner,
                        event_kind="checkpoint_committed",
                        error=text,
                    )
                )

    def _copy_log(self, path: Path) -> None:
        now = path.stat()
        version = (now.st_size, now.st_mtime_ns)
        if self._copied.get(path) == version:
            return
        name = path.relative_to(self._options.run_dir).as_posix()
        self._store.open()
        with ExitStack() as stack:
            file = open_file(path, name, stack, self.stopping)
            if path not in self._copied:
                self._retried(lambda: self._set_aside(file))
            self._logs[path] = self._put(name, file)
        self._copied[path] = version

    def _set_aside(self, file: LocalFile) -> None:
        """What another process wrote under this name, and this file does not begin with, gets a name of its own."""
        store, name = self._store, file.name
        size = store.size_bytes(name)
        if size is None or (size <= file.size_bytes and sha256_of(file, size) == store.sha256(name)):
            return
        names = (f"{name}.before-{n}" for n in count(1))
        store.rename(name, next(each for each in names if store.size_bytes(each) is None))

    def _retried(self, action: Callable[[], T]) -> T:
        options = self._options
        return retry(action, retries=options.retries, delay_s=options.retry_delay_s, stopping=self.stopping)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, EventTrainError) else f"{type(error).__name__}: {error}"
