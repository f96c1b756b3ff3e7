"""``families``: what a PrometheusExporter knows, as Prometheus wants to have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from eventtrain.events.models import Number
from eventtrain.subscribers.trackers.prometheus_values import Figures, Seen

Labelled = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, and the value."""


def families(seen: Seen, labels: Mapping[str, str]) -> Iterator[Metric]:
    """All metrics, each sample with ``labels``. Any thread; never blocks."""
    run = seen.run
    figures = Figures.of(run) if run is not None else seen.at_end
    made = _Made(labels)
    if seen.run_id:
        info = InfoMetricFamily("eventtrain_run", "The run that is observed.")
        info.add_metric([], {**labels, "run_id": _text(seen.run_id)})
        yield info
    yield made.gauge("running", "1 while a run is under way.", [((), float(run is not None))])
    yield made.counter("steps", "Optimiser updates completed.", [((), seen.step)])
    if seen.window is not None:
        yield made.gauge(
            "last_window_timestamp_seconds",
            "When the newest step was heard of.",
            [((), seen.window.time.timestamp())],
        )
        last = {name: column[-1].item() for name, column in seen.window.metrics.items()}
        yield made.gauge("metric", "Of the newest step.", _named(last), "name")
    if seen.epoch is not None:
        yield made.counter("epochs", "Epochs completed.", [((), seen.epoch.epoch + 1)])
        yield made.gauge(
            "epoch_duration_seconds", "Of the last epoch completed.", [((), seen.epoch.duration_s)]
        )
        yield made.gauge(
            "epoch_metric", "Mean over the last epoch completed.", _named(seen.epoch.metrics), "name"
        )
    if seen.evaluation is not None:
        yield made.gauge(
            "evaluation_metric", "Mean over the last evaluation.", _named(seen.evaluation.metrics), "name"
        )
    yield made.counter("checkpoints", "What became of checkpoints.", _named(seen.checkpoints), "result")
    if seen.committed is not None:
        yield made.gauge("checkpoint_step", "Of the newest checkpoint.", [((), seen.committed.step)])
        yield made.gauge("checkpoint_size_bytes", "Of the newest.", [((), seen.committed.size_bytes)])
        yield made.gauge(
            "checkpoint_duration_seconds", "It took to write the newest.", [((), seen.committed.duration_s)]
        )
    yield made.gauge(
        "alert",
        "1 while it is raised.",
        [((n, s), on) for (n, s), on in seen.alerts.items()],
        "name",
        "severity",
    )
    if figures is not None:
        yield made.gauge("hyperparam", "The value in effect.", _named(figures.hyperparams), "name")
        yield made.counter("run_seconds", "How long the run has lasted.", [((), figures.duration_s)])
        yield made.counter(
            "loop_seconds", "Where the training thread's time went.", _named(figures.loop_seconds), "part"
        )
        for name, (kind, what, documentation) in SUBSCRIBER.items():
            values = [((one,), float(f[what])) for one, f in figures.subscriptions.items()]
            yield kind(made, f"subscriber_{name}", documentation, values, "subscriber")


class _Made:
    """Makes families whose samples all have the same constant labels."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._names = list(labels)
        self._values = [_text(value) for value in labels.values()]

    def gauge(self, name: str, documentation: str, values: Labelled, *labels: str) -> Metric:
        return self._filled(
            GaugeMetricFamily(f"eventtrain_{name}", documentation, labels=[*self._names, *labels]), values
        )

    def counter(self, name: str, documentation: str, values: Labelled, *labels: str) -> Metric:
        return self._filled(
            CounterMetricFamily(f"eventtrain_{name}", documentation, labels=[*self._names, *labels]), values
        )

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, values: Labelled) -> Metric:
        for given, value in values:
            family.add_metric([*self._values, *map(_text, given)], float(value))
        return family


SUBSCRIBER: Mapping[str, tuple[Callable[..., Metric], str, str]] = {
    "active": (_Made.gauge, "active", "1 unless it was switched off."),
    "events": (_Made.counter, "delivered", "Events handled."),
    "errors": (_Made.counter, "errors", "Failed attempts to handle an event."),
    "dropped": (_Made.counter, "dropped", "Events that its queue let go."),
    "pending": (_Made.gauge, "pending", "Events that wait or are being handled."),
    "lag_events": (_Made.gauge, "lag_events", "Events it is behind."),
    "lag_seconds": (_Made.gauge, "lag_s", "Age of the oldest event that waits."),
    "handler_seconds": (_Made.counter, "handler_wall_s", "Time in its handler."),
    "handler_cpu_seconds": (_Made.counter, "handler_cpu_s", "CPU time of its handler."),
    "longest_slice_seconds": (_Made.gauge, "longest_slice_s", "Longest hold of the event loop."),
}
"""Name -> what makes it, the field of the statistics, and what it is."""


def _named(values: Mapping[str, Number]) -> Labelled:
    return [((name,), float(value)) for name, value in values.items()]


def _text(value: str) -> str:
    """As UTF-8 can have it: one lone surrogate would cost the whole scrape."""
    return value.encode("utf-8", "backslashreplace").decode()
