"""``PrometheusExporter``: shows a running run to a Prometheus server that scrapes it."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    AlertRaised,
    AlertResolved,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointSkipped,
    EpochCompleted,
    EvalCompleted,
    Event,
    RunResumed,
    RunStarted,
    StepsCompleted,
    SubscriberFailed,
)
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers._shared.processes import place_on_machine
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

prometheus_client = import_optional("prometheus_client", extra="prometheus", used_by="PrometheusExporter")
prometheus_core = import_optional("prometheus_client.core", extra="prometheus", used_by="PrometheusExporter")

logger = logging.getLogger("eventtrain")

OWN_LABELS = frozenset({"name", "part", "result", "run_id", "severity", "subscriber"})
"""Labels of the exporter's own metrics."""
CLIENT_TIMEOUT_S = 10.0
"""A connection on which the client sends nothing for this long is closed."""

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
Kind = Literal["Gauge", "Counter"]

SUBSCRIBER_METRICS: Mapping[str, tuple[Kind, Callable[[SubscriptionStatistics], float], str]] = {
    "active": ("Gauge", lambda one: one.state == "active", "1 unless it was switched off."),
    "events": ("Counter", attrgetter("delivered"), "Events handled."),
    "errors": ("Counter", attrgetter("errors"), "Failed attempts to handle an event."),
    "dropped": ("Counter", attrgetter("dropped"), "Events that its queue dropped."),
    "pending": ("Gauge", attrgetter("pending"), "Events that wait or are being handled."),
    "lag_events": ("Gauge", attrgetter("lag_events"), "Events it is behind."),
    "lag_seconds": ("Gauge", attrgetter("lag_s"), "Age of the oldest event that waits."),
    "handler_seconds": ("Counter", attrgetter("handler_wall_s"), "Time in its handler."),
    "handler_cpu_seconds": ("Counter", attrgetter("handler_cpu_s"), "CPU time of its handler."),
    "longest_slice_seconds": ("Gauge", attrgetter("longest_slice_s"), "Longest hold of the event loop."),
}
"""Name -> kind of metric, value of the subscription's statistics, documentation."""


class PrometheusExporterState(SavedState):
    """State saved with checkpoints: name and severity of each alert that is raised."""

    version: Literal[1] = 1
    raised: list[tuple[str, str]]


