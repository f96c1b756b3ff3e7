"""``Recorder``: what a run says, as spans and measurements of OpenTelemetry's.

A span may be exported where it ends, and so block; an ``OpenTelemetry`` subscriber calls this on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context, get_current
from opentelemetry.metrics import Histogram, MeterProvider
from opentelemetry.trace import Span, Status, StatusCode, TracerProvider

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
from eventtrain.events.models import Number

SCOPE = "eventtrain"
EPOCH_0 = datetime.fromtimestamp(0, UTC)

Attributes = Mapping[str, str | bool | int | float]


def surroundings() -> Context:
    """Where the run span belongs: the span that is current here, if there is one."""
    return get_current()


class Recorder:
    """Takes the events of one run in; one thread at a time. Nothing is done before ``open``.

    Args:
        tracer_provider, meter_provider: the global ones if None.
        attributes: of every span and every measurement.
        context: of the run span.
        run_id, step, time: of the beginning.
    """

    def __init__(
        self,
        tracer_provider: Any,
        meter_provider: Any,
        *,
        attributes: Attributes,
        context: Context,
        run_id: str,
        step: int,
        time: datetime,
    ) -> None:
        self._providers: tuple[TracerProvider | None, MeterProvider | None] = tracer_provider, meter_provider
        self._attributes = attributes
        self._context = context
        self._run_id = run_id
        self._counted = step
        self._last_ns = _ns(time)
        self._epoch: Span | None = None
        self._evaluation: Span | None = None
        self._checkpoints: dict[str, Span] = {}
        self._takers: dict[type[Event], Callable[[Any], None]] = {
            RunResumed: self._on_run_resumed,
            RunCompleted: self._on_run_completed,
            RunFailed: self._on_run_failed,
            EpochStarted: self._on_epoch_started,
            EpochCompleted: self._on_epoch_completed,
            EvalStarted: self._on_eval_started,
            EvalCompleted: self._on_eval_completed,
            CheckpointStarted: self._on_checkpoint_started,
            CheckpointCommitted: self._on_checkpoint_committed,
            CheckpointFailed: self._on_checkpoint_failed,
        }

    def open(self) -> None:
        """Begin the run span."""
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=self._providers[0])
        self._instruments = _Instruments(self._providers[1], self._attributes)
        own = {"run_id": self._run_id, "start_step": self._counted}
        self._run = self._begin("run", self._last_ns, self._context, own)

    def take(self, event: Event) -> None:
        """One event, in order."""
        self._last_ns = max(self._last_ns, _ns(event.time))
        self._takers[type(event)](event)

    def measure(self, window: StepsCompleted, hyperparams: Mapping[str, Number]) -> None:
        """The values of the newest step, and how many there were since the last call."""
        self._instruments.steps.add(window.last_step - self._counted, self._attributes)
        self._counted = window.last_step
        self._instruments.show("metric", {name: column[-1].item() for name, column in window.metrics.items()})
        self._instruments.show("hyperparam", hyperparams)

    def close(self) -> None:
        """The run is over, and everything was taken in."""
        self._close_open(None)
        for path in list(self._checkpoints):
            self._end(self._checkpoints.pop(path), self._last_ns)
        self._end(self._run, self._last_ns)

    # --- the run ----------------------------------------------------------------------------------------------

    def _on_run_resumed(self, event: RunResumed) -> None:
        self._counted = event.step
        self._run.set_attributes(_own({"resumed": True, "start_step": event.step}))
        if event.batch > 0:  # its EpochStarted was said before
            self._epoch = self._begin_epoch(event.epoch, _ns(event.time))

    def _on_run_completed(self, event: RunCompleted) -> None:
        self._close_open(None)
        self._run.set_attributes(
            _own({"step": event.step, "stop_reason": event.reason, "deterministic": event.deterministic})
        )

    def _on_run_failed(self, event: RunFailed) -> None:
        self._close_open("the run failed")
        self._run.set_attributes(_own({"step": event.step}))
        kind, _, message = event.error.partition(": ")
        self._run.add_event(
            "exception", {"exception.type": kind, "exception.message": _utf8(message)}, _ns(event.time)
        )
        self._run.set_status(Status(StatusCode.ERROR, _utf8(event.error)))

    def _close_open(self, error: str | None) -> None:
        for span in (self._evaluation, self._epoch):
            if span is not None:
                span.set_attributes(_own({"complete": False}))
                self._end(span, self._last_ns, error)
        self._evaluation = self._epoch = None

    # --- epochs, evaluations, checkpoints ---------------------------------------------------------------------

    def _on_epoch_started(self, event: EpochStarted) -> None:
        self._close_open(None)
        self._epoch = self._begin_epoch(event.epoch, _ns(event.time))

    def _on_epoch_completed(self, event: EpochCompleted) -> None:
        span, self._epoch = self._epoch, None
        end_ns = _ns(event.time)
        if span is None:
            span = self._begin_epoch(event.epoch, end_ns - _s_to_ns(event.duration_s))
        span.set_attributes(_own({"step": event.step, "steps": event.steps, **_metrics(event.metrics)}))
        self._end(span, end_ns)
        self._instruments.epoch_duration.record(event.duration_s, self._attributes)
        self._instruments.show("epoch.metric", event.metrics)

    def _on_eval_started(self, event: EvalStarted) -> None:
        self._evaluation = self._begin_evaluation(event.epoch, _ns(event.time))

    def _on_eval_completed(self, event: EvalCompleted) -> None:
        span, self._evaluation = self._evaluation, None
        end_ns = _ns(event.time)
        if span is None:
            span = self._begin_evaluation(event.epoch, end_ns - _s_to_ns(event.duration_s))
        span.set_attributes(_own({"step": event.step, "steps": event.steps, **_metrics(event.metrics)}))
        self._end(span, end_ns)
        self._instruments.evaluation_duration.record(event.duration_s, self._attributes)
        self._instruments.show("evaluation.metric", event.metrics)

    def _on_checkpoint_started(self, event: CheckpointStarted) -> None:
        self._checkpoints[event.path] = self._begin_checkpoint(event, _ns(event.time))

    def _on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        end_ns = _ns(event.time)
        span = self._checkpoints.pop(event.path, None)
        if span is None:
            span = self._begin_checkpoint(event, end_ns - _s_to_ns(event.duration_s))
        span.set_attributes(_own({"size_bytes": event.size_bytes}))
        self._end(span, end_ns)
        self._instruments.checkpoint_duration.record(event.duration_s, self._attributes)
        self._instruments.checkpoint_size.record(event.size_bytes, self._attributes)

    def _on_checkpoint_failed(self, event: CheckpointFailed) -> None:
        span = self._checkpoints.pop(event.path, None) or self._begin_checkpoint(event, _ns(event.time))
        self._end(span, _ns(event.time), event.error)
        self._instruments.checkpoint_failures.add(1, self._attributes)

    # --- spans ------------------------------------------------------------------------------------------------

    def _begin(self, name: str, start_ns: int, context: Context, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            f"eventtrain.{name}",
            context=context,
            attributes={**self._attributes, **_own(attributes)},
            start_time=start_ns,
        )

    def _begin_epoch(self, epoch: int, start_ns: int) -> Span:
        return self._begin("epoch", start_ns, trace.set_span_in_context(self._run), {"epoch": epoch})

    def _begin_evaluation(self, epoch: int, start_ns: int) -> Span:
        parent = trace.set_span_in_context(self._epoch if self._epoch is not None else self._run)
        return self._begin("evaluation", start_ns, parent, {"epoch": epoch})

    def _begin_checkpoint(
        self, event: CheckpointStarted | CheckpointCommitted | CheckpointFailed, start_ns: int
    ) -> Span:
        named = {"tag": event.tag} if event.tag is not None else {}
        # Of the run and not of an epoch, which it may outlast.
        parent = trace.set_span_in_context(self._run)
        return self._begin("checkpoint", start_ns, parent, {"step": event.step, "path": event.path, **named})

    def _end(self, span: Span, end_ns: int, error: str | None = None) -> None:
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, _utf8(error)))
        span.end(end_ns)


class _Instruments:
    """What is measured."""

    def __init__(self, provider: MeterProvider | None, attributes: Attributes) -> None:
        meter = metrics.get_meter(SCOPE, meter_provider=provider)
        self._attributes = attributes
        self.steps = meter.create_counter("eventtrain.steps", "{step}", "Optimiser updates completed")
        self._gauges = {
            "metric": meter.create_gauge("eventtrain.metric", "", "Of the newest step"),
            "hyperparam": meter.create_gauge("eventtrain.hyperparam", "", "The value in effect"),
            "epoch.metric": meter.create_gauge("eventtrain.epoch.metric", "", "Mean over the last epoch"),
            "evaluation.metric": meter.create_gauge(
                "eventtrain.evaluation.metric", "", "Mean over the last evaluation"
            ),
        }

        self._nonfinite = meter.create_counter(
            "eventtrain.nonfinite", "{value}", "Values to be shown that were NaN or infinite"
        )

        def duration(what: str) -> Histogram:
            return meter.create_histogram(f"eventtrain.{what}.duration", "s", f"Duration of each {what}")

        self.epoch_duration = duration("epoch")
        self.evaluation_duration = duration("evaluation")
        self.checkpoint_duration = duration("checkpoint")
        self.checkpoint_size = meter.create_histogram(
            "eventtrain.checkpoint.size", "By", "Of each checkpoint"
        )
        self.checkpoint_failures = meter.create_counter(
            "eventtrain.checkpoint.failures", "{checkpoint}", "Checkpoints that were not written"
        )

    def show(self, gauge: str, values: Mapping[str, Number]) -> None:
        """Set one gauge for each name; count what is not finite, which the SDK takes for no value of a gauge."""
        for name, value in values.items():
            attributes = {**self._attributes, "name": _utf8(name)}
            if isfinite(value):
                self._gauges[gauge].set(float(value), attributes)
            else:
                self._nonfinite.add(1, attributes)


def _own(attributes: Attributes) -> dict[str, str | bool | int | float]:
    return {
        f"eventtrain.{name}": _utf8(value) if isinstance(value, str) else value
        for name, value in attributes.items()
    }


def _metrics(values: Mapping[str, Number]) -> dict[str, float]:
    return {f"metric.{_utf8(name)}": float(value) for name, value in values.items()}


def _utf8(text: str) -> str:
    """``text`` with half a surrogate pair escaped, which would cost an exporter the whole batch."""
    return text.encode("utf-8", "backslashreplace").decode()


def _ns(time: datetime) -> int:
    return (time - EPOCH_0) // timedelta(microseconds=1) * 1000


def _s_to_ns(seconds: float) -> int:
    return int(seconds * 1e9)
