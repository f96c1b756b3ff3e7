"""``OpenTelemetry``: a run as spans and measurements, through the providers that the program has set up."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointStarted,
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    EvalStarted,
    Event,
    RunCompleted,
    RunFailed,
    RunResumed,
    StepsCompleted,
)
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers.tracker_thread import TrackerThread

try:
    from eventtrain.subscribers.trackers import opentelemetry_recorder as otel_recorder
except ModuleNotFoundError:
    otel_recorder = None

MEASURE_INTERVAL_S = 1.0
"""How often the values of the newest step are given to OpenTelemetry; readers there export once a minute or so."""
ENDS = (EpochCompleted, RunCompleted, RunFailed)
"""After which a value that was not given yet might not be asked for any more."""


@runtime_checkable
class GivesTracers(Protocol):
    """A ``TracerProvider`` of OpenTelemetry's."""

    @property
    def get_tracer(self) -> Any:
        """Gives a tracer."""
        ...


@runtime_checkable
class GivesMeters(Protocol):
    """A ``MeterProvider`` of OpenTelemetry's."""

    @property
    def get_meter(self) -> Any:
        """Gives a meter."""
        ...


class OpenTelemetry(Subscriber):
    """Records a span for the run and for each epoch, evaluation and checkpoint, and measures what they say.

    Args:
        tracer_provider, meter_provider: OpenTelemetry's; the global ones if None. They are neither flushed nor shut
            down.
        attributes: of every span and measurement.
        finish_timeout_s: how long ``stop`` waits for what is not recorded, within the trainer's ``drain_timeout_s``.

    The span of the run is a child of the one that is current where ``fit`` or ``fit_async`` was called, those of epochs
    and checkpoints are children of the run's, that of an evaluation is one of its epoch's. A run that failed and a
    checkpoint that was not written have the status ERROR. Gauges show the metrics of the newest step, at most once a
    second.

    Everything is recorded on a thread of its own, since a processor may export a span where it ends: one that hangs
    holds up nothing. What could not be recorded is said by SubscriberFailed.

    Raises:
        ConfigurationError: the API of OpenTelemetry is missing, or an argument cannot work.
    """

    events = (
        RunResumed,
        RunCompleted,
        RunFailed,
        EpochStarted,
        EpochCompleted,
        StepsCompleted,
        EvalStarted,
        EvalCompleted,
        CheckpointStarted,
        CheckpointCommitted,
        CheckpointFailed,
    )
    disable_after = None

    def __init__(
        self,
        tracer_provider: GivesTracers | None = None,
        meter_provider: GivesMeters | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        finish_timeout_s: float = 10.0,
    ) -> None:
        if otel_recorder is None:
            raise ConfigurationError(
                "OpenTelemetry needs its API. Install it: pip install 'eventtrain[opentelemetry]'."
            )
        require_number("OpenTelemetry", "finish_timeout_s", finish_timeout_s, at_least=0)
        wanted = (
            ("tracer_provider", tracer_provider, "get_tracer"),
            ("meter_provider", meter_provider, "get_meter"),
        )
        for name, given, method in wanted:
            if given is not None and not callable(getattr(given, method, None)):
                # Not quoted: it may be an endpoint, with a token in it.
                kind = type(given).__name__
                raise ConfigurationError(
                    f"OpenTelemetry({name}=...): the {kind} that was given has no {method}()."
                )
        self._surroundings = otel_recorder.surroundings
        self._new_recorder = partial(
            otel_recorder.Recorder, tracer_provider, meter_provider, attributes=dict(attributes or {})
        )
        self._finish_timeout_s = finish_timeout_s
        self._run: RunContext | None = None
        self._thread: TrackerThread | None = None
        self._window: StepsCompleted | None = None
        """The newest, unless it was measured."""
        self._measure_at_s = 0.0

    async def start(self, run: RunContext) -> None:
        """Begin the span of the run, on the thread that records."""
        self._run = run
        self._recorder = self._new_recorder(
            context=self._surroundings(), run_id=run.run_id, step=run.start_step, time=datetime.now(UTC)
        )
        self._thread = TrackerThread(self.name or "OpenTelemetry", run.publish, target="OpenTelemetry")
        self._thread.start()
        self._thread.add(self._recorder.open, step=run.start_step, event_kind="start", must_keep=True)

    async def handle(self, event: Event) -> None:
        """Have it recorded; returns at once."""
        if self._thread is None:
            return
        if isinstance(event, StepsCompleted):
            self._window = event
            if monotonic() >= self._measure_at_s:
                self._measure()
            return
        if isinstance(event, ENDS):
            self._measure()
        self._thread.add(
            partial(self._recorder.take, event),
            step=event.step,
            event_kind=event.kind,
            must_keep=isinstance(event, (RunCompleted, RunFailed)),
        )

    async def stop(self) -> None:
        """End the span of the run. Raises SubscriberError where that takes too long."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.add(self._recorder.close, step=0, event_kind="stop", must_keep=True)
            self._run = None
            await thread.aclose(self._finish_timeout_s)

    def _measure(self) -> None:
        window, self._window = self._window, None
        if window is None or self._thread is None or self._run is None:
            return
        self._measure_at_s = monotonic() + MEASURE_INTERVAL_S
        hyperparams = dict(self._run.control.hyperparams)
        self._thread.add(
            partial(self._recorder.measure, window, hyperparams), step=window.step, event_kind=window.kind
        )