class PrometheusExporter(Subscriber):
    """Shows metrics, hyperparameters, checkpoints, alerts and statistics of loop and bus to a Prometheus server.

    Args:
        port: of an HTTP server in threads of its own, which runs while the run does. 0 takes a free port, which
            ``port`` returns. None: no server; mount ``asgi_app()``, or use ``registry``. In a run of several processes
            each has a server: the first on a machine at ``port``, the next ones at the ports after it.
        host: the address it listens on; by default only this machine can reach it.
        labels: added to each sample, to tell apart several runs that one Prometheus server scrapes.
        require_port: a port that is not available fails the run. Otherwise SubscriberFailed and an error in the log
            report it, and the run continues without the server.

    Metric names are values of the label ``name``, so any name works. Values are those of the newest window, collected
    when a scrape asks for them: a step costs nothing, and a value between two scrapes is not seen. After the run the
    last values stay in ``registry``.

    Raises:
        ConfigurationError: prometheus_client is not installed, or an argument is invalid.
    """

    events = (
        *(RunStarted, RunResumed, StepsCompleted, EpochCompleted, EvalCompleted, AlertRaised, AlertResolved),
        *(CheckpointCommitted, CheckpointFailed, CheckpointSkipped),
    )

    per_host = True

    @checked
    def __init__(
        self,
        port: int | None = 9464,
        *,
        host: str = "127.0.0.1",
        labels: Mapping[str, str] | None = None,
        require_port: bool = False,
    ) -> None:
        require_installed(prometheus_client)
        if port is not None:
            require_count("PrometheusExporter", "port", port)
            if port > 65_535:
                raise ConfigurationError(f"PrometheusExporter(port={port!r}): port must be <= 65535.")
        _require_labels(labels)
        self._wanted_port = port
        self._host = host
        self._require_port = require_port
        self._collector = RunCollector(dict(labels or {}))
        self._loaded: PrometheusExporterState | None = None
        self._server: MetricsServer | None = None

    @property
    def registry(self) -> CollectorRegistry:
        """A registry of prometheus_client with only this exporter's metrics. Collecting never blocks; any thread."""
        return self._collector.registry

    @property
    def port(self) -> int | None:
        """The port that the server listens on; None while it is not running."""
        return self._server.port if self._server is not None else None

    def asgi_app(self) -> ASGIApp:
        """Returns an app for Starlette, FastAPI or any other ASGI server; it answers every path.

        In Starlette: ``Route("/metrics", exporter.asgi_app())``. An app that is mounted, there or in FastAPI by
        ``app.mount("/metrics", ...)``, answers at ``/metrics/``, to which ``/metrics`` is redirected.
        """
        return ASGIExposition(self.registry)

    async def start(self, run: RunContext) -> None:
        """Starts the server. Raises OSError if the port is not available and ``require_port`` is set."""
        before, loaded, self._loaded = self._collector.latest, self._loaded, None
        self._collector.latest = LatestEvents(
            run_id=run.run_id,
            run=run,
            step=before.step,
            checkpoints=before.checkpoints,
            alerts=dict.fromkeys(loaded.raised, 1) if loaded is not None else {},
        )
        if self._wanted_port is None:
            return
        name, port = self.name or "PrometheusExporter", self._wanted_port
        if port and run.process_count > 1:
            port = min(65_535, port + await in_own_thread(partial(place_on_machine, run, name)))
        listen = partial(MetricsServer, self.registry, self._host, port)
        try:
            self._server = await anyio.to_thread.run_sync(listen, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            text = (
                f"{name} cannot listen on {self._host} port {port}: {error.strerror or error}. This run "
                "cannot be scraped. Set another port; port=0 takes a free one."
            )
            if self._require_port:
                raise OSError(error.errno, text) from error
            logger.error("%s", text)
            run.publish(
                SubscriberFailed(step=run.start_step, subscriber=name, event_kind="start", error=text)
            )

    async def handle(self, event: Event) -> None:
        """Keeps the newest event of each kind, and counts checkpoints; returns at once."""
        latest = self._collector.latest
        match event:
            case StepsCompleted():
                latest.window, latest.step = event, event.last_step
            case RunStarted() | RunResumed():
                latest.step = event.step
            case EpochCompleted():
                latest.epoch = event
            case EvalCompleted():
                latest.evaluation = event
            case CheckpointCommitted() | CheckpointFailed() | CheckpointSkipped():
                result = event.kind.removeprefix("checkpoint_")
                latest.checkpoints = {**latest.checkpoints, result: latest.checkpoints[result] + 1}
                if isinstance(event, CheckpointCommitted):
                    latest.committed = event
            case AlertRaised():
                latest.alerts = {**latest.alerts, (event.name, event.severity): 1}
            case AlertResolved():  # at each severity
                latest.alerts = {
                    key: 0 if key[0] == event.name else raised for key, raised in latest.alerts.items()
                }
            case _:
                pass

    async def stop(self) -> None:
        """Keeps the last values and stops the server."""
        latest = self._collector.latest
        if latest.run is not None:
            latest.at_end = RunStatistics.of(latest.run)
            latest.run = None
        server, self._server = self._server, None
        if server is not None:
            await anyio.to_thread.run_sync(server.close, limiter=anyio.CapacityLimiter(1))

    def state_dict(self) -> dict[str, Any]:
        """Returns the alerts that are raised, which a resumed run does not raise again, as plain JSON data."""
        raised = [key for key, raised in self._collector.latest.alerts.items() if raised]
        return PrometheusExporterState(raised=raised).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Shows the saved alerts from ``start`` on.

        Raises:
            StateError: the state is of another version, or broken.
        """
        self._loaded = PrometheusExporterState.parse(self.name or "PrometheusExporter", state)


@dataclass(frozen=True)
class RunStatistics:
    """Statistics that a running run is asked for at each scrape."""

    hyperparams: Mapping[str, Number]
    loop: LoopStatistics
    subscriptions: Mapping[str, SubscriptionStatistics]

    @classmethod
    def of(cls, run: RunContext) -> RunStatistics:
        """Returns the current ones. Any thread; never blocks."""
        return cls(dict(run.control.hyperparams), run.loop_statistics(), run.statistics())


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
    """The only collector of ``registry``; adds ``labels`` to each sample. Collecting never blocks; any thread."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.latest = LatestEvents()
        self.registry: CollectorRegistry = prometheus_client.CollectorRegistry()
        self._labels = {name: escape_surrogates(value) for name, value in labels.items()}
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics; prometheus_client calls it for each scrape, on the thread of the scrape."""
        latest = self.latest
        run = latest.run
        statistics = RunStatistics.of(run) if run is not None else latest.at_end
        if latest.run_id:
            info = prometheus_core.InfoMetricFamily("eventtrain_run", "The run that is observed.")
            info.add_metric([], {**self._labels, "run_id": escape_surrogates(latest.run_id)})
            yield info
        yield from self._events(latest, run is not None)
        if statistics is not None:
            yield from self._statistics(statistics)

    def _events(self, latest: LatestEvents, is_running: bool) -> Iterator[Metric]:
        gauge, counter = partial(self._metric, "Gauge"), partial(self._metric, "Counter")
        yield gauge("running", "1 while a run is under way.", is_running)
        yield counter("steps", "Optimiser updates completed.", latest.step)
        if (window := latest.window) is not None:
            yield gauge("last_window_timestamp_seconds", "Time of the newest step.", window.time.timestamp())
            last = {name: column[-1].item() for name, column in window.metrics.items()}
            yield gauge("metric", "Of the newest step.", last, "name")
        if (epoch := latest.epoch) is not None:
            yield counter("epochs", "Epochs completed.", epoch.epoch + 1)
            yield gauge("epoch_duration_seconds", "Of the last epoch completed.", epoch.duration_s)
            yield gauge("epoch_metric", "Mean over the last epoch completed.", epoch.metrics, "name")
        if (evaluation := latest.evaluation) is not None:
            yield gauge("evaluation_metric", "Mean over the last evaluation.", evaluation.metrics, "name")
        yield counter("checkpoints", "Checkpoints by result.", latest.checkpoints, "result")
        if (committed := latest.committed) is not None:
            yield gauge("checkpoint_step", "Of the newest checkpoint.", committed.step)
            yield gauge("checkpoint_size_bytes", "Of the newest checkpoint.", committed.size_bytes)
            yield gauge(
                "checkpoint_duration_seconds", "Of writing the newest checkpoint.", committed.duration_s
            )
        yield gauge("alert", "1 while it is raised.", latest.alerts, "name", "severity")

    def _statistics(self, statistics: RunStatistics) -> Iterator[Metric]:
        yield self._metric("Gauge", "hyperparam", "The value in effect.", statistics.hyperparams, "name")
        loop = statistics.loop
        yield self._metric("Counter", "run_seconds", "Duration of the run.", loop.duration_s)
        parts = [one.name for one in fields(loop) if one.name.endswith("_s") and one.name != "duration_s"]
        seconds = {name.removesuffix("_s"): getattr(loop, name) for name in parts}
        yield self._metric("Counter", "loop_seconds", "Time of the training thread by part.", seconds, "part")
        for name, (kind, value_of, documentation) in SUBSCRIBER_METRICS.items():
            values = {owner: value_of(one) for owner, one in statistics.subscriptions.items()}
            yield self._metric(kind, f"subscriber_{name}", documentation, values, "subscriber")

    def _metric(
        self,
        kind: Kind,
        name: str,
        documentation: str,
        values: Number | Mapping[str, Number] | Mapping[tuple[str, ...], Number],
        *labels: str,
    ) -> Metric:
        """Returns a metric with one value, or with a value by that of its label, or those of its labels."""
        new_family = getattr(prometheus_core, f"{kind}MetricFamily")
        family = new_family(f"eventtrain_{name}", documentation, labels=[*self._labels, *labels])
        for key, value in (values if isinstance(values, Mapping) else {(): values}).items():
            given = (key,) if isinstance(key, str) else key
            family.add_metric([*self._labels.values(), *map(escape_surrogates, given)], float(value))
        return family


class ASGIExposition:
    """ASGI app that answers with the metrics, whatever the path. Not a function: Starlette's Route wraps those."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app: ASGIApp = prometheus_client.make_asgi_app(registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        await self._app(scope, receive, send)


class MetricsServer:
    """prometheus_client's HTTP server: a daemon thread for each connection. Creating and closing it block.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        server: Any  # which handler it has is not part of its type
        server, self._thread = prometheus_client.start_http_server(port, host, registry)
        handler = server.RequestHandlerClass
        server.RequestHandlerClass = type("Handler", (handler,), {"timeout": CLIENT_TIMEOUT_S})
        self._server = server
        self.port: int = server.server_port

    def close(self) -> None:
        """Frees the port. Does not wait for requests that are being answered."""
        with suppress(OSError):  # wakes the thread, which otherwise looks every 0.5 s whether it has to end
            self._server.socket.shutdown(SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _require_labels(labels: Any) -> None:
    """Raises ConfigurationError unless ``labels`` is a mapping from valid label names to text, or None."""
    if labels is not None and not isinstance(labels, Mapping):
        raise ConfigurationError(
            f"PrometheusExporter(labels={labels!r}): labels must be a dict from names to text."
        )
    for name, value in (labels or {}).items():
        if not isinstance(value, str):
            raise ConfigurationError(
                f"PrometheusExporter(labels=...): the value of {name!r} must be text, got {value!r}."
            )
        if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", name) or name in OWN_LABELS:
            raise ConfigurationError(
                f"PrometheusExporter(labels=...): a name must consist of letters, digits and _, must not begin with a "
                f"digit or __, and must not be one of {', '.join(sorted(OWN_LABELS))}; got {name!r}."
            )
