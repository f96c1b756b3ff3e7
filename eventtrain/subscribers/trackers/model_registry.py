"""``ModelRegistry``: committed checkpoints as versions of a model in MLflow's registry."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError, StorageError, SubscriberError
from eventtrain.events import (
    TO_BE_CONTINUED,
    CheckpointCommitted,
    CheckpointUploaded,
    EpochCompleted,
    Event,
    RunCompleted,
    RunFailed,
    RunResumed,
    SubscriberFailed,
)
from eventtrain.subscribers._shared.paths import directory_path
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.mlflow_store import MLflowRegistry

mlflow_store = import_optional(
    "eventtrain.subscribers.trackers.mlflow_store", extra="mlflow", used_by="ModelRegistry"
)

logger = logging.getLogger("eventtrain")

REMEMBERED_EPOCHS = 100
"""A checkpoint may be committed some epochs after that of its step."""


class ModelRegistry(Subscriber):
    """Registers committed checkpoints as versions of a model in MLflow, each with the metrics of the last epoch.

    Args:
        name: of the registered model; created if missing.
        tracking_uri: of MLflow, such as ``sqlite:///mlflow.db`` or ``https://host``. It may contain a password, and is
            never shown.
        source: of a version: "checkpoint": the folder, once it is committed; "upload": its URL, once an ``Uploader``
            has copied it. An MLflow server takes no folders.
        directory: only the checkpoints of the Checkpointer with this directory; None: of all.
        tags: of each version, besides ``step``, ``epoch``, ``tag``, ``run_id`` and ``metrics.<name>``.
        metrics: names of those that are registered; None: all of EpochCompleted.
        experiment: of the run that the metrics are logged to; there is one for each run of the trainer.
        retries, retry_delay_s: more attempts, and the seconds before the first of them; doubled each time.
        finish_timeout_s: how long ``stop`` waits for what is not registered, within the trainer's ``drain_timeout_s``.

    The metrics are those of the last EpochCompleted up to the step of the checkpoint; before the first one there are
    none. A thread of its own uses MLflow and delays nothing. SubscriberFailed reports what cannot be registered. A
    resumed run registers the checkpoint that it resumes from, if that is not registered yet. A version outlives its
    checkpoint: retain what you register (a tag, ``keep_best``, ``max_to_keep=None``), or register uploads.

    Raises:
        ConfigurationError: MLflow is not installed, or an argument is invalid.
    """

    events = (EpochCompleted, CheckpointCommitted, CheckpointUploaded, RunResumed, RunCompleted, RunFailed)
    disable_after = None

    @checked
    def __init__(
        self,
        name: str,
        tracking_uri: str | SecretStr,
        *,
        source: Literal["checkpoint", "upload"] = "checkpoint",
        directory: str | Path | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: tuple[str, ...] | None = None,
        experiment: str = "eventtrain",
        retries: int = 2,
        retry_delay_s: float = 1.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        require_installed(mlflow_store)
        if not name or set("/:'") & set(name):
            raise ConfigurationError(
                f"ModelRegistry(name={name!r}): name must be a model name without / : and '."
            )
        require_choice("ModelRegistry", "source", source, ("checkpoint", "upload"))
        require_count("ModelRegistry", "retries", retries)
        require_number("ModelRegistry", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("ModelRegistry", "finish_timeout_s", finish_timeout_s, at_least=0)
        self._source = source
        self._directory = (
            None if directory is None else directory_path(directory, "ModelRegistry", may_be_run_dir=True)
        )
        self._tags = dict(tags or {})
        self._metrics = metrics
        uri = tracking_uri if isinstance(tracking_uri, SecretStr) else SecretStr(tracking_uri)
        self._connect = partial(mlflow_store.MLflowRegistry, name, uri, experiment=experiment)
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._finish_timeout_s = finish_timeout_s
        self._epochs: deque[EpochCompleted] = deque(maxlen=REMEMBERED_EPOCHS)
        self._status = "FINISHED"
        self._active: tuple[RunContext, WorkerThread, MLflowRegistry] | None = None
        self._waiting: list[str] = []
        """Sources that are neither registered nor failed yet."""

    async def start(self, run: RunContext) -> None:
        """Starts the thread that uses MLflow."""
        thread = WorkerThread(self._owner, run.publish)
        self._active = run, thread, self._connect(run_name=run.run_id)
        thread.start()

    async def handle(self, event: Event) -> None:
        """Has the checkpoint registered, or remembers metrics and the end of the run; returns at once."""
        match event:
            case EpochCompleted():
                self._epochs.append(event)
            case CheckpointCommitted() if self._source == "checkpoint":
                self._register(event, event.path)
            case CheckpointUploaded() if self._source == "upload":
                self._register(event, event.url)
            case RunResumed() if self._source == "checkpoint":  # the attempt before may have failed to
                self._register(event, event.path)
            case RunCompleted():
                self._status = "KILLED" if event.reason in TO_BE_CONTINUED else "FINISHED"
            case RunFailed():
                self._status = "FAILED"
            case _:
                pass

    async def stop(self) -> None:
        """Waits for what is not registered.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        active, self._active = self._active, None
        if active is None:
            return
        _, thread, registry = active
        thread.put(partial(self._end, thread, registry, self._status))

        def unfinished() -> str:
            return ", ".join(list(self._waiting)) or "nothing, but its run was not ended"

        def report() -> None:
            logger.error("The time for the end of the run is over; not registered: %s", unfinished())

        if not await thread.finish_within(self._finish_timeout_s, report):
            raise SubscriberError(
                f"Not everything was registered within {self._finish_timeout_s:g} s after the run; not registered: "
                f"{unfinished()}."
            )

    @property
    def _owner(self) -> str:
        return self.name or "ModelRegistry"

    def _register(self, event: CheckpointCommitted | CheckpointUploaded | RunResumed, source: str) -> None:
        if self._active is None:
            return
        run, thread, registry = self._active
        if (
            self._directory is not None
            and Path(event.path).parent != (run.run_dir / self._directory).absolute()
        ):
            return
        tags = {"step": str(event.step), "run_id": run.run_id}
        if not isinstance(event, RunResumed) and event.tag is not None:
            tags["tag"] = event.tag
        metrics: dict[str, float] = {}
        epoch = next((one for one in reversed(self._epochs) if one.step <= event.step), None)
        if epoch is not None:
            tags["epoch"] = str(epoch.epoch)
            names = epoch.metrics.keys() if self._metrics is None else self._metrics
            metrics = {name: float(epoch.metrics[name]) for name in names if name in epoch.metrics}
        add = partial(registry.add, source, step=event.step, metrics=metrics, tags={**tags, **self._tags})
        self._waiting.append(source)
        thread.put(partial(self._add, thread, registry, event, source, add))

    # --- on the thread ----------------------------------------------------------------------------------------

    def _add(
        self,
        thread: WorkerThread,
        registry: MLflowRegistry,
        event: Event,
        source: str,
        add: Callable[[], str],
    ) -> None:
        attempt = partial(retry, retries=self._retries, delay_s=self._retry_delay_s, stopping=thread.stopping)
        try:
            if isinstance(event, RunResumed) and attempt(partial(registry.has, source)):
                logger.info("%s is registered already", source)
            else:
                logger.info("%s is version %s of the model", source, attempt(add))
        except StorageError as error:
            if thread.stopping.is_set():
                return  # ``stop`` reports what is left
            self._report(thread, event.step, event.kind, f"{source} was not registered: {error}")
        self._waiting.remove(source)

    def _end(self, thread: WorkerThread, registry: MLflowRegistry, status: str) -> None:
        try:
            registry.close(status)
        except StorageError as error:
            self._report(thread, 0, "stop", f"the run in MLflow was not ended: {error}")

    def _report(self, thread: WorkerThread, step: int, event_kind: str, text: str) -> None:
        logger.error("%s", text)
        thread.publish(SubscriberFailed(step=step, subscriber=self._owner, event_kind=event_kind, error=text))
