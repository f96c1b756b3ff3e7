"""``PrometheusExporter``: what a run is doing, for a Prometheus server that asks every now and then."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
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
    RunResumed,
    RunStarted,
    StepsCompleted,
    SubscriberFailed,
)
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_count
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers.prometheus_values import Figures, Seen

try:
    from eventtrain.subscribers.trackers import prometheus_metrics as prometheus_families
    from eventtrain.subscribers.trackers import prometheus_server as prometheus_http
except ModuleNotFoundError:
    prometheus_families = prometheus_http = None

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from eventtrain.subscribers.trackers.prometheus_server import ASGIApp, MetricsServer

logger = logging.getLogger("eventtrain")

OWN_LABELS = frozenset({"name", "part", "result", "run_id", "severity", "subscriber"})
"""Labels that one of the user's would clash with."""


class RaisedAlerts(SavedState):
    """What survives a restart: name and severity of each alert that is raised."""

    version: Literal[1] = 1
    raised: list[tuple[str, str]]


class PrometheusExporter(Subscriber):
    """Shows metrics, hyperparameters, checkpoints, alerts and what loop and bus did to whoever scrapes it.

    Args:
        port: of an HTTP server in threads of its own, there while the run lasts. 0 takes a free one, which ``port``
            tells. None: no server; mount ``asgi_app()``, or use ``registry``.
        host: the address it listens on; unless given, only this machine can reach it.
        labels: of every sample, in case one Prometheus server scrapes several runs.
        require_port: a port that cannot be had fails the run. Else that is said by SubscriberFailed and an error in the
            log, and the run goes on without the server.

    Names of metrics are values of the label ``name``, so any name will do. Values are those of the newest window, put
    together when somebody asks: a step costs nothing, and a value between two scrapes is not seen. After the run the
    last values stay in ``registry``.

    Raises:
        ConfigurationError: prometheus_client is missing, or an argument cannot work.
    """

    def __init__(
        self,
        port: int | None = 9464,
        *,
        host: str = "127.0.0.1",
        labels: Mapping[str, str] | None = None,
        require_port: bool = False,
    ) -> None:
        if prometheus_families is None or prometheus_http is None:
            raise ConfigurationError(
                "PrometheusExporter needs prometheus_client. Install it: pip install 'eventtrain[prometheus]'."
            )
        if port is not None:
            require_count("PrometheusExporter", "port", port)
            if port > 65_535:
                raise ConfigurationError(f"PrometheusExporter(port={port!r}): there are ports up to 65535.")
        if labels is not None and not isinstance(labels, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"PrometheusExporter(labels={labels!r}): needs names and values.")
        self._labels = dict(labels or {})
        for name, value in self._labels.items():
            if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"PrometheusExporter(labels=...): {name!r} is {value!r}, and values of labels are text."
                )
            if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", name) or name in OWN_LABELS:
                raise ConfigurationError(
                    f"PrometheusExporter(labels=...): {name!r} is no name for a label, which is made of letters, "
                    f"digits and _, or it is one of its own: {', '.join(sorted(OWN_LABELS))}."
                )
        self._wanted_port = port
        self._host = host
        self._require_port = require_port
        self._seen = Seen()
        self._loaded: RaisedAlerts | None = None
        self._server: MetricsServer | None = None
        self._families = prometheus_families.families
        self._exposition = prometheus_http.Exposition(self._collect)

    @property
    def registry(self) -> CollectorRegistry:
        """prometheus_client's, with nothing but what this exporter shows. Collecting never blocks; any thread."""
        return self._exposition.registry

    @property
    def port(self) -> int | None:
        """The port that the server listens on; None while there is none."""
        return self._server.port if self._server is not None else None

    def asgi_app(self) -> ASGIApp:
        """An app for Starlette, FastAPI or any other ASGI server; it answers whatever the path is.

        Starlette takes ``Route("/metrics", exporter.asgi_app())``. What is mounted, there or in FastAPI by
        ``app.mount("/metrics", ...)``, answers at ``/metrics/``, to which ``/metrics`` is redirected.
        """
        return self._exposition.asgi_app()

    async def start(self, run: RunContext) -> None:
        """Listen. Raises OSError where the port cannot be had and ``require_port`` is set."""
        before, loaded, self._loaded = self._seen, self._loaded, None
        alerts = dict.fromkeys(loaded.raised, 1) if loaded is not None else {}
        self._seen = Seen(run.run_id, run, before.step, checkpoints=before.checkpoints, alerts=alerts)
        if self._wanted_port is None:
            return
        try:
            self._server = await anyio.to_thread.run_sync(
                self._exposition.listen,
                self._host,
                self._wanted_port,
                limiter=anyio.CapacityLimiter(1),
            )
        except OSError as error:
            name = self.name or "PrometheusExporter"
            text = (
                f"{name} cannot listen on {self._host} port {self._wanted_port}: {error.strerror or error}. Nobody can "
                "scrape this run. Give it another port; 0 takes a free one."
            )
            if self._require_port:
                raise OSError(error.errno, text) from error
            logger.error("%s", text)
            run.publish(
                SubscriberFailed(step=run.start_step, subscriber=name, event_kind="start", error=text)
            )

    async def on_run_started(self, event: RunStarted) -> None:
        """Take its step in."""
        self._seen.step = event.step

    async def on_run_resumed(self, event: RunResumed) -> None:
        """Take its step in."""
        self._seen.step = event.step

    async def on_steps_completed(self, event: StepsCompleted) -> None:
        """Keep the newest."""
        self._seen.window = event
        self._seen.step = event.last_step

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Keep the newest."""
        self._seen.epoch = event

    async def on_eval_completed(self, event: EvalCompleted) -> None:
        """Keep the newest."""
        self._seen.evaluation = event

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Keep the newest, and count."""
        self._seen.committed = event
        self._count("committed")

    async def on_checkpoint_failed(self, event: CheckpointFailed) -> None:
        """Count."""
        self._count("failed")

    async def on_checkpoint_skipped(self, event: CheckpointSkipped) -> None:
        """Count."""
        self._count("skipped")

    async def on_alert_raised(self, event: AlertRaised) -> None:
        """Take it in."""
        self._seen.alerts = {**self._seen.alerts, (event.name, event.severity): 1}

    async def on_alert_resolved(self, event: AlertResolved) -> None:
        """Take it in, whatever its severity was."""
        self._seen.alerts = {
            key: 0 if key[0] == event.name else raised for key, raised in self._seen.alerts.items()
        }

    async def stop(self) -> None:
        """Keep the last values, and free the port."""
        seen = self._seen
        if seen.run is not None:
            seen.at_end = Figures.of(seen.run)
            seen.run = None
        server, self._server = self._server, None
        if server is not None:
            await anyio.to_thread.run_sync(server.close, limiter=anyio.CapacityLimiter(1))

    def state_dict(self) -> dict[str, Any]:
        """The alerts that are raised, which a run that resumes does not raise again, as plain JSON data."""
        return RaisedAlerts(raised=[key for key, raised in self._seen.alerts.items() if raised]).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Show them from ``start`` on. Raises StateError where that is another version, or broken."""
        self._loaded = RaisedAlerts.parse(self.name or "PrometheusExporter", state)

    def _count(self, result: str) -> None:
        counts = self._seen.checkpoints
        self._seen.checkpoints = {**counts, result: counts[result] + 1}

    def _collect(self) -> Iterator[Metric]:
        return self._families(self._seen, self._labels)
