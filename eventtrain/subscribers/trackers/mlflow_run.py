"""``MLflowRun``: one run in MLflow's tracking store. Blocking; any thread, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from pydantic import SecretStr

from eventtrain.subscribers.trackers.mlflow_client import Keys, experiment_id, key_for, without_text

T = TypeVar("T")

logger = logging.getLogger("eventtrain")

GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""MLflow's error codes for a run that does not exist, or was deleted."""
TOKEN = "eventtrain.token"
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
VALUE_LIMIT = 6000
"""Characters of a param."""

Value = tuple[str, float, int, int]
"""Name, value, step, milliseconds since 1970."""


class MLflowRun:
    """Logs to one run. Nothing is done before ``open``; every method raises StorageError.

    Args:
        uri: of MLflow's tracking store.
        experiment: that a new run belongs to; created if missing.
        run_name: of a new run.
        token: a tag of the run, by which it is found if its id is not known, for example because the answer to its
            creation was lost.
        run_id: of the run to be continued, if it is known.
    """

    def __init__(
        self, uri: SecretStr, *, experiment: str, run_name: str, token: str, run_id: str | None
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._run_name = run_name
        self._token = token
        self._known_id = run_id
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._keys = Keys()
        self._param_keys = Keys()
        self._params: set[str] = set()
        self._newest: dict[str, int] = {}

    def open(self) -> str:
        """Creates the run, or continues it; returns its id. Further calls do nothing."""
        if self._client is None:
            with without_text():
                client = MlflowClient(tracking_uri=self._uri.get_secret_value())
                if self._known_id is None or not self._continue(client, self._known_id):
                    experiment = experiment_id(client, self._experiment)
                    query = f"tags.`{TOKEN}` = '{self._token}'"
                    known = client.search_runs([experiment], query, max_results=1)
                    if not known or not self._continue(client, known[0].info.run_id):
                        made = client.create_run(
                            experiment, run_name=self._run_name, tags={TOKEN: self._token}
                        )
                        self._run_id = made.info.run_id
                self._client = client
        return self._run_id

    def describe(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Logs params that the run does not have yet, and sets tags."""
        client = self._opened()
        keys = {self._param_keys[name]: str(value)[:VALUE_LIMIT] for name, value in params.items()}
        new = [Param(key, value) for key, value in keys.items() if key not in self._params]
        with without_text():
            for batch in _batches(new, PARAMS_PER_BATCH):
                client.log_batch(self._run_id, params=batch, synchronous=True)
                self._params.update(param.key for param in batch)
            for batch in _batches([RunTag(key_for(k), str(v)) for k, v in tags.items()], PARAMS_PER_BATCH):
                client.log_batch(self._run_id, tags=batch, synchronous=True)

    def log(self, values: Iterable[Value]) -> None:
        """Logs values, except those of steps that the metric had when the run was continued.

        May be repeated after a failure: MLflow takes a value that it has, with the same time, for the same one.
        """
        client = self._opened()
        metrics: list[Metric] = []
        for name, value, step, time_ms in values:
            key = self._keys[name]
            if step > self._newest.get(key, -1):
                metrics.append(Metric(key, value, time_ms, step))
        with without_text():
            for batch in _batches(metrics, METRICS_PER_BATCH):
                client.log_batch(self._run_id, metrics=batch, synchronous=True)

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Sets tags and ends the run: "FINISHED", "FAILED" or "KILLED"."""
        self.describe({}, tags)
        client = self._opened()
        with without_text():
            client.set_terminated(self._run_id, status)

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
        self._run_id = run_id
        return True

    def _opened(self) -> MlflowClient:
        self.open()
        assert self._client is not None
        return self._client


def _batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
