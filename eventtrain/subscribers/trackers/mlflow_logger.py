"""``MLflowLogger``: metrics, hyperparameters, params and tags of a run, as a run in MLflow's tracking store."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import SecretStr
from pydantic_core import to_json

from eventtrain.events import (
    TO_BE_CONTINUED,
    EpochCompleted,
    EvalCompleted,
    Event,
    RunCompleted,
    RunFailed,
    RunStarted,
    SampleTaken,
    StepsCompleted,
)
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps, step_rows
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import HyperparamCurveState, Points, TrackedCurves
from eventtrain.subscribers.trackers.tracker import Tracker
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.mlflow_store import MLflowRun, Value

mlflow_store = import_optional(
    "eventtrain.subscribers.trackers.mlflow_store", extra="mlflow", used_by="MLflowLogger"
)

logger = logging.getLogger("eventtrain")

SEND_INTERVAL_S = 1.0
"""How long rows may be collected before they are sent in one request."""
SEND_VALUES = 1000
"""Limit of MLflow for one request."""


class MLflowLoggerState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    run_id: str | None
    """Id of the run in MLflow; None while it is not known."""
    token: str
    curve: HyperparamCurveState = HyperparamCurveState()
    evaluated_at: int = -1


@dataclass
class _Batch:
    """Rows for one request, as functions that return their values."""

    send_at_s: float = 0.0
    parts: list[Callable[[], list[Value]]] = field(default_factory=list["Callable[[], list[Value]]"])
    rows: int = 0
    values: int = 0


class MLflowLogger(Tracker):
    """Logs a run to MLflow: one run there for one run here, also over restarts.

    Args:
        tracking_uri: such as ``sqlite:///mlflow.db`` or ``https://host``. It may contain a password, and is never
            shown.
        experiment: that the run belongs to; created if missing.
        run_name: of the run in MLflow; None: the ``run_id`` of this one.
        params: logged once, at the start; those that a resumed run has already stay as they are.
        tags: set at each start, besides ``eventtrain.run_id`` and, at the end, ``eventtrain.stop_reason``.
        every: only steps that are a multiple of it are logged, each value as a row of MLflow's database; 0: none.
        finish_timeout_s: how long ``stop`` waits for rows that are not logged, within the trainer's
            ``drain_timeout_s``.

    The metrics in MLflow are ``step/<metric>``, ``epoch/<metric>`` (those of evaluation with ``val_``),
    ``eval/<metric>`` and ``hyperparams/<name>``, the value that a step was computed with. Characters that MLflow does
    not take become ``_``. Samples are files in ``samples/<name>``, arrays of an evaluation or an epoch JSON files in
    ``eval/<name>``, ``epoch/<name>``.

    A thread of its own uses MLflow. Rows that wait for it are bounded; what an outage costs is reported
    (``TrackerThread``). A resumed run continues the run in MLflow that its checkpoint names, and leaves out the steps
    that a metric has there already. Training again with the same logger continues the same run.

    Raises:
        ConfigurationError: MLflow is not installed, or an argument is invalid.
    """

    events = (*TrackedCurves.events, SampleTaken, RunCompleted, RunFailed)

    @checked
    def __init__(
        self,
        tracking_uri: str | SecretStr,
        *,
        experiment: str = "eventtrain",
        run_name: str | None = None,
        params: Mapping[str, bool | int | float | str] | None = None,
        tags: Mapping[str, str] | None = None,
        every: int = 10,
        finish_timeout_s: float = 30.0,
    ) -> None:
        require_installed(mlflow_store)
        super().__init__(finish_timeout_s)
        require_count("MLflowLogger", "every", every)
        uri = tracking_uri if isinstance(tracking_uri, SecretStr) else SecretStr(tracking_uri)
        self._connect = partial(mlflow_store.MLflowRun, uri, experiment=experiment)
        self._run_name = run_name
        self._params = dict(params or {})
        self._tags = dict(tags or {})
        self._every = every
        self._run_id: str | None = None
        self._token = uuid.uuid4().hex
        self._curves = TrackedCurves()
        self._newest: Event = RunStarted()
        self._batch = _Batch()
        self._mlflow: MLflowRun | None = None

    @property
    def run_id(self) -> str | None:
        """Id of the run in MLflow; None while there is none. Any thread."""
        return self._run_id

    async def start(self, run: RunContext) -> None:
        """Starts the thread, which creates the run in MLflow or continues it."""
        self._mlflow = run_there = self._connect(
            run_name=self._run_name or run.run_id, token=self._token, run_id=self._run_id
        )
        tags = {"eventtrain.run_id": run.run_id, **self._tags}
        self._start_thread(run, "MLflow", partial(self._open, run_there, tags))

    async def handle(self, event: Event) -> None:
        """Collects the event's values; returns at once."""
        self._newest = event
        self._collect(self._curves.points(event))
        match event:
            case StepsCompleted() if self._every:
                if rows := len(due_steps(event, self._every)):
                    self._put(partial(_step_values, event, self._every), rows, rows * len(event.metrics))
            case SampleTaken() if self._mlflow is not None:
                self._add(event, partial(_log_sample, self._mlflow, event))
            case EvalCompleted() | EpochCompleted() if self._mlflow is not None and event.arrays:
                self._add(event, partial(_log_arrays, self._mlflow, event))
            case RunCompleted():
                self._end("KILLED" if event.reason in TO_BE_CONTINUED else "FINISHED", event.reason)
            case RunFailed():
                self._end("FAILED", "failed")
            case _:
                pass
        batch = self._batch
        if batch.values >= SEND_VALUES or monotonic() >= batch.send_at_s or isinstance(event, EpochCompleted):
            self._send()

    async def flush(self) -> None:
        """Waits until MLflow has everything so far; an outage does not delay a checkpoint."""
        if self._thread is not None:
            self._send()
            if not await self._flushed():
                logger.warning(
                    "MLflow lacks rows of steps before this checkpoint; if the run is killed now, they are lost."
                )

    def state_dict(self) -> dict[str, Any]:
        """Returns which run in MLflow it is, as plain JSON data."""
        return MLflowLoggerState(
            run_id=self._run_id,
            token=self._token,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state: the next ``start`` continues that run.

        Raises:
            StateError: the state is of another version, or broken.
        """
        saved = MLflowLoggerState.parse(self._owner, state)
        self._run_id, self._token = saved.run_id, saved.token
        self._curves.state, self._curves.evaluated_at = saved.curve, saved.evaluated_at

    def _collect(self, points: list[Points]) -> None:
        time_ms = _ms(self._newest)
        values: list[Value] = [
            (name, float(value), point.step, time_ms)
            for point in points
            for name, value in point.named().items()
        ]
        if values:  # the hyperparameters are one row together
            self._put(lambda: values, len({point.group for point in points}), len(values))

    def _put(self, part: Callable[[], list[Value]], rows: int, values: int) -> None:
        batch = self._batch
        if not batch.parts:
            batch.send_at_s = monotonic() + SEND_INTERVAL_S
        batch.parts.append(part)
        batch.rows += rows
        batch.values += values

    def _send(self) -> None:
        batch, self._batch = self._batch, _Batch()
        run = self._mlflow
        if batch.parts and run is not None:
            self._add(self._newest, partial(_log, run, batch), rows=batch.rows)

    def _end(self, status: str, reason: str) -> None:
        self._collect(self._curves.due(self._newest.step))
        self._send()
        if self._mlflow is not None:
            close = partial(self._mlflow.close, status, {"eventtrain.stop_reason": reason})
            self._add(self._newest, close, rows=0)

    def _open(self, run: MLflowRun, tags: Mapping[str, str]) -> None:
        run.open()
        self._run_id = run.run_id
        run.describe(self._params, tags)


def _log_sample(run: MLflowRun, event: SampleTaken) -> None:
    """Adds a sample as a file: text, PNG, the array in JSON, or the table in the form of MLflow's own tables."""
    value, suffix = event.value, {"text": "txt", "image": "png"}.get(event.media, "json")
    if event.media == "text":
        value = value.encode()
    elif event.media == "table":
        value = to_json({"columns": list(value), "data": list(zip(*value.values(), strict=True))})
    elif event.media == "array":
        value = _array_json(value)
    run.add_file(f"samples/{mlflow_store.key_for(event.name)}", f"step-{event.step:08}.{suffix}", value)


def _log_arrays(run: MLflowRun, event: EvalCompleted | EpochCompleted) -> None:
    """Adds the arrays of metrics as files: MLflow has no curves of them."""
    group = "eval" if isinstance(event, EvalCompleted) else "epoch"
    for name, array in event.arrays.items():
        folder = f"{group}/{mlflow_store.key_for(name)}"
        run.add_file(folder, f"step-{event.step:08}.json", _array_json(array))


def _array_json(array: np.ndarray[Any, Any]) -> bytes:
    return to_json(array.tolist(), inf_nan_mode="strings")


def _log(run: MLflowRun, batch: _Batch) -> None:
    run.log(value for part in batch.parts for value in part())


def _step_values(window: StepsCompleted, every: int) -> list[Value]:
    time_ms = _ms(window)
    return [
        (f"step/{name}", float(value), step, time_ms)
        for step, metrics in step_rows(window, every)
        for name, value in metrics.items()
    ]


def _ms(event: Event) -> int:
    return int(event.time.timestamp() * 1000)
