"""``MLflowRun`` and ``MLflowRegistry``: a run in MLflow's tracking store, and a model in its registry.

Everything blocks; any thread, one at a time. MLflow's messages may quote its URI with passwords, so of a failure only
its kind is shown.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from pydantic import SecretStr

from eventtrain.errors import StorageError

T = TypeVar("T")

logger = logging.getLogger("eventtrain")

PERMANENT_ERRORS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "ENDPOINT_NOT_FOUND",
        "FEATURE_DISABLED",
    }
)
"""MLflow's error codes after which another attempt would fail too."""
GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""MLflow's error codes for a run that does not exist, or was deleted."""
EXISTS = "RESOURCE_ALREADY_EXISTS"
TOKEN = "eventtrain.token"
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
VALUE_LIMIT = 6000
"""Characters of a param."""
KEY_LIMIT = 250
"""Characters of a key."""

Value = tuple[str, float, int, int]
"""Name, value, step, milliseconds since 1970."""


class MLflowRun:
    """Logs to one run. Nothing is done before ``open``; every method raises StorageError.

    Args:
        uri: of MLflow's store.
        experiment: that a new run belongs to; created if missing.
        run_name: of a new run.
        token: a tag of the run, by which it is found if its id is not known, for example because the answer to its
            creation was lost.
        run_id: of the run to be continued, if it is known.
    """

    def __init__(
        self, uri: SecretStr, *, experiment: str, run_name: str, token: str, run_id: str | None = None
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._token = token
        self._known_id = run_id
        self._client: MlflowClient | None = None
        self.run_id = ""
        """Its id; "" before ``open``."""
        self._keys = Keys()
        self._param_keys = Keys()
        self._params: set[str] = set()
        self._newest: dict[str, int] = {}

    def open(self) -> MlflowClient:
        """Creates the run, or continues it, unless that is done."""
        if self._client is None:
            with without_text():
                uri = self._uri.get_secret_value()
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                if self._known_id is None or not self._continue(client, self._known_id):
                    experiment = _experiment_id(client, self._experiment)
                    query = f"tags.`{TOKEN}` = '{self._token}'"
                    known = client.search_runs([experiment], query, max_results=1)
                    if not known or not self._continue(client, known[0].info.run_id):
                        made = client.create_run(
                            experiment, run_name=self._run_name, tags={TOKEN: self._token}
                        )
                        self.run_id = made.info.run_id
                self._client = client
        return self._client

    def describe(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Logs params that the run does not have yet, and sets tags."""
        client = self.open()
        keys = {self._param_keys[name]: str(value)[:VALUE_LIMIT] for name, value in params.items()}
        new = [Param(key, value) for key, value in keys.items() if key not in self._params]
        with without_text():
            for batch in _batches(new, PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=batch, synchronous=True)
                self._params.update(param.key for param in batch)
            for batch in _batches([RunTag(key_for(k), str(v)) for k, v in tags.items()], PARAMS_PER_BATCH):
                client.log_batch(self.run_id, tags=batch, synchronous=True)

    def log(self, values: Iterable[Value]) -> None:
        """Logs values, except those of steps that the metric had when the run was continued.

        May be repeated after a failure: MLflow takes a value that it has, with the same time, for the same one.
        """
        client = self.open()
        metrics: list[Metric] = []
        for name, value, step, time_ms in values:
            key = self._keys[name]
            if step > self._newest.get(key, -1):
                metrics.append(Metric(key, value, time_ms, step))
        with without_text():
            for batch in _batches(metrics, METRICS_PER_BATCH):
                client.log_batch(self.run_id, metrics=batch, synchronous=True)

    def add_file(self, folder: str, name: str, data: bytes) -> None:
        """Adds a file to the artifacts of the run. May be repeated."""
        client = self.open()
        with without_text(), TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            path.write_bytes(data)
            client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Sets tags and ends the run: "FINISHED", "FAILED" or "KILLED"."""
        self.describe({}, tags)
        client = self.open()
        with without_text():
            client.set_terminated(self.run_id, status)

    def _continue(self, client: MlflowClient, run_id: str) -> bool:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
            logger.warning("MLflow has no run %s to continue; a new run is created", run_id)
            return False
        found = client.get_run(run_id)
        self._params = set(found.data.params)
        # Not found.data.metrics, which has no steps.
        self._newest = {metric.key: metric.step for metric in found.data.to_proto().metrics}
        self.run_id = run_id
        return True


class MLflowRegistry:
    """Adds versions to one registered model, and their metrics to one run. Nothing is done before the first call.

    Args:
        model: its name; created if missing.
        uri, experiment, run_name: as of ``MLflowRun``.
    """

    def __init__(self, model: str, uri: SecretStr, *, experiment: str, run_name: str) -> None:
        self._model = model
        self._run = MLflowRun(uri, experiment=experiment, run_name=run_name, token=uuid.uuid4().hex)
        self._has_model = False

    def add(self, source: str, *, step: int, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """Registers the checkpoint at the path or URL ``source``; returns the version. Raises StorageError."""
        client = self._opened()
        now_ms = int(time.time() * 1000)
        self._run.log((name, value, step, now_ms) for name, value in metrics.items())
        tags = {**{f"metrics.{name}": repr(value) for name, value in metrics.items()}, **tags}
        with without_text():
            made = client.create_model_version(
                self._model,
                source=source,
                run_id=self._run.run_id,
                tags={key_for(name): value for name, value in tags.items()},
            )
        return str(made.version)

    def has(self, source: str) -> bool:
        """Returns whether a version with this source is registered. Raises StorageError."""
        client = self._opened()
        token = None
        with without_text():
            while True:
                page = client.search_model_versions(f"name = '{self._model}'", page_token=token)
                if any(version.source == source for version in page):
                    return True
                token = page.token
                if not token:
                    return False

    def close(self, status: str) -> None:
        """Ends the run, if there is one: "FINISHED", "FAILED" or "KILLED". Raises StorageError."""
        if self._run.run_id:
            self._run.close(status, {})

    def _opened(self) -> MlflowClient:
        client = self._run.open()
        if not self._has_model:
            with without_text():
                try:
                    client.create_registered_model(self._model)
                except MlflowException as error:
                    if error.error_code != EXISTS:
                        raise
            self._has_model = True
        return client


@contextmanager
def without_text() -> Generator[None]:
    """Turns an error of MLflow into a StorageError that quotes nothing of it."""
    try:
        yield
    except ImportError as error:  # for example the driver of a database
        raise StorageError(f"MLflow cannot be used: {error}") from None
    except MlflowException as error:
        code = str(error.error_code)
        raise StorageError(f"MLflow failed: {code}", may_pass=code not in PERMANENT_ERRORS) from None
    except Exception as error:
        raise StorageError(f"MLflow failed: {type(error).__name__}", may_pass=True) from None


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # perhaps another process was faster
            if error.error_code != EXISTS or found is None:
                raise
    return found.experiment_id


def key_for(name: str) -> str:
    """Returns ``name`` as a key for metrics, params and tags: word characters, ``-. :``, and ``/`` between parts."""
    parts = (part.strip(".") for part in re.sub(r"[^\w\-. :/]", "_", name).split("/"))
    return "/".join(part for part in parts if part)[:KEY_LIMIT].rstrip("/.") or "_"


class Keys:
    """Maps each name to a key that no other name has."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._keys:
            key = key_for(name)
            if key in self._keys.values():  # for example "a(1)" and "a_1_"
                digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
                key = f"{key[: KEY_LIMIT - 9]}-{digest}"
            self._keys[name] = key
        return self._keys[name]


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
