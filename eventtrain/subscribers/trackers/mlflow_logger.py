"""``MLflowLogger``: metrics, hyperparameters, params and tags of a run, as a run in MLflow's tracking store."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Any, Literal

from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    TO_BE_CONTINUED,
    EpochCompleted,
    Event,
    RunCompleted,
    RunFailed,
    RunStarted,
    StepsCompleted,
)
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps, step_rows
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers.curves import Points, TrackedCurves
from eventtrain.subscribers.trackers.hyperparam_curve import HyperparamCurveState
from eventtrain.subscribers.trackers.tracker_thread import TrackerStatistics, TrackerThread

try:
    from eventtrain.subscribers.trackers import mlflow_run
except ModuleNotFoundError:
    mlflow_run = None

logger = logging.getLogger("eventtrain")

SEND_INTERVAL_S = 1.0
"""How long rows may be collected before they are sent in one request."""
SEND_VALUES = 1000
"""As many as MLflow takes in one request."""
SETTLE_S = 10.0
"""How long a checkpoint waits for rows to arrive."""

Row = tuple[str, float, int, int]
"""Name, value, step, milliseconds since 1970."""


class MLflowLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    run_id: str | None
    """Of the run in MLflow; None while it is not known."""
    token: str
    curve: HyperparamCurveState = HyperparamCurveState()
    evaluated_at: int = -1


class MLflowLogger(Subscriber):
    """Logs a run to MLflow: one run there for one here, also over restarts.

    Args:
        tracking_uri: such as ``sqlite:///mlflow.db`` or ``https://host``. It may hold a password, and is shown nowhere.
        experiment: that the run belongs to; made if it is not there.
        run_name: of the run in MLflow; ours' ``run_id`` if None.
        params: logged once, at the start; what a run that resumes has already stays as it is.
        tags: set at each start, besides ``eventtrain.run_id`` and, at the end, ``eventtrain.stop_reason``.
        every: only steps that are a multiple of it are logged, each value as a row of MLflow's database; 0: none.
        finish_timeout_s: how long ``stop`` waits for what is not logged, within the trainer's ``drain_timeout_s``.

    The metrics in MLflow are ``step/<metric>``, ``epoch/<metric>`` (with ``val_`` those of evaluation),
    ``eval/<metric>`` and ``hyperparams/<name>``, the value that a step was computed with. Characters that MLflow does
    not take become ``_``.

    MLflow is spoken to in a thread of its own; what it has waiting is bounded, and what an outage costs is said
    (``TrackerThread``). A run that resumes goes on with the run in MLflow that its checkpoint names, and leaves out the
    steps that a metric has there already. Training again with the same logger goes on with the same run.

    Raises:
        ConfigurationError: MLflow is missing, or an argument cannot work.
    """

    events = (*TrackedCurves.events, RunCompleted, RunFailed)
    disable_after = None

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
        if mlflow_run is None:
            raise ConfigurationError(
                "MLflowLogger needs MLflow, the whole of it. Install it: pip install 'eventtrain[mlflow]'."
            )
        require_count("MLflowLogger", "every", every)
        require_number("MLflowLogger", "finish_timeout_s", finish_timeout_s, at_least=0)
        self._connect = partial(
            mlflow_run.MLflowRun,
            tracking_uri if isinstance(tracking_uri, SecretStr) else SecretStr(tracking_uri),
            experiment=experiment,
        )
        self._run_name = run_name
        self._params = dict(params or {})
        self._tags = dict(tags or {})
        self._every = every
        self._finish_timeout_s = finish_timeout_s
        self._run_id: str | None = None
        self._token = uuid.uuid4().hex
        self._curves = TrackedCurves()
        self._newest: Event = RunStarted()
        self._collected: list[StepsCompleted | list[Row]] = []
        self._collected_rows = 0
        self._collected_values = 0
        self._send_at_s = 0.0
        self._mlflow: Any = None
        self._thread: TrackerThread | None = None

    @property
    def run_id(self) -> str | None:
        """Of the run in MLflow; None while there is none. Any thread."""
        return self._run_id

    @property
    def statistics(self) -> TrackerStatistics:
        """What became of the rows of this run, or the last one."""
        return self._thread.statistics if self._thread is not None else TrackerStatistics()

    async def start(self, run: RunContext) -> None:
        """Start the thread that speaks to MLflow, and have it make the run, or go on with it."""
        self._mlflow = self._connect(
            run_name=self._run_name or run.run_id, token=self._token, run_id=self._run_id
        )
        self._thread = TrackerThread(self.name or "MLflowLogger", run.publish, target="MLflow")
        self._thread.start()
        self._thread.add(
            partial(self._begin, {"eventtrain.run_id": run.run_id, **self._tags}),
            step=run.start_step,
            event_kind="start",
            rows=0,
            must_keep=True,
        )

    async def handle(self, event: Event) -> None:
        """Collect its values; returns at once."""
        self._newest = event
        self._collect_points(self._curves.points(event))
        if isinstance(event, StepsCompleted):
            self._collect_steps(event)
        elif isinstance(event, RunCompleted):
            self._end("KILLED" if event.reason in TO_BE_CONTINUED else "FINISHED", event.reason)
        elif isinstance(event, RunFailed):
            self._end("FAILED", "failed")
        due = self._collected_values >= SEND_VALUES or monotonic() >= self._send_at_s
        if due or isinstance(event, EpochCompleted):
            self._send()

    async def flush(self) -> None:
        """Have everything so far in MLflow, if it takes it in time; an outage is not waited for."""
        if self._thread is not None:
            self._send()
            if not await self._thread.settle(SETTLE_S):
                logger.warning(
                    "MLflow lacks rows of steps before this checkpoint; if the run is killed now, they are lost."
                )

    async def stop(self) -> None:
        """Wait for what is on its way. Raises SubscriberError where that takes too long."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            await thread.aclose(self._finish_timeout_s)

    def state_dict(self) -> dict[str, Any]:
        """Which run in MLflow it is, as plain JSON data."""
        return MLflowLoggerState(
            run_id=self._run_id,
            token=self._token,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, go on with that run.

        Raises:
            StateError: another version, or broken.
        """
        saved = MLflowLoggerState.parse(self.name or "MLflowLogger", state)
        self._run_id, self._token = saved.run_id, saved.token
        self._curves.restore(saved.curve, saved.evaluated_at)

    # --- on the event loop ------------------------------------------------------------------------------------

    def _collect_steps(self, event: StepsCompleted) -> None:
        rows = len(due_steps(event, self._every)) if self._every else 0
        if rows:
            self._collect(event, rows, rows * len(event.metrics))

    def _collect_points(self, points: list[Points]) -> None:
        if not points:
            return
        time_ms = _ms(self._newest)
        rows = [
            (name, float(value), point.step, time_ms)
            for point in points
            for name, value in point.named().items()
        ]
        # The hyperparameters are one row together.
        self._collect(rows, len({point.group for point in points}), len(rows))

    def _collect(self, piece: StepsCompleted | list[Row], rows: int, values: int) -> None:
        if not self._collected:
            self._send_at_s = monotonic() + SEND_INTERVAL_S
        self._collected.append(piece)
        self._collected_rows += rows
        self._collected_values += values

    def _send(self) -> None:
        collected, self._collected = self._collected, []
        rows, self._collected_rows, self._collected_values = self._collected_rows, 0, 0
        if collected and self._thread is not None:
            newest = self._newest
            self._thread.add(
                partial(self._log, collected), step=newest.step, event_kind=newest.kind, rows=rows
            )

    def _end(self, status: str, reason: str) -> None:
        self._collect_points(self._curves.due(self._newest.step))
        self._send()
        if self._thread is not None:
            self._thread.add(
                partial(self._finish, status, {"eventtrain.stop_reason": reason}),
                step=self._newest.step,
                event_kind=self._newest.kind,
                rows=0,
                must_keep=True,
            )

    # --- on the thread ----------------------------------------------------------------------------------------

    def _begin(self, tags: Mapping[str, str]) -> None:
        self._run_id = self._mlflow.open()
        self._mlflow.describe(self._params, tags)

    def _log(self, collected: list[StepsCompleted | list[Row]]) -> None:
        self._mlflow.log(row for piece in collected for row in self._rows(piece))

    def _finish(self, status: str, tags: Mapping[str, str]) -> None:
        self._mlflow.describe({}, tags)
        self._mlflow.close(status)

    def _rows(self, piece: StepsCompleted | list[Row]) -> Iterator[Row]:
        if isinstance(piece, list):
            yield from piece
            return
        time_ms = _ms(piece)
        for step, metrics in step_rows(piece, self._every):
            for name, value in metrics.items():
                yield f"step/{name}", float(value), step, time_ms


def _ms(event: Event) -> int:
    return int(event.time.timestamp() * 1000)
