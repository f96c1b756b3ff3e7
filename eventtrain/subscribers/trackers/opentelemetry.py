"""``OpenTelemetry``: a run as spans and measurements, through the providers that the program has set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
from eventtrain.subscribers._shared.optional_imports import import_optional, require_installed
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.tracker import Tracker

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.opentelemetry_recorder import Recorder

opentelemetry_recorder = import_optional(
    "eventtrain.subscribers.trackers.opentelemetry_recorder", extra="opentelemetry", used_by="OpenTelemetry"
)

MEASURE_INTERVAL_S = 1.0
"""How often the values of the newest step are recorded; OpenTelemetry's readers export about once a minute."""
ENDS = (EpochCompleted, RunCompleted, RunFailed)
"""After these, a value that is not recorded yet may never be exported."""


@runtime_checkable
class GivesTracers(Protocol):
    """A ``TracerProvider`` of OpenTelemetry."""

    @property
    def get_tracer(self) -> Any:
        """Method that returns a tracer."""
        ...


@runtime_checkable
class GivesMeters(Protocol):
    """A ``MeterProvider`` of OpenTelemetry."""

    @property
    def get_meter(self) -> Any:
        """Method that returns a meter."""
        ...


class OpenTelemetry(Tracker):
    """Records a span for the run and for each epoch, evaluation and checkpoint, and measures their values.

    Args:
        tracer_provider, meter_provider: OpenTelemetry's; None: the global ones. They are neither flushed nor shut
            down.
        attributes: of every span and measurement.
        finish_timeout_s: how long ``stop`` waits for what is not recorded, within the trainer's ``drain_timeout_s``.

    The span of the run is a child of the one that is current where ``fit`` or ``fit_async`` was called. Those of epochs
    and checkpoints are children of the run's, that of an evaluation is a child of its epoch's. A run that failed and a
    checkpoint that was not written have the status ERROR. Gauges show the metrics of the newest step, updated at most
    once a second.

    A thread of its own records, since a processor may export a span where it ends: one that hangs delays nothing.
    SubscriberFailed reports what could not be recorded.

    Raises:
        ConfigurationError: OpenTelemetry's API is not installed, or an argument is invalid.
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

    def __init__(
        self,
        tracer_provider: GivesTracers | None = None,
        meter_provider: GivesMeters | None = None,
        *,
        attributes: Mapping[str, str] | None = None,
        finish_timeout_s: float = 10.0,
    ) -> None:
        require_installed(opentelemetry_recorder)
        super().__init__(finish_timeout_s)
        _require_method("tracer_provider", tracer_provider, "get_tracer")
        _require_method("meter_provider", meter_provider, "get_meter")
        self._new_recorder = partial(
            opentelemetry_recorder.Recorder,
            tracer_provider,
            meter_provider,
            attributes=dict(attributes or {}),
        )
        self._run: RunContext | None = None
        self._recorder: Recorder | None = None
        self._window: StepsCompleted | None = None
        """The newest, unless it was measured."""
        self._measure_at_s = 0.0

    async def start(self, run: RunContext) -> None:
        """Begins the span of the run, on the thread that records."""
        self._run = run
        context = opentelemetry_recorder.get_current()
        self._recorder = recorder = self._new_recorder(
            context=context, run_id=run.run_id, step=run.start_step, time=datetime.now(UTC)
        )
        self._start_thread(run, "OpenTelemetry", recorder.open)

    async def handle(self, event: Event) -> None:
        """Has it recorded; returns at once."""
        recorder = self._recorder
        if recorder is None:
            return
        if isinstance(event, StepsCompleted):
            self._window = event
            if monotonic() >= self._measure_at_s:
                self._measure(recorder)
            return
        if isinstance(event, ENDS):
            self._measure(recorder)
        rows = 0 if isinstance(event, (RunCompleted, RunFailed)) else 1
        self._add(event, partial(recorder.record, event), rows=rows)

    def _last_job(self) -> Callable[[], None] | None:
        return self._recorder.close if self._recorder is not None else None

    def _measure(self, recorder: Recorder) -> None:
        window, self._window = self._window, None
        if window is None or self._run is None:
            return
        self._measure_at_s = monotonic() + MEASURE_INTERVAL_S
        self._add(window, partial(recorder.measure, window, dict(self._run.control.hyperparams)))


def _require_method(argument: str, provider: Any, method: str) -> None:
    """Raises ConfigurationError unless ``provider`` has the method, or is None."""
    if provider is not None and not callable(getattr(provider, method, None)):
        kind = type(provider).__name__  # the value is not quoted: it may be an endpoint with a token in it
        raise ConfigurationError(
            f"OpenTelemetry({argument}=...): it must have a method {method}(), got {kind}."
        )
