"""``ModelRegistry``: committed checkpoints as versions of a model in MLflow's registry."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

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
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers.registry_thread import RegistryThread, Version

try:
    from eventtrain.subscribers.trackers import mlflow_registry
except ModuleNotFoundError:
    mlflow_registry = None

logger = logging.getLogger("eventtrain")

EPOCHS_KEPT = 100
"""A checkpoint may be committed some epochs after that of its step."""


class ModelRegistry(Subscriber):
    """Registers committed checkpoints as versions of a model in MLflow, each with the metrics of the last epoch.

    Args:
        name: of the registered model; made if it is not there.
        tracking_uri: of MLflow, such as ``sqlite:///mlflow.db`` or ``https://host``. It may hold a password, and is
            shown nowhere.
        source: what a version points to. "checkpoint": the folder, once it is committed; "upload": its URL, once an
            ``Uploader`` has copied it. A server of MLflow takes no folders.
        directory: only the checkpoints of the Checkpointer with this directory; None: of all.
        tags: of each version, besides ``step``, ``epoch``, ``tag``, ``run_id`` and ``metrics.<name>``.
        metrics: names of those that are registered; None: all of EpochCompleted.
        experiment: where the run lies that the metrics are logged to; each run of ours makes one.
        retries, retry_delay_s: more tries, and the seconds before the first of them; doubled each time.
        finish_timeout_s: how long ``stop`` waits for what is not registered, within the trainer's ``drain_timeout_s``.

    The metrics are those of the last EpochCompleted up to the step of the checkpoint; before the first one there are
    none. MLflow is spoken to in a thread of its own, and delays nothing. What cannot be registered is said by
    SubscriberFailed. A run that resumes registers what it resumes from, if it is not there yet. A version outlives its
    checkpoint: keep what you register (a tag, ``keep_best``, ``max_to_keep=None``), or register uploads.

    Raises:
        ConfigurationError: MLflow is missing, or an argument cannot work.
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
        if mlflow_registry is None:
            raise ConfigurationError(
                "ModelRegistry needs MLflow, the whole of it. Install it: pip install 'eventtrain[mlflow]'."
            )
        if not name or set("/:'") & set(name):
            raise ConfigurationError(
                f"ModelRegistry(name={name!r}): MLflow takes names without / and :, and here also without '."
            )
        require_choice("ModelRegistry", "source", source, ("checkpoint", "upload"))
        require_count("ModelRegistry", "retries", retries)
        require_number("ModelRegistry", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("ModelRegistry", "finish_timeout_s", finish_timeout_s, at_least=0)
        self._source = source
        self._directory = directory
        self._tags = dict(tags or {})
        self._metrics = metrics
        self._connect = partial(
            mlflow_registry.MLflowRegistry,
            name,
            tracking_uri if isinstance(tracking_uri, SecretStr) else SecretStr(tracking_uri),
            experiment=experiment,
        )
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._finish_timeout_s = finish_timeout_s
        self._epochs: deque[EpochCompleted] = deque(maxlen=EPOCHS_KEPT)
        self._status = "FINISHED"
        self._run: RunContext | None = None
        self._thread: RegistryThread | None = None

    async def start(self, run: RunContext) -> None:
        """Start the thread that speaks to MLflow."""
        self._run = run
        self._thread = RegistryThread(
            self.name or "ModelRegistry",
            run.publish,
            self._connect(run_name=run.run_id),
            retries=self._retries,
            retry_delay_s=self._retry_delay_s,
        )
        self._thread.start()

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Remember the metrics."""
        self._epochs.append(event)

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Have it registered, if folders are; returns at once."""
        if self._source == "checkpoint":
            self._register(event, event.path)

    async def on_checkpoint_uploaded(self, event: CheckpointUploaded) -> None:
        """Have it registered, if uploads are; returns at once."""
        if self._source == "upload":
            self._register(event, event.url)

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Have registered what the attempt before could not; returns at once."""
        if self._source == "checkpoint":
            self._register(event, event.path, unless_there=True)

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Remember how it ended."""
        self._status = "KILLED" if event.reason in TO_BE_CONTINUED else "FINISHED"

    async def on_run_failed(self, event: RunFailed) -> None:
        """Remember how it ended."""
        self._status = "FAILED"

    async def stop(self) -> None:
        """Wait for what is not registered. Raises SubscriberError where that takes too long."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.end(self._status)

        def give_up() -> None:
            logger.error("The time for the end of the run is over; not registered: %s", thread.listing)

        in_time = await thread.finish_within(self._finish_timeout_s, give_up)
        if not in_time:
            raise SubscriberError(
                f"Not everything was registered within {self._finish_timeout_s:g} s after the run: {thread.listing}."
            )

    def _register(
        self,
        event: CheckpointCommitted | CheckpointUploaded | RunResumed,
        source: str,
        *,
        unless_there: bool = False,
    ) -> None:
        run, thread = self._run, self._thread
        if run is None or thread is None:
            return
        if (
            self._directory is not None
            and Path(event.path).parent != (run.run_dir / self._directory).absolute()
        ):
            return
        epoch = next((one for one in reversed(self._epochs) if one.step <= event.step), None)
        tags = {"step": str(event.step), "run_id": run.run_id}
        metrics: dict[str, float] = {}
        if not isinstance(event, RunResumed) and event.tag is not None:
            tags["tag"] = event.tag
        if epoch is not None:
            tags["epoch"] = str(epoch.epoch)
            names = epoch.metrics.keys() if self._metrics is None else self._metrics
            metrics = {name: float(epoch.metrics[name]) for name in names if name in epoch.metrics}
        thread.add(Version(source, event.step, event.kind, metrics, {**tags, **self._tags}), unless_there)
