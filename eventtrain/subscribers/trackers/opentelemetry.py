"""``OpenTelemetry``: a run as spans and measurements, through the providers that the program has set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from math import isfinite
from time import monotonic
from typing import TYPE_CHECKING, Any

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
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.tracker import Tracker
from eventtrain.validation.annotations import checked
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

otel_context = import_optional("opentelemetry.context", extra="opentelemetry", used_by="OpenTelemetry")
otel_metrics = import_optional("opentelemetry.metrics", extra="opentelemetry", used_by="OpenTelemetry")
otel_trace = import_optional("opentelemetry.trace", extra="opentelemetry", used_by="OpenTelemetry")

SCOPE = "eventtrain"
UNIX_EPOCH = datetime.fromtimestamp(0, UTC)
MEASURE_INTERVAL_S = 1.0
"""How often the values of the newest step are recorded; OpenTelemetry's readers export about once a minute."""
ENDS = (EpochCompleted, RunCompleted, RunFailed)
"""After these, a value that is not recorded yet may never be exported."""
Attributes = Mapping[str, str | bool | int | float]
EpochEvent = RunResumed | EpochStarted | EpochCompleted | EvalStarted | EvalCompleted
CheckpointEvent = CheckpointStarted | CheckpointCommitted | CheckpointFailed
INSTRUMENTS = {
    "steps": ("counter", "{step}", "Optimiser updates completed"),
    "metric": ("gauge", "", "Of the newest step"),
    "hyperparam": ("gauge", "", "The value in effect"),
    "epoch.metric": ("gauge", "", "Mean over the last epoch"),
    "evaluation.metric": ("gauge", "", "Mean over the last evaluation"),
    "nonfinite": ("counter", "{value}", "Values of gauges that were NaN or infinite"),
    "epoch.duration": ("histogram", "s", "Duration of each epoch"),
    "evaluation.duration": ("histogram", "s", "Duration of each evaluation"),
    "checkpoint.duration": ("histogram", "s", "Duration of each checkpoint"),
    "checkpoint.size": ("histogram", "By", "Of each checkpoint"),
    "checkpoint.failures": ("counter", "{checkpoint}", "Checkpoints that were not written"),
}
"""Name -> kind, unit, description."""


