"""``ModelRegistry``: committed checkpoints as versions of a model in MLflow's registry."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import (
    TO_BE_CONTINUED,
    CheckpointCommitted,
    CheckpointUploaded,
    EpochCompleted,
    RunCompleted,
    RunFailed,
    RunResumed,
)
from eventtrain.subscribers._shared.optional_imports import import_optional, require_installed
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.mlflow_registry import RegistryThread

mlflow_registry = import_optional(
    "eventtrain.subscribers.trackers.mlflow_registry", extra="mlflow", used_by="ModelRegistry"
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

    disable_after = None

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
        require_installed(mlflow_registry)
        if not name or set("/:'") & set(name):
            raise ConfigurationError(
                f"ModelRegistry(name={name!r}): name must be a model name without / : and '."
            )
        require_choice("ModelRegistry", "source", source, ("checkpoint", "upload"))
        require_count("ModelRegistry", "retries", retries)
        require_number("ModelRegistry", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("ModelRegistry", "finish_timeout_s", finish_timeout_s, at_least=0)
        self._source = source
        self._directory = directory
        self._tags = dict(tags or {})
        self._metrics = metrics
        uri = tracking_uri if isinstance(tracking_uri, SecretStr) else SecretStr(tracking_uri)
        self._connect = partial(mlflow_registry.MLflowRegistry, name, uri, experiment=experiment)
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._finish_timeout_s = finish_timeout_s
        self._epochs: deque[EpochCompleted] = deque(maxlen=REMEMBERED_EPOCHS)
        self._status = "FINISHED"
        self._run: RunContext | None = None
        self._thread: RegistryThread | None = None

    async def start(self, run: RunContext) -> None:
        """Starts the thread that uses MLflow."""
        self._run = run
        self._thread = thread = mlflow_registry.RegistryThread(
            self.name or "ModelRegistry",
            run.publish,
            self._connect(run_name=run.run_id),
            retries=self._retries,
            retry_delay_s=self._retry_delay_s,
        )
        thread.start()

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Remembers the metrics."""
        self._epochs.append(event)

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Has it registered, if folders are; returns at once."""
        if self._source == "checkpoint":
            self._register(event, event.path)

    async def on_checkpoint_uploaded(self, event: CheckpointUploaded) -> None:
        """Has it registered, if uploads are; returns at once."""
        if self._source == "upload":
            self._register(event, event.url)

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Has the checkpoint registered unless it is already, which the attempt before may have lost."""
        if self._source == "checkpoint":
            self._register(event, event.path)

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Remembers how the run ended."""
        self._status = "KILLED" if event.reason in TO_BE_CONTINUED else "FINISHED"

    async def on_run_failed(self, event: RunFailed) -> None:
        """Remembers how the run ended."""
        self._status = "FAILED"

    async def stop(self) -> None:
        """Waits for what is not registered.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.end(self._status)

        def report() -> None:
            logger.error("The time for the end of the run is over; not registered: %s", thread.unfinished)

        if not await thread.finish_within(self._finish_timeout_s, report):
            raise SubscriberError(
                f"Not everything was registered within {self._finish_timeout_s:g} s after the run; not registered: "
                f"{thread.unfinished}."
            )

    def _register(self, event: CheckpointCommitted | CheckpointUploaded | RunResumed, source: str) -> None:
        run, thread = self._run, self._thread
        if run is None or thread is None:
            return
        if self._directory is not None:
            directory = (run.run_dir / self._directory).absolute()
            if Path(event.path).parent != directory:
                return
        resumes = isinstance(event, RunResumed)
        tags = {"step": str(event.step), "run_id": run.run_id}
        if not resumes and event.tag is not None:
            tags["tag"] = event.tag
        metrics: dict[str, float] = {}
        epoch = next((one for one in reversed(self._epochs) if one.step <= event.step), None)
        if epoch is not None:
            tags["epoch"] = str(epoch.epoch)
            names = epoch.metrics.keys() if self._metrics is None else self._metrics
            metrics = {name: float(epoch.metrics[name]) for name in names if name in epoch.metrics}
        version = mlflow_registry.Version(source, event.step, event.kind, metrics, {**tags, **self._tags})
        thread.add(version, unless_registered=resumes)
