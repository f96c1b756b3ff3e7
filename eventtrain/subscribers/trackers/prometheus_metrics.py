"""What a ``PrometheusExporter`` knows of a run, as a collector of prometheus_client, and its HTTP server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from socket import SHUT_RDWR
from typing import Any

from prometheus_client import CollectorRegistry, make_asgi_app, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from eventtrain.events import CheckpointCommitted, EpochCompleted, EvalCompleted, StepsCompleted
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers.base import RunContext

CLIENT_TIMEOUT_S = 10.0
"""A connection on which the client sends nothing for this long is closed."""

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
Family = GaugeMetricFamily | CounterMetricFamily
LabelledValues = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, and the value."""


@dataclass(frozen=True)
class RunStatistics:
    """Statistics that a running run is asked for at each scrape."""

    hyperparams: Mapping[str, Number]
    duration_s: float
    loop_seconds: Mapping[str, float]
    subscriptions: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, run: RunContext) -> RunStatistics:
        """Returns the current ones. Any thread; never blocks."""
        loop = run.loop_statistics()
        seconds = {
            one.name.removesuffix("_s"): getattr(loop, one.name)
            for one in fields(loop)
            if one.name.endswith("_s") and one.name != "duration_s"
        }
        subscriptions = {
            name: {
                "active": statistics.state == "active",
                **{one.name: getattr(statistics, one.name) for one in fields(statistics)[2:]},
            }
            for name, statistics in run.statistics().items()
        }
        return cls(dict(run.control.hyperparams), loop.duration_s, seconds, subscriptions)