class OpenTelemetry(Tracker):
    """Records a span for the run and for each epoch, evaluation and checkpoint, and measures their values.

    Args:
        tracer_provider, meter_provider: OpenTelemetry's TracerProvider and MeterProvider; None: the global ones. They
            are neither flushed nor shut down.
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

    @checked
    def __init__(
        self,
        tracer_provider: Any = None,  # Any: OpenTelemetry may not be installed
        meter_provider: Any = None,
        *,
        attributes: Mapping[str, str] | None = None,
        finish_timeout_s: float = 10.0,
    ) -> None:
        require_installed(otel_trace)
        super().__init__(finish_timeout_s)
        for argument, provider, method in (
            ("tracer_provider", tracer_provider, "get_tracer"),
            ("meter_provider", meter_provider, "get_meter"),
        ):
            if provider is not None and not callable(getattr(provider, method, None)):
                kind = type(provider).__name__  # not its value, which may be an endpoint with a token in it
                raise ConfigurationError(
                    f"OpenTelemetry({argument}=...): it must have a method {method}(), got {kind}."
                )
        self._new_recorder = partial(
            Recorder, tracer_provider, meter_provider, attributes=dict(attributes or {})
        )
        self._run: RunContext | None = None
        self._recorder: Recorder | None = None
        self._window: StepsCompleted | None = None
        """The newest, unless it was measured."""
        self._measure_at_s = 0.0

    async def start(self, run: RunContext) -> None:
        """Begins the span of the run, on the thread that records."""
        self._run = run
        self._recorder = recorder = self._new_recorder(
            context=otel_context.get_current(), run_id=run.run_id, step=run.start_step, time=datetime.now(UTC)
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


class Recorder:
    """Records the events of one run; one thread at a time. Nothing is done before ``open``.

    A span may be exported where it ends, which may block. ``context`` is that of the span of the run; ``run_id``,
    ``step`` and ``time`` are of the beginning.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
        *,
        attributes: Attributes,
        context: Context,
        run_id: str,
        step: int,
        time: datetime,
    ) -> None:
        self._providers = tracer_provider, meter_provider
        self._attributes = attributes
        self._context = context
        self._run_id = run_id
        self._counted_step = step
        self._last_ns = _ns(time)
        self._epoch: Span | None = None
        self._evaluation: Span | None = None
        self._checkpoints: dict[str, Span] = {}

    def open(self) -> None:
        """Begins the span of the run."""
        tracer_provider, meter_provider = self._providers
        self._tracer = otel_trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = otel_metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._instruments: dict[str, Any] = {
            name: getattr(meter, f"create_{kind}")(f"eventtrain.{name}", unit, description)
            for name, (kind, unit, description) in INSTRUMENTS.items()
        }
        attributes = {"run_id": self._run_id, "start_step": self._counted_step}
        self._run = self._span("run", self._last_ns, self._context, attributes)

    def record(self, event: Event) -> None:
        """Records one event; call it in the order of the events."""
        now_ns = _ns(event.time)
        self._last_ns = max(self._last_ns, now_ns)
        match event:
            case EpochStarted():
                self._end_epoch_and_evaluation(None)
                self._epoch = self._begin(event, now_ns)
            case EpochCompleted():
                self._end_measured("epoch", self._epoch or self._begin(event, _began_ns(event)), event)
                self._epoch = None
            case EvalStarted():
                self._evaluation = self._begin(event, now_ns)
            case EvalCompleted():
                span = self._evaluation or self._begin(event, _began_ns(event))
                self._end_measured("evaluation", span, event)
                self._evaluation = None
            case CheckpointStarted():
                self._checkpoints[event.path] = self._begin(event, now_ns)
            case CheckpointCommitted():
                span = self._checkpoints.pop(event.path, None) or self._begin(event, _began_ns(event))
                span.set_attributes(_prefixed({"size_bytes": event.size_bytes}))
                self._end(span, now_ns)
                self._instruments["checkpoint.duration"].record(event.duration_s, self._attributes)
                self._instruments["checkpoint.size"].record(event.size_bytes, self._attributes)
            case CheckpointFailed():
                span = self._checkpoints.pop(event.path, None) or self._begin(event, now_ns)
                self._end(span, now_ns, event.error)
                self._instruments["checkpoint.failures"].add(1, self._attributes)
            case RunResumed():
                self._counted_step = event.step
                self._run.set_attributes(_prefixed({"resumed": True, "start_step": event.step}))
                if event.batch > 0:  # its EpochStarted was published in the earlier attempt
                    self._epoch = self._begin(event, now_ns)
            case RunCompleted():
                self._end_epoch_and_evaluation(None)
                ending = {
                    "step": event.step,
                    "stop_reason": event.reason,
                    "deterministic": event.deterministic,
                }
                self._run.set_attributes(_prefixed(ending))
            case RunFailed():
                self._end_epoch_and_evaluation("the run failed")
                self._run.set_attributes(_prefixed({"step": event.step}))
                error = escape_surrogates(event.error)
                kind, _, message = error.partition(": ")
                exception = {"exception.type": kind, "exception.message": message}
                self._run.add_event("exception", exception, now_ns)
                self._run.set_status(otel_trace.Status(otel_trace.StatusCode.ERROR, error))
            case _:
                pass

    def measure(self, window: StepsCompleted, hyperparams: Mapping[str, Number]) -> None:
        """Records the values of the newest step, and the number of steps since the last call."""
        self._instruments["steps"].add(window.last_step - self._counted_step, self._attributes)
        self._counted_step = window.last_step
        self._set("metric", {name: column[-1].item() for name, column in window.metrics.items()})
        self._set("hyperparam", hyperparams)

    def close(self) -> None:
        """Ends the spans that are open, and that of the run."""
        self._end_epoch_and_evaluation(None)
        for path in list(self._checkpoints):
            self._end(self._checkpoints.pop(path), self._last_ns)
        self._end(self._run, self._last_ns)

    def _end_epoch_and_evaluation(self, error: str | None) -> None:
        for span in (self._evaluation, self._epoch):
            if span is not None:
                span.set_attributes(_prefixed({"complete": False}))
                self._end(span, self._last_ns, error)
        self._evaluation = self._epoch = None

    def _begin(self, event: EpochEvent | CheckpointEvent, start_ns: int) -> Span:
        """Begins the span of the epoch, evaluation or checkpoint that ``event`` belongs to."""
        name, parent = "epoch", self._run
        if isinstance(event, CheckpointEvent):
            named = {"tag": event.tag} if event.tag is not None else {}
            # Of the run and not of an epoch, which it may outlast.
            name, attributes = "checkpoint", {"step": event.step, "path": event.path, **named}
        else:
            attributes = {"epoch": event.epoch}
            if isinstance(event, (EvalStarted, EvalCompleted)):
                name, parent = "evaluation", self._epoch if self._epoch is not None else self._run
        return self._span(name, start_ns, otel_trace.set_span_in_context(parent), attributes)

    def _span(self, name: str, start_ns: int, context: Context, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            f"eventtrain.{name}",
            context=context,
            attributes={**self._attributes, **_prefixed(attributes)},
            start_time=start_ns,
        )

    def _end_measured(self, name: str, span: Span, event: EpochCompleted | EvalCompleted) -> None:
        values = {f"metric.{metric}": float(value) for metric, value in event.metrics.items()}
        span.set_attributes(_prefixed({"step": event.step, "steps": event.steps, **values}))
        self._end(span, _ns(event.time))
        self._instruments[f"{name}.duration"].record(event.duration_s, self._attributes)
        self._set(f"{name}.metric", event.metrics)

    def _end(self, span: Span, end_ns: int, error: str | None = None) -> None:
        if error is not None:
            span.set_status(otel_trace.Status(otel_trace.StatusCode.ERROR, escape_surrogates(error)))
        span.end(end_ns)

    def _set(self, gauge: str, values: Mapping[str, Number]) -> None:
        """Sets a gauge for each name; counts NaN and infinities instead, which the SDK refuses."""
        for name, value in values.items():
            attributes = {**self._attributes, "name": escape_surrogates(name)}
            if isfinite(value):
                self._instruments[gauge].set(float(value), attributes)
            else:
                self._instruments["nonfinite"].add(1, attributes)


def _prefixed(attributes: Attributes) -> dict[str, str | bool | int | float]:
    return {
        f"eventtrain.{escape_surrogates(name)}": escape_surrogates(value) if isinstance(value, str) else value
        for name, value in attributes.items()
    }


def _began_ns(event: EpochCompleted | EvalCompleted | CheckpointCommitted) -> int:
    return _ns(event.time) - int(event.duration_s * 1e9)


def _ns(time: datetime) -> int:
    return (time - UNIX_EPOCH) // timedelta(microseconds=1) * 1000
