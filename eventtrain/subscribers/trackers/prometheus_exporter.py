"""``PrometheusExporter``: shows a running run to a Prometheus server that scrapes it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread

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
from eventtrain.subscribers._shared.optional_imports import import_optional, require_installed
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_count
from eventtrain.subscribers.base import RunContext, Subscriber

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from eventtrain.subscribers.trackers.prometheus_metrics import ASGIApp, MetricsServer, RunCollector

prometheus_metrics = import_optional(
    "eventtrain.subscribers.trackers.prometheus_metrics", extra="prometheus", used_by="PrometheusExporter"
)

logger = logging.getLogger("eventtrain")

OWN_LABELS = frozenset({"name", "part", "result", "run_id", "severity", "subscriber"})
"""Labels of the exporter's own metrics."""


class PrometheusExporterState(SavedState):
    """State saved with checkpoints: name and severity of each alert that is raised."""

    version: Literal[1] = 1
    raised: list[tuple[str, str]]


class PrometheusExporter(Subscriber):
    """Shows metrics, hyperparameters, checkpoints, alerts and statistics of loop and bus to a Prometheus server.

    Args:
        port: of an HTTP server in threads of its own, which runs while the run does. 0 takes a free port, which
            ``port`` returns. None: no server; mount ``asgi_app()``, or use ``registry``.
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

    def __init__(
        self,
        port: int | None = 9464,
        *,
        host: str = "127.0.0.1",
        labels: Mapping[str, str] | None = None,
        require_port: bool = False,
    ) -> None:
        require_installed(prometheus_metrics)
        if port is not None:
            require_count("PrometheusExporter", "port", port)
            if port > 65_535:
                raise ConfigurationError(f"PrometheusExporter(port={port!r}): port must be <= 65535.")
        _require_labels(labels)
        self._wanted_port = port
        self._host = host
        self._require_port = require_port
        self._collector: RunCollector = prometheus_metrics.RunCollector(dict(labels or {}))
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
        return prometheus_metrics.ASGIExposition(self.registry)

    async def start(self, run: RunContext) -> None:
        """Starts the server. Raises OSError if the port is not available and ``require_port`` is set."""
        before, loaded, self._loaded = self._collector.latest, self._loaded, None
        self._collector.latest = prometheus_metrics.LatestEvents(
            run_id=run.run_id,
            run=run,
            step=before.step,
            checkpoints=before.checkpoints,
            alerts=dict.fromkeys(loaded.raised, 1) if loaded is not None else {},
        )
        if self._wanted_port is None:
            return
        listen = partial(prometheus_metrics.MetricsServer, self.registry, self._host, self._wanted_port)
        try:
            self._server = await anyio.to_thread.run_sync(listen, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            name = self.name or "PrometheusExporter"
            text = (
                f"{name} cannot listen on {self._host} port {self._wanted_port}: {error.strerror or error}. This run "
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
            case CheckpointCommitted():
                latest.committed = event
                self._count("committed")
            case CheckpointFailed():
                self._count("failed")
            case CheckpointSkipped():
                self._count("skipped")
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
            latest.at_end = prometheus_metrics.RunStatistics.of(latest.run)
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

    def _count(self, result: str) -> None:
        latest = self._collector.latest
        latest.checkpoints = {**latest.checkpoints, result: latest.checkpoints[result] + 1}


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