@dataclass
class LatestEvents:
    """The latest event of each kind. Written by handlers on the event loop, read by the threads of scrapes.

    The value of a field is replaced, never changed, so readers need no lock.
    """

    run_id: str = ""
    run: RunContext | None = None
    """None after the run has ended."""
    step: int = 0
    window: StepsCompleted | None = None
    epoch: EpochCompleted | None = None
    evaluation: EvalCompleted | None = None
    committed: CheckpointCommitted | None = None
    checkpoints: Mapping[str, int] = field(
        default_factory=lambda: {"committed": 0, "failed": 0, "skipped": 0}
    )
    alerts: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(name, severity) -> 1 while it is raised, then 0."""
    at_end: RunStatistics | None = None


class RunCollector:
    """The only collector of ``registry``. Collecting never blocks; any thread.

    Args:
        labels: added to each sample.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.latest = LatestEvents()
        self.registry = CollectorRegistry()
        self._labels = {name: escape_surrogates(value) for name, value in labels.items()}
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics; prometheus_client calls it for each scrape, on the thread of the scrape."""
        latest = self.latest
        run = latest.run
        statistics = RunStatistics.of(run) if run is not None else latest.at_end
        if latest.run_id:
            info = InfoMetricFamily("eventtrain_run", "The run that is observed.")
            info.add_metric([], {**self._labels, "run_id": escape_surrogates(latest.run_id)})
            yield info
        running = _single(run is not None)
        yield self._metric(GaugeMetricFamily, "running", "1 while a run is under way.", running)
        step = _single(latest.step)
        yield self._metric(CounterMetricFamily, "steps", "Optimiser updates completed.", step)
        yield from self._events(latest)
        if statistics is not None:
            yield from self._statistics(statistics)

    def _events(self, latest: LatestEvents) -> Iterator[Metric]:
        gauge, counter = partial(self._metric, GaugeMetricFamily), partial(self._metric, CounterMetricFamily)
        if (window := latest.window) is not None:
            heard_s = _single(window.time.timestamp())
            yield gauge("last_window_timestamp_seconds", "Time of the newest step.", heard_s)
            last = {name: column[-1].item() for name, column in window.metrics.items()}
            yield gauge("metric", "Of the newest step.", _named(last), "name")
        if (epoch := latest.epoch) is not None:
            yield counter("epochs", "Epochs completed.", _single(epoch.epoch + 1))
            yield gauge("epoch_duration_seconds", "Of the last epoch completed.", _single(epoch.duration_s))
            yield gauge("epoch_metric", "Mean over the last epoch completed.", _named(epoch.metrics), "name")
        if (evaluation := latest.evaluation) is not None:
            means = _named(evaluation.metrics)
            yield gauge("evaluation_metric", "Mean over the last evaluation.", means, "name")
        yield counter("checkpoints", "Checkpoints by result.", _named(latest.checkpoints), "result")
        if (committed := latest.committed) is not None:
            yield gauge("checkpoint_step", "Of the newest checkpoint.", _single(committed.step))
            yield gauge("checkpoint_size_bytes", "Of the newest checkpoint.", _single(committed.size_bytes))
            duration_s = _single(committed.duration_s)
            yield gauge("checkpoint_duration_seconds", "Of writing the newest checkpoint.", duration_s)
        yield gauge("alert", "1 while it is raised.", latest.alerts.items(), "name", "severity")

    def _statistics(self, statistics: RunStatistics) -> Iterator[Metric]:
        gauge, counter = partial(self._metric, GaugeMetricFamily), partial(self._metric, CounterMetricFamily)
        yield gauge("hyperparam", "The value in effect.", _named(statistics.hyperparams), "name")
        yield counter("run_seconds", "Duration of the run.", _single(statistics.duration_s))
        seconds = _named(statistics.loop_seconds)
        yield counter("loop_seconds", "Time of the training thread by part.", seconds, "part")
        for name, (kind, statistic, documentation) in SUBSCRIBER_METRICS.items():
            values = {one: found[statistic] for one, found in statistics.subscriptions.items()}
            yield self._metric(kind, f"subscriber_{name}", documentation, _named(values), "subscriber")

    def _metric(
        self, kind: type[Family], name: str, documentation: str, values: LabelledValues, *labels: str
    ) -> Metric:
        family = kind(f"eventtrain_{name}", documentation, labels=[*self._labels, *labels])
        for given, value in values:
            family.add_metric([*self._labels.values(), *map(escape_surrogates, given)], float(value))
        return family


SUBSCRIBER_METRICS: Mapping[str, tuple[type[Family], str, str]] = {
    "active": (GaugeMetricFamily, "active", "1 unless it was switched off."),
    "events": (CounterMetricFamily, "delivered", "Events handled."),
    "errors": (CounterMetricFamily, "errors", "Failed attempts to handle an event."),
    "dropped": (CounterMetricFamily, "dropped", "Events that its queue dropped."),
    "pending": (GaugeMetricFamily, "pending", "Events that wait or are being handled."),
    "lag_events": (GaugeMetricFamily, "lag_events", "Events it is behind."),
    "lag_seconds": (GaugeMetricFamily, "lag_s", "Age of the oldest event that waits."),
    "handler_seconds": (CounterMetricFamily, "handler_wall_s", "Time in its handler."),
    "handler_cpu_seconds": (CounterMetricFamily, "handler_cpu_s", "CPU time of its handler."),
    "longest_slice_seconds": (GaugeMetricFamily, "longest_slice_s", "Longest hold of the event loop."),
}
"""Name -> kind of metric, field of the subscription's statistics, documentation."""


class ASGIExposition:
    """ASGI app that answers with the metrics, whatever the path. Not a function: Starlette's Route wraps those."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app: ASGIApp = make_asgi_app(registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        await self._app(scope, receive, send)


class MetricsServer:
    """prometheus_client's HTTP server: a daemon thread for each connection; listens until ``close``.

    Args:
        registry: collected for each request, on the thread of that request.
        host: a name or an address of this machine.
        port: 0 takes a free one.

    Creating and closing it block; any thread.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        server: Any  # which handler it has is not part of its type
        server, self._thread = start_http_server(port, host, registry)
        handler = server.RequestHandlerClass
        server.RequestHandlerClass = type("Handler", (handler,), {"timeout": CLIENT_TIMEOUT_S})
        self._server = server
        self.port: int = server.server_port
        """The port that it listens on."""

    def close(self) -> None:
        """Frees the port. Does not wait for requests that are being answered."""
        with suppress(OSError):  # wakes the thread, which otherwise looks every 0.5 s whether it has to end
            self._server.socket.shutdown(SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _single(value: float) -> LabelledValues:
    return [((), float(value))]


def _named(values: Mapping[str, Number]) -> LabelledValues:
    return [((name,), float(value)) for name, value in values.items()]
