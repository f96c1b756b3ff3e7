"""``Uploader``: copies committed checkpoints and logs off the machine, in threads of its own."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path, PurePath

from eventtrain.errors import ConfigurationError, EventTrainError, SubscriberError
from eventtrain.events import CheckpointCommitted, CheckpointUploadFailed, RunResumed
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.remote.upload_manifest import Options, connect, keep_secret
from eventtrain.subscribers.remote.upload_worker import UploadOptions, UploadThread, Wanted

logger = logging.getLogger("eventtrain")


class Uploader(Subscriber):
    """Copies each committed checkpoint to a store, whole and verified, and the logs of the run.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, or an absolute folder, also as
            ``file:///folder``. ``{run_id}`` in it becomes that of the run. It is shown in events and logs, so it must
            not hold keys. One run, one URL.
        options: obstore's configuration of its S3Store, GCSStore or AzureStore, such as ``endpoint`` and
            ``secret_access_key``, and of its HTTP client, such as ``allow_http``. What is not here comes from the
            environment (``AWS_ACCESS_KEY_ID`` ...). No value is ever shown.
        logs: patterns of files in ``run_dir`` that are copied before each checkpoint and at the end; () for none.
        max_concurrency: files copied at once. Each takes about 40 MiB of memory at most.
        retries, retry_delay_s: more tries of one file, and the seconds before the first of them; doubled each time.
        timeout_s: of one request, which carries at most 8 MiB (of a file above 70 GiB, a 9,000th of it).
        finish_timeout_s: how long ``stop`` waits for what is on its way, within the trainer's ``drain_timeout_s``.

    List it after the loggers, whose last rows it copies. Checkpoints are copied in the order in which they were
    committed, to where they lie below ``run_dir``. ``manifest.json``, with the SHA-256 of each file, comes last: a
    checkpoint without one does not exist. CheckpointUploaded says that it is there, CheckpointUploadFailed that it
    is not and will not be. A run that resumes copies what lies in its Checkpointer's folder and not in the store.
    Nothing there is deleted. Only files without a manifest, and logs that went on, are overwritten.

    ``download_checkpoint`` brings one back. Tested with an S3 server and with folders; GCS and Azure are untested.

    Raises:
        ConfigurationError: obstore is missing, or an argument cannot work.
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
                    f"Uploader(logs={logs!r}): {pattern!r} is no pattern of files below run_dir."
                )
        self._url = url
        self._connect = partial(connect, "Uploader", options=keep_secret(options or {}), timeout_s=timeout_s)
        self._connect(url.replace("{run_id}", "run"))  # finds out now whether that can work
        self._logs = logs
        self._max_concurrency = max_concurrency
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._finish_timeout_s = finish_timeout_s
        self._run: RunContext | None = None
        self._thread: UploadThread | None = None
        self._step = 0

    async def start(self, run: RunContext) -> None:
        """Start the thread that copies."""
        self._run = run
        options = UploadOptions(
            owner=self.name or "Uploader",
            run_dir=run.run_dir,
            logs=self._logs,
            max_concurrency=self._max_concurrency,
            retries=self._retries,
            retry_delay_s=self._retry_delay_s,
        )
        store = self._connect(self._url.replace("{run_id}", run.run_id))
        self._thread = UploadThread(store, options, run.publish)
        self._thread.start()

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Have it copied; returns at once."""
        self._step = event.step
        if self._thread is not None:
            self._thread.add(Wanted(Path(event.path), event.step, event.tag))

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Have copied what the attempts before could not; returns at once."""
        if self._thread is not None:
            self._thread.add_all(Path(event.path).parent)

    async def stop(self) -> None:
        """Wait for what is on its way. Raises SubscriberError where that takes too long."""
        run, thread, self._thread = self._run, self._thread, None
        if run is None or thread is None:
            return
        thread.add_logs(self._step)
        in_time = await thread.finish_within(self._finish_timeout_s, partial(_tell_left, thread, run))
        if not in_time:
            raise SubscriberError(
                f"Not everything was copied to {thread.url} within {self._finish_timeout_s:g} s after the run."
            )


def _tell_left(thread: UploadThread, run: RunContext) -> None:
    reason = "it was not there when the time for the end of the run was over"
    left = list(thread.waiting)
    names = ", ".join(wanted.path.name for wanted in left) or "the last rows of the logs"
    logger.error("The time for the end of the run is over; %s lacks %s", thread.url, names)
    for wanted in left:
        event = CheckpointUploadFailed(
            step=wanted.step, path=str(wanted.path), url=thread.url, tag=wanted.tag, error=reason
        )
        try:
            run.publish(event)
        except EventTrainError as error:
            logger.error("The event that says so was not taken: %s", error)
