"""``Uploader``: copies committed checkpoints and logs off the machine, in threads of its own."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path, PurePath

from eventtrain.errors import ConfigurationError, EventTrainError, SubscriberError
from eventtrain.events import CheckpointCommitted, CheckpointUploadFailed, RunResumed
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.remote.object_store import ObjectStore, Options, keep_secret
from eventtrain.subscribers.remote.upload_worker import PendingUpload, UploadOptions, UploadWorker

logger = logging.getLogger("eventtrain")


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

    ``download_checkpoint`` fetches one. Tested with an S3 server and with folders; GCS and Azure are untested.

    Raises:
        ConfigurationError: obstore is not installed, or an argument is invalid.
    """

    disable_after = None  # a store that was away for a day may be back

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
        self._options = UploadOptions(logs, max_concurrency, retries, retry_delay_s)
        self._finish_timeout_s = finish_timeout_s
        self._run: RunContext | None = None
        self._worker: UploadWorker | None = None
        self._step = 0

    async def start(self, run: RunContext) -> None:
        """Starts the thread that copies."""
        self._run = run
        self._worker = UploadWorker(
            self.name or "Uploader",
            run.publish,
            store=self._connect(self._url.replace("{run_id}", run.run_id)),
            run_dir=run.run_dir,
            options=self._options,
        )
        self._worker.start()

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Has it copied; returns at once."""
        self._step = event.step
        if self._worker is not None:
            self._worker.add(PendingUpload(Path(event.path), event.step, event.tag))

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Has copied what the earlier attempts could not; returns at once."""
        if self._worker is not None:
            self._worker.add_all(Path(event.path).parent)

    async def stop(self) -> None:
        """Waits for what is not copied.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        run, worker, self._worker = self._run, self._worker, None
        if run is None or worker is None:
            return
        worker.add_logs(self._step)
        in_time = await worker.finish_within(self._finish_timeout_s, partial(_report_left, worker, run))
        if not in_time:
            raise SubscriberError(
                f"Not everything was copied to {worker.url} within {self._finish_timeout_s:g} s after the run."
            )


def _report_left(worker: UploadWorker, run: RunContext) -> None:
    left = list(worker.waiting)
    names = ", ".join(upload.path.name for upload in left) or "the last rows of the logs"
    logger.error("The time for the end of the run is over; %s lacks %s", worker.url, names)
    reason = "it was not in the store when the time for the end of the run was over"
    for upload in left:
        event = CheckpointUploadFailed(
            step=upload.step, path=str(upload.path), url=worker.url, tag=upload.tag, error=reason
        )
        try:
            run.publish(event)
        except EventTrainError as error:
            logger.error("The event that reports it was not published: %s", error)
