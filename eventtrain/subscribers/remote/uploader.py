"""``Uploader``: copies committed checkpoints and logs off the machine, in threads of its own."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path, PurePath
from time import monotonic
from typing import BinaryIO, TypeVar
from urllib.parse import quote

from eventtrain._version import __version__
from eventtrain.errors import (
    ConfigurationError,
    EventTrainError,
    PeerLost,
    SnapshotError,
    StorageError,
    SubscriberError,
)
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointUploaded,
    CheckpointUploadFailed,
    Event,
    RunResumed,
    SubscriberFailed,
)
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.checkpointing.directory import committed_in, files_in
from eventtrain.subscribers.checkpointing.manifest import MANIFEST as CHECKPOINT_MANIFEST
from eventtrain.subscribers.checkpointing.manifest import read_manifest
from eventtrain.subscribers.checkpointing.processes import process_of
from eventtrain.subscribers.remote.object_store import (
    PART_BYTES,
    ObjectStore,
    Options,
    in_parallel,
    keep_secret,
)
from eventtrain.subscribers.remote.processes import PartRequest, UploadPeers
from eventtrain.subscribers.remote.upload_manifest import UPLOAD_MANIFEST, UploadedFile, UploadManifest
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

logger = logging.getLogger("eventtrain")

T = TypeVar("T")

OPEN_FILES = 200
"""Files of one checkpoint that are held open; a process may have some 1,000 open."""


class Uploader(Subscriber):
    """Copies each committed checkpoint to a store, completely and verified, and the logs of the run.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, or an absolute folder, also as
            ``file:///folder``. ``{run_id}`` in it becomes that of the run. It is shown in events and logs, so it must
            not contain keys. One run, one URL.
        options: obstore's configuration of its S3Store, GCSStore or AzureStore, such as ``endpoint`` and
            ``secret_access_key``, and of its HTTP client, such as ``allow_http``. What is not here comes from the
            environment (``AWS_ACCESS_KEY_ID`` ...). No value is ever shown.
        logs: patterns of files in ``run_dir`` that are copied before each checkpoint and at the end; () for none.
        max_concurrency: files copied at once. Each takes about 40 MiB of memory at most.
        retries, retry_delay_s: more attempts for one file, and the seconds before the first of them; doubled each time.
        timeout_s: of one request, which carries at most 8 MiB (of a file above 70 GiB, a 9,000th of it).
        finish_timeout_s: how long ``stop`` waits for what is not copied, within the trainer's ``drain_timeout_s``.

    List it after the loggers, whose last rows it copies. Checkpoints are copied in the order in which they were
    committed, to their paths below ``run_dir``. ``manifest.json``, with the SHA-256 of each file, comes last: a
    checkpoint without one does not exist. CheckpointUploaded reports that it is in the store, CheckpointUploadFailed
    that it is not and will not be. A resumed run copies the checkpoints in its Checkpointer's folder that are not in
    the store. Nothing in the store is deleted. Only files without a manifest, and logs that grew, are overwritten.

    In a run of several processes, each sends the files of a checkpoint that it has written, and process 0 the manifest
    and the logs. So each of them must reach the store, and ``max_concurrency`` counts for each.

    ``download_checkpoint`` fetches one. Tested with an S3 server and with folders; GCS and Azure are untested.

    Raises:
        ConfigurationError: obstore is not installed, or an argument is invalid.
    """

    disable_after = None  # a store that was away for a day may be back
    per_host = True

    @checked
    def __init__(
        self,
        url: str,
        *,
        options: Options | None = None,
        logs: tuple[str, ...] = ("*.jsonl",),
        max_concurrency: int = 4,
        retries: int = 5,
        retry_delay_s: float = 1.0,
        timeout_s: float = 120.0,
        finish_timeout_s: float = 300.0,
    ) -> None:
        require_count("Uploader", "max_concurrency", max_concurrency, at_least=1)
        require_count("Uploader", "retries", retries)
        require_number("Uploader", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("Uploader", "timeout_s", timeout_s, above=0)
        require_number("Uploader", "finish_timeout_s", finish_timeout_s, at_least=0)
        for pattern in logs:
            if not pattern or PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
                raise ConfigurationError(
                    f"Uploader(logs={logs!r}): logs must be patterns of files below run_dir, got {pattern!r}."
                )
        self._url = url
        secret = keep_secret(options or {})
        self._connect = partial(ObjectStore, "Uploader", options=secret, timeout_s=timeout_s)
        self._connect(url.replace("{run_id}", "run"))  # raises now if that cannot work
        self._options = _UploadOptions(logs, max_concurrency, retries, retry_delay_s)
        self._finish_timeout_s = finish_timeout_s
        self._worker: _UploadWorker | None = None
        self._step = 0
        self._decides = True

    async def start(self, run: RunContext) -> None:
        """Starts the thread that copies."""
        store = self._connect(self._url.replace("{run_id}", run.run_id))
        self._decides = run.process_index == 0
        self._worker = worker = _UploadWorker(self.name or "Uploader", run, store, self._options)
        worker.start()
        worker.put(worker.begin if self._decides else worker.send_parts)

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Has it copied; returns at once."""
        self._step, worker = event.step, self._worker
        if worker is not None and self._decides:
            upload = _PendingUpload(Path(event.path), event.step, event.tag)
            worker.waiting.append(upload)
            worker.put(partial(worker.copy_logs, event.step))
            worker.put(partial(worker.copy, upload))

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Has copied what the earlier attempts could not; returns at once."""
        if self._worker is not None and self._decides:
            self._worker.put(partial(self._worker.copy_all, Path(event.path).parent))

    async def stop(self) -> None:
        """Waits for what is not copied.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if self._decides:
            worker.put(partial(worker.copy_logs, self._step))
            worker.put(worker.end)
        worker.ending.set()
        give_up = worker.report_left if self._decides else None
        if not await worker.finish_within(self._finish_timeout_s, give_up):
            raise SubscriberError(
                f"Not everything was copied to {worker.url} within {self._finish_timeout_s:g} s after the run."
            )


