"""``MLflowRegistry``: one registered model in MLflow's registry. Blocking; any thread, one at a time.

What MLflow says of a failure may quote its URI, passwords included, so only the kind of a failure is passed on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from pydantic import SecretStr

from eventtrain.errors import StorageError
from eventtrain.subscribers.registry_thread import Version

HOPELESS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
    }
)
"""MLflow's error codes that will be the same the next time."""


class MLflowRegistry:
    """Adds versions to one registered model, and their metrics to one run of MLflow's. Nothing is done before ``add``.

    Args:
        model: its name; made if it is not there.
        uri: of MLflow's store, for runs and models.
        experiment: that the run belongs to; made if it is not there.
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
        """Register one version; returns its number. Raises StorageError."""
        with _told():
            client = self._opened()
            now_ms = int(time.time() * 1000)
            metrics = {_key(name): value for name, value in version.metrics.items()}
            client.log_batch(
                self._run_id,
                metrics=[Metric(key, value, now_ms, version.step) for key, value in metrics.items()],
            )
            tags = {**{f"metrics.{key}": repr(value) for key, value in metrics.items()}, **version.tags}
            made = client.create_model_version(
                self._model,
                source=version.source,
                run_id=self._run_id,
                tags={_key(k): v for k, v in tags.items()},
            )
            return str(made.version)

    def has(self, source: str) -> bool:
        """Whether a version with this source is there. Raises StorageError."""
        with _told():
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
        """End the run: "FINISHED", "FAILED" or "KILLED". Raises StorageError."""
        if self._run_id:
            with _told():
                self._opened().set_terminated(self._run_id, status)

    def _opened(self) -> MlflowClient:
        if self._client is None:
            uri = self._uri.get_secret_value()
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = client.get_experiment_by_name(self._experiment)
            experiment_id = (
                experiment.experiment_id if experiment else client.create_experiment(self._experiment)
            )
            try:
                client.create_registered_model(self._model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            self._run_id = client.create_run(experiment_id, run_name=self._run_name).info.run_id
            self._client = client
        return self._client


def _key(name: str) -> str:
    """As MLflow takes names of metrics and tags."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name).strip("/.") or "_"


@contextmanager
def _told() -> Generator[None]:
    """Turns what MLflow raises into a StorageError that quotes nothing of it."""
    try:
        yield
    except ImportError as error:  # the driver of a database, say
        raise StorageError(f"MLflow cannot be used: {error}") from None
    except MlflowException as error:
        code = str(error.error_code)
        raise StorageError(f"MLflow says {code}", may_pass=code not in HOPELESS) from None
    except Exception as error:
        raise StorageError(f"MLflow failed: {type(error).__name__}", may_pass=True) from None
