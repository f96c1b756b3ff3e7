"""``MLflowRegistry``: one registered model in MLflow's registry. Blocking; any thread, one at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from pydantic import SecretStr

from eventtrain.subscribers.trackers.mlflow_client import experiment_id, key_for, without_text


@dataclass(frozen=True)
class Version:
    """A version to be registered.

    Attributes:
        source: path or URL of the checkpoint.
        step: of its state.
        metrics, tags: by name.
    """

    source: str
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


class MLflowRegistry:
    """Adds versions to one registered model, and their metrics to one run in MLflow. Nothing is done before.

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