@dataclass(frozen=True)
class _UploadOptions:
    logs: Sequence[str]
    max_concurrency: int
    retries: int
    retry_delay_s: float


@dataclass(frozen=True)
class _PendingUpload:
    """A committed checkpoint that is to be copied."""

    path: Path
    step: int
    tag: str | None


@dataclass(frozen=True)
class _LocalFile:
    """A file as long as it was when it was opened. One thread at a time reads it."""

    path: Path
    name: str
    """Its path below its folder, with slashes."""
    size_bytes: int
    file: BinaryIO | None
    """The open file, which can be read after its deletion; None: it is opened for each part."""
    stopping: threading.Event
    """Once set, reading fails, so that transfers end."""

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
        for offset in range(0, size, PART_BYTES):
            digest.update(self.read(offset, min(PART_BYTES, size - offset)))
        return digest.hexdigest()


class _UploadWorker(WorkerThread):
    """Copies checkpoints and logs to a store. Everything but ``put`` and ``report_left`` is called on the thread."""

    def __init__(self, owner: str, run: RunContext, store: ObjectStore, options: _UploadOptions) -> None:
        super().__init__(owner, run.publish)
        self.url = store.url
        self.waiting: list[_PendingUpload] = []
        """Neither copied nor failed yet, in order."""
        self.ending = threading.Event()
        """The run has ended."""
        self._owner = owner
        self._store = store
        self._run_dir = run.run_dir
        self._options = options
        self._copied: dict[Path, tuple[int, int]] = {}
        self._logs: dict[Path, UploadedFile] = {}
        self._peers: UploadPeers | None = None
        if run.exchange is not None:
            key = f"uploads/{quote(owner, safe='')}"
            self._peers = UploadPeers(
                run.exchange, key, run.process_index, run.process_count, self._require_time
            )

    def report_left(self) -> None:
        """Reports what is not copied, at the end of the run. On the event loop."""
        left = list(self.waiting)
        names = ", ".join(upload.path.name for upload in left) or "the last rows of the logs"
        logger.error("The time for the end of the run is over; %s lacks %s", self.url, names)
        reason = "it was not in the store when the time for the end of the run was over"
        for upload in left:
            try:
                self._publish(self._failure(upload, reason))
            except EventTrainError as error:
                logger.error("The event that reports it was not published: %s", error)

    def _failure(self, upload: _PendingUpload, reason: str) -> Event:
        return CheckpointUploadFailed(
            step=upload.step, path=str(upload.path), url=self.url, tag=upload.tag, error=reason
        )

    # --- checkpoints ------------------------------------------------------------------------------------------

    def copy_all(self, directory: Path) -> None:
        """Copies every checkpoint in ``directory`` that the store does not have yet."""
        try:
            committed = committed_in(directory)
        except OSError as error:
            logger.error("The checkpoints in %s were not copied to %s: %s", directory, self.url, error)
            return
        found = [_PendingUpload(one.path, one.manifest.step, one.manifest.tag) for one in committed]
        self.waiting.extend(found)
        for upload in found:
            self.copy(upload)

    def copy(self, upload: _PendingUpload) -> None:
        """Copies one checkpoint unless it is in the store, and reports the outcome."""
        began_s = monotonic()
        try:
            name, size_bytes = self._upload(upload.path)
        except Exception as error:
            if self.stopping.is_set():
                return  # ``report_left`` does
            reason = _reason(error, upload.path)
            logger.error("%s was not copied to %s: %s", upload.path, self.url, reason)
            outcome = self._failure(upload, reason)
        else:
            outcome = CheckpointUploaded(
                step=upload.step,
                path=str(upload.path),
                url=f"{self.url}/{name}",
                tag=upload.tag,
                size_bytes=size_bytes or 0,
                duration_s=monotonic() - began_s,
            )
            if size_bytes is None:
                logger.info("%s is at %s already", upload.path, outcome.url)
                outcome = None
        self.waiting.remove(upload)
        if outcome is not None:
            self.publish(outcome)

    def _upload(self, path: Path) -> tuple[str, int | None]:
        """Copies one checkpoint; returns its path in the store, and its size unless it was there already."""
        store, peers = self._store, self._peers
        store.open()
        with ExitStack() as stack:
            checkpoint = read_manifest(path)
            names = {file.relative_to(path).as_posix() for file in files_in(path)}
            files = self._open_files(path, stack)
            name, is_there = self._retry(partial(self._place, path, files))
            if is_there:
                return name, None
            if peers is not None:
                peers.begin(PartRequest(path=self._below_run_dir(path), name=name))
            uploaded = self._put_all(name, files)
            if peers is not None:
                uploaded += self._parts(name, names - {file.name for file in files}, peers)
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
        data = manifest.model_dump_json(indent=1).encode()
        self._retry(lambda: store.write(f"{name}/{UPLOAD_MANIFEST}", data))
        return name, sum(file.size_bytes for file in uploaded)

    def _parts(self, name: str, wanted: Set[str], peers: UploadPeers) -> list[UploadedFile]:
        """Returns the files that the other processes have sent: all that are ``wanted``, and in the store.

        Raises:
            StorageError: one is missing.
        """
        parts = peers.wait_for_parts()
        if missing := sorted(wanted - {part.path for part in parts}):
            raise StorageError(f"{missing[0]} was not sent by the process that has written it")
        for part in parts:
            size_bytes = self._retry(partial(self._store.size_bytes, f"{name}/{part.path}"))
            if size_bytes != part.size_bytes:
                raise StorageError(
                    f"{part.path}, which another process has sent, is not at {self.url}. All processes need the same "
                    "store; a folder must be on a file system that they share"
                )
        return parts

    def begin(self) -> None:
        """Tells the other processes that checkpoints are copied."""
        if self._peers is not None:
            self._peers.open()

    def send_parts(self) -> None:
        """Sends the files of this process of each checkpoint that process 0 copies, until that ends."""
        peers = self._peers
        assert peers is not None
        with suppress(PeerLost, StorageError):  # the run reports that it has ended so
            if not peers.is_opened(self.ending.is_set):
                return  # the run ended before this subscriber was started in process 0
            while (request := peers.next_request()) is not None:
                path = self._run_dir / request.path
                try:
                    self._store.open()
                    with ExitStack() as stack:
                        files = self._put_all(request.name, self._open_files(path, stack))
                except Exception as error:
                    peers.answer(error=_reason(error, path))
                else:
                    peers.answer(files)

    def end(self) -> None:
        """Tells the other processes that nothing more is copied."""
        if self._peers is not None:
            self._peers.end()

    def _require_time(self) -> None:
        if self.stopping.is_set():
            raise StorageError("the time for the end of the run was over")

    def _put_all(self, name: str, files: Sequence[_LocalFile]) -> list[UploadedFile]:
        return in_parallel(
            lambda file: self._put(f"{name}/{file.name}", file),
            files,
            threads=self._options.max_concurrency,
            name=self._owner,
        )

    def _open_files(self, folder: Path, stack: ExitStack) -> list[_LocalFile]:
        """Opens ``OPEN_FILES`` of the files of a folder until ``stack`` ends, so that their deletion does not matter.

        In a run of several processes, the files of this one.

        Raises:
            OSError: the folder was deleted before all of them were open.
        """
        inode = folder.stat().st_ino
        files: list[_LocalFile] = []
        for path in files_in(folder):
            name = path.relative_to(folder).as_posix()
            if self._peers is not None and process_of(name, self._peers.count) != self._peers.index:
                continue
            if len(files) < OPEN_FILES:
                files.append(self._open(path, name, stack))
            else:
                files.append(_LocalFile(path, name, path.stat().st_size, None, self.stopping))
        # It is renamed before its files are deleted, so some might be missing.
        if folder.stat().st_ino != inode:
            raise FileNotFoundError(f"{folder} was replaced while it was read")
        return files

    def _open(self, path: Path, name: str, stack: ExitStack) -> _LocalFile:
        file = stack.enter_context(path.open("rb"))
        return _LocalFile(path, name, file.seek(0, 2), file, self.stopping)

    def _place(self, path: Path, files: Sequence[_LocalFile]) -> tuple[str, bool]:
        """Returns a free path for a checkpoint, or its path and True if it is in the store already."""
        identity = next(file.sha256(file.size_bytes) for file in files if file.name == CHECKPOINT_MANIFEST)
        is_inside = path.is_relative_to(self._run_dir)
        name = self._below_run_dir(path) if is_inside else f"{path.parent.name}/{path.name}"
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

    def _below_run_dir(self, path: Path) -> str:
        """Returns ``path`` relative to run_dir if it is in there, so that another process may have that elsewhere."""
        return (path.relative_to(self._run_dir) if path.is_relative_to(self._run_dir) else path).as_posix()

    def _put(self, path: str, file: _LocalFile) -> UploadedFile:
        sha256 = self._retry(lambda: self._store.put(path, file.size_bytes, file.read))
        return UploadedFile(path=file.name, size_bytes=file.size_bytes, sha256=sha256)

    # --- logs -------------------------------------------------------------------------------------------------

    def copy_logs(self, step: int) -> None:
        """Copies the logs that changed."""
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

    def _set_aside(self, file: _LocalFile) -> None:
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


def _reason(error: Exception, path: Path) -> str:
    """Returns why the checkpoint at ``path`` was not copied."""
    if not path.exists():
        return "it was deleted before it was copied. Retain more checkpoints (max_to_keep), or write fewer"
    return _text_of(error)


def _text_of(error: Exception) -> str:
    return str(error) if isinstance(error, EventTrainError) else f"{type(error).__name__}: {error}"
