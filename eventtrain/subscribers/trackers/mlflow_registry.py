"""``RegistryThread``: registers versions of one model in MLflow's registry, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from pydantic import SecretStr

from eventtrain.errors import StorageError
from eventtrain.events import Event, SubscriberFailed
from eventtrain.subscribers._shared.retry import retry
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.trackers.mlflow_client import experiment_id, key_for, without_text

logger = logging.getLogger("eventtrain")

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """A version to be registered.

    Attributes:
        source: path or URL of the checkpoint.
        step: of its state.
        event_kind: of the event that it is registered for.
        metrics, tags: by name.
    """

    source: str
    step: int
    event_kind: str
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


class MLflowRegistry:
    """One registered model, and one run in MLflow for its metrics. Blocking; any thread, one at a time.

    Nothing is done before ``add`` or ``has``.

    Args:
        model: its name; created if missing.
        uri: of MLflow's store, for runs and models.
        experiment: that the run belongs to; created if missing.
        run_name: of the run.
    """

    def __init__(self, model: str, uri: SecretStr, *, experiment: str, run_name: str) -> None:
        self._model = model
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._client: MlflowClient | None = None
        self._run_id = ""

    def add(self, version: Version) -> str:
        """Registers one version; returns its number. Raises StorageError."""
        with without_text():
            client = self._opened()
            now_ms = int(time.time() * 1000)
            metrics = {key_for(name): value for name, value in version.metrics.items()}
            client.log_batch(
                self._run_id,
                metrics=[Metric(key, value, now_ms, version.step) for key, value in metrics.items()],
            )
            tags = {**{f"metrics.{key}": repr(value) for key, value in metrics.items()}, **version.tags}
            made = client.create_model_version(
                self._model,
                source=version.source,
                run_id=self._run_id,
                tags={key_for(k): v for k, v in tags.items()},
            )
            return str(made.version)

    def has(self, source: str) -> bool:
        """Returns whether a version with this source is registered. Raises StorageError."""
        with without_text():
            client = self._opened()
            token = None
            while True:
                page = client.search_model_versions(f"name = '{self._model}'", page_token=token)
                if any(version.source == source for version in page):
                    return True
                token = page.token
                if not token:
                    return False

    def close(self, status: str) -> None:
        """Ends the run: "FINISHED", "FAILED" or "KILLED". Raises StorageError."""
        if self._run_id:
            with without_text():
                self._opened().set_terminated(self._run_id, status)

    def _opened(self) -> MlflowClient:
        if self._client is None:
            uri = self._uri.get_secret_value()
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            try:
                client.create_registered_model(self._model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = experiment_id(client, self._experiment)
            self._run_id = client.create_run(experiment, run_name=self._run_name).info.run_id
            self._client = client
        return self._client


class RegistryThread(WorkerThread):
    """Registers versions in the order in which they were added; reports failures by SubscriberFailed.

    Args:
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
        registry: to which they are added.
        retries, retry_delay_s: as of ``retry``.
    """

    def __init__(
        self,
        owner: str,
        publish: Callable[[Event], None],
        registry: MLflowRegistry,
        *,
        retries: int,
        retry_delay_s: float,
    ) -> None:
        super().__init__(owner, publish)
        self._owner = owner
        self._registry = registry
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._waiting: list[Version] = []

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(self, version: Version, *, unless_registered: bool = False) -> None:
        """Queues a version; with ``unless_registered`` it is skipped if one with its source exists."""
        self._waiting.append(version)
        self.put(partial(self._register, version, unless_registered))

    def end(self, status: str) -> None:
        """Queues the end of the run in MLflow."""
        self.put(partial(self._end, status))

    @property
    def unfinished(self) -> str:
        """What is neither registered nor failed yet, for messages."""
        sources = ", ".join(version.source for version in list(self._waiting))
        return sources or "nothing, but its run was not ended"

    # --- on the thread ----------------------------------------------------------------------------------------

    def _register(self, version: Version, unless_registered: bool) -> None:
        registry, source = self._registry, version.source
        try:
            if unless_registered and self._retry(lambda: registry.has(source)):
                logger.info("%s is registered already", source)
            else:
                logger.info(
                    "%s is version %s of the model", source, self._retry(lambda: registry.add(version))
                )
        except StorageError as error:
            if self.stopping.is_set():
                return  # ``stop`` reports what is left
            self._report(version.step, version.event_kind, f"{source} was not registered: {error}")
        self._waiting.remove(version)

    def _end(self, status: str) -> None:
        try:
            self._registry.close(status)
        except StorageError as error:
            self._report(0, "stop", f"the run in MLflow was not ended: {error}")

    def _report(self, step: int, event_kind: str, text: str) -> None:
        logger.error("%s", text)
        self.publish(SubscriberFailed(step=step, subscriber=self._owner, event_kind=event_kind, error=text))

    def _retry(self, action: Callable[[], T]) -> T:
        return retry(action, retries=self._retries, delay_s=self._retry_delay_s, stopping=self.stopping)
