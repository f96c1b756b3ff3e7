"""``Recorder``: the events of a run as spans and measurements of OpenTelemetry.

A span may be exported where it ends, which may block; an ``OpenTelemetry`` subscriber uses a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context, get_current
from opentelemetry.metrics import MeterProvider
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
from eventtrain.events.models import Number, escape_surrogates

__all__ = ["Recorder", "get_current"]

SCOPE = "eventtrain"
UNIX_EPOCH = datetime.fromtimestamp(0, UTC)

Attributes = Mapping[str, str | bool | int | float]


class Recorder:
    """Records the events of one run; one thread at a time. Nothing is done before ``open``.

    Args:
        tracer_provider, meter_provider: None: the global ones.
        attributes: of every span and every measurement.
        context: of the span of the run, as ``get_current`` returns it where the run begins.
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
        self._counted_step = step
        self._last_ns = _ns(time)
        self._epoch: Span | None = None
        self._evaluation: Span | None = None
        self._checkpoints: dict[str, Span] = {}
        self._record_by_type: dict[type[Event], Callable[[Any], None]] = {
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
        """Begins the span of the run."""
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=self._providers[0])
        self._instruments = _Instruments(self._providers[1], self._attributes)
        attributes = {"run_id": self._run_id, "start_step": self._counted_step}
        self._run = self._begin("run", self._last_ns, self._context, attributes)

    def record(self, event: Event) -> None:
        """Records one event; call it in the order of the events."""
        self._last_ns = max(self._last_ns, _ns(event.time))
        self._record_by_type[type(event)](event)

    def measure(self, window: StepsCompleted, hyperparams: Mapping[str, Number]) -> None:
        """Records the values of the newest step, and the number of steps since the last call."""
        self._instruments.add("steps", window.last_step - self._counted_step)
        self._counted_step = window.last_step
        self._instruments.set("metric", {name: column[-1].item() for name, column in window.metrics.items()})
        self._instruments.set("hyperparam", hyperparams)

    def close(self) -> None:
        """Ends the spans that are open, and that of the run."""
        self._end_epoch_and_evaluation(None)
        for path in list(self._checkpoints):
            self._end(self._checkpoints.pop(path), self._last_ns)
        self._end(self._run, self._last_ns)

    # --- the run ----------------------------------------------------------------------------------------------

    def _on_run_resumed(self, event: RunResumed) -> None:
        self._counted_step = event.step
        self._run.set_attributes(_prefixed({"resumed": True, "start_step": event.step}))
        if event.batch > 0:  # its EpochStarted was published in the earlier attempt
            self._epoch = self._begin_epoch(event.epoch, _ns(event.time))

    def _on_run_completed(self, event: RunCompleted) -> None:
        self._end_epoch_and_evaluation(None)
        self._run.set_attributes(
            _prefixed({"step": event.step, "stop_reason": event.reason, "deterministic": event.deterministic})
        )

    def _on_run_failed(self, event: RunFailed) -> None:
        self._end_epoch_and_evaluation("the run failed")
        self._run.set_attributes(_prefixed({"step": event.step}))
        kind, _, message = event.error.partition(": ")
        self._run.add_event(
            "exception",
            {"exception.type": kind, "exception.message": escape_surrogates(message)},
            _ns(event.time),
        )
        self._run.set_status(Status(StatusCode.ERROR, escape_surrogates(event.error)))

    def _end_epoch_and_evaluation(self, error: str | None) -> None:
        for span in (self._evaluation, self._epoch):
            if span is not None:
                span.set_attributes(_prefixed({"complete": False}))
                self._end(span, self._last_ns, error)
        self._evaluation = self._epoch = None

    # --- epochs, evaluations, checkpoints ---------------------------------------------------------------------

    def _on_epoch_started(self, event: EpochStarted) -> None:
        self._end_epoch_and_evaluation(None)
        self._epoch = self._begin_epoch(event.epoch, _ns(event.time))

    def _on_epoch_completed(self, event: EpochCompleted) -> None:
        span = self._epoch or self._begin_epoch(event.epoch, _began_ns(event))
        self._epoch = None
        self._end_measured(span, event)
        self._instruments.record("epoch.duration", event.duration_s)
        self._instruments.set("epoch.metric", event.metrics)

    def _on_eval_started(self, event: EvalStarted) -> None:
        self._evaluation = self._begin_evaluation(event.epoch, _ns(event.time))

    def _on_eval_completed(self, event: EvalCompleted) -> None:
        span = self._evaluation or self._begin_evaluation(event.epoch, _began_ns(event))
        self._evaluation = None
        self._end_measured(span, event)
        self._instruments.record("evaluation.duration", event.duration_s)
        self._instruments.set("evaluation.metric", event.metrics)

    def _on_checkpoint_started(self, event: CheckpointStarted) -> None:
        self._checkpoints[event.path] = self._begin_checkpoint(event, _ns(event.time))

    def _on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        span = self._checkpoints.pop(event.path, None) or self._begin_checkpoint(event, _began_ns(event))
        span.set_attributes(_prefixed({"size_bytes": event.size_bytes}))
        self._end(span, _ns(event.time))
        self._instruments.record("checkpoint.duration", event.duration_s)
        self._instruments.record("checkpoint.size", event.size_bytes)

    def _on_checkpoint_failed(self, event: CheckpointFailed) -> None:
        span = self._checkpoints.pop(event.path, None) or self._begin_checkpoint(event, _ns(event.time))
        self._end(span, _ns(event.time), event.error)
        self._instruments.add("checkpoint.failures", 1)

    # --- spans ------------------------------------------------------------------------------------------------

    def _begin(self, name: str, start_ns: int, context: Context, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            f"eventtrain.{name}",
            context=context,
            attributes={**self._attributes, **_prefixed(attributes)},
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

    def _end_measured(self, span: Span, event: EpochCompleted | EvalCompleted) -> None:
        metrics = {f"metric.{name}": float(value) for name, value in event.metrics.items()}
        span.set_attributes(_prefixed({"step": event.step, "steps": event.steps, **metrics}))
        self._end(span, _ns(event.time))

    def _end(self, span: Span, end_ns: int, error: str | None = None) -> None:
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, escape_surrogates(error)))
        span.end(end_ns)


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


class _Instruments:
    """Instruments of a meter; each measurement has ``attributes``."""

    def __init__(self, provider: MeterProvider | None, attributes: Attributes) -> None:
        meter = metrics.get_meter(SCOPE, meter_provider=provider)
        self._attributes = attributes
        self._instruments: dict[str, Any] = {
            name: getattr(meter, f"create_{kind}")(f"eventtrain.{name}", unit, description)
            for name, (kind, unit, description) in INSTRUMENTS.items()
        }

    def add(self, counter: str, amount: int) -> None:
        self._instruments[counter].add(amount, self._attributes)

    def record(self, histogram: str, value: float) -> None:
        self._instruments[histogram].record(value, self._attributes)

    def set(self, gauge: str, values: Mapping[str, Number]) -> None:
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
