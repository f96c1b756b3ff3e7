"""``Dashboard``: shows a running run in a browser, and steers it from there."""

from __future__ import annotations

import logging
import sys
import threading
import webbrowser
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from eventtrain.control.issue import issue
from eventtrain.errors import CommandRejectedError, ConfigurationError
from eventtrain.events import ActionRequested, Event, SubscriberFailed
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.dashboard.frames import Frames, ShownRun
from eventtrain.subscribers.dashboard.guard import LOOPBACK, ASGIApp, Guard, Tokens, is_loopback
from eventtrain.subscribers.dashboard.observed_run import OBSERVED, ObservedRun
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

app = import_optional("eventtrain.subscribers.dashboard.app", extra="dashboard", used_by="Dashboard")
server = import_optional("eventtrain.subscribers.dashboard.server", extra="dashboard", used_by="Dashboard")

logger = logging.getLogger("eventtrain")

MOST_RUNS = 16
"""Runs that are shown; of more, the oldest ones that have ended are forgotten."""
SOURCE = "dashboard"
"""Source of each command that a page sends."""


class Dashboard(Subscriber):
    """Shows a run on a web page, with buttons to steer it.

    The page has the curves of all metrics, the hyperparameters and who changed them, alerts, checkpoints, the figures
    of each subscriber, the machine (if ``DeviceStats`` is subscribed too), and the log of commands with the step at
    which each took effect.

    Args:
        port: on which its own server listens, in a thread, from the first ``start`` until ``close()`` or the end of
            the process; 0 takes a free one. None: no server; mount ``asgi_app()``.
        host: the address it listens on; by default only this machine can reach it.
        token: permits watching and steering; at least 16 letters, digits or ``-_.~``. None: 32 random bytes. With
            the same port and token, an open page continues after the process was started again.
        control: whether the page may steer.
        open: also open the page in a browser of this machine. Its command line has the URL, which other users of this
            machine can see.
        actions: buttons of your own, name -> what it does. Pressing one publishes ``ActionRequested(name)``, to be
            handled by ``trainer.on(et.ActionRequested)``.

    ``start`` writes one line with the URL to stderr. The token is in its fragment, which browsers send to no server. A
    port in use is reported by SubscriberFailed and in the log, and the run continues without a server.

    A step costs nothing, since windows are collected, and a page gets at most 1,024 points a curve. Readers share what
    is sent; one that does not read is skipped. A run that resumes has the curves of the whole run.

    Raises:
        ConfigurationError: starlette or uvicorn is missing, an argument is invalid, or other machines could reach
            ``host`` and no token was given.
    """

    events = OBSERVED

    @checked
    def __init__(
        self,
        port: int | None = 0,
        *,
        host: str = "127.0.0.1",
        token: str | None = None,
        control: bool = True,
        open: bool = False,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        require_installed(app)
        require_installed(server)
        tokens = Tokens.given(token, "Dashboard(token=...): token")
        if port is not None:
            require_count("Dashboard", "port", port)
            if port > 65_535:
                raise ConfigurationError(f"Dashboard(port={port!r}): port must be <= 65535.")
        _require_actions(actions)
        if token is None and not is_loopback(host):
            raise ConfigurationError(
                f"Dashboard(host={host!r}): other machines may reach this address. Pass a token of your own, or keep "
                "host='127.0.0.1' and forward the port with ssh -L."
            )
        self._port = port
        self._host = host
        self._open = open
        self._tokens = tokens
        self._runs: dict[str, ShownRun] = {}
        self._contexts: dict[str, RunContext] = {}
        self._run: ShownRun | None = None
        self._loaded: ObservedRun | None = None
        self._server: Any = None
        self._closed = threading.Event()
        self._steering = _Steering(self._contexts, dict(actions or {})) if control else None
        self._frames = Frames(lambda: list(self._runs.values()))

    @property
    def url(self) -> str | None:
        """The address of the page, with the token that permits steering; None while no server runs."""
        return self._url(self._tokens.control)

    @property
    def read_only_url(self) -> str | None:
        """The address of the page, with a token that permits watching only; None while no server runs."""
        return self._url(self._tokens.read)

    @property
    def token(self) -> str:
        """The token that permits steering."""
        return self._tokens.control

    @property
    def read_only_token(self) -> str:
        """The token that permits watching only."""
        return self._tokens.read

    def asgi_app(self, *, hosts: Collection[str] = LOOPBACK) -> ASGIApp:
        """Returns the page as an app, to be mounted in Starlette, FastAPI or any other ASGI server.

        In Starlette: ``Mount("/dashboard", dashboard.asgi_app())``; the page is at ``/dashboard/#token=...``.

        Args:
            hosts: names under which the service is reached, without a port. Requests with another Host header are
                refused, because a page of another site may have sent them.
        """
        return Guard(
            app.make_app(self._frames, self._steering, self._closed.is_set), self._tokens, hosts=hosts
        )

    async def start(self, run: RunContext) -> None:
        """Shows the run, and starts the server if it does not run yet."""
        loaded, self._loaded = self._loaded, None
        known = self._runs.get(run.run_id)
        observed = (
            loaded or (known.observed if known is not None and not run.restarts else None) or ObservedRun()
        )
        observed.run_id = run.run_id
        observed.begin(
            first_step=run.start_step,
            attempt=run.attempt,
            target_step=None if run.total_steps is None else run.start_step + run.total_steps,
            target_epoch=None if run.epochs is None else run.start_epoch + run.epochs,
        )
        shown = ShownRun(run.run_dir.name or run.run_id, observed, _Live(run), self._steering is not None)
        self._contexts[run.run_id] = run
        self._runs = {**{key: one for key, one in self._runs.items() if key != run.run_id}, run.run_id: shown}
        ended = [key for key, one in self._runs.items() if one.live is None]
        for key in ended[: max(0, len(self._runs) - MOST_RUNS)]:
            del self._runs[key]
            self._contexts.pop(key, None)
        self._run = shown
        if self._port is not None and not self._closed.is_set():
            await in_own_thread(partial(self._serve, run))

    async def handle(self, event: Event) -> None:
        """Adds an event to what is shown; returns at once."""
        run = self._run
        if run is not None:
            run.add(event)

    async def stop(self) -> None:
        """Keeps the last figures. The server stays, so that the page can still be read."""
        run, self._run = self._run, None
        if run is not None:
            run.read_figures(at_once=True)
            run.live, run.can_control = None, False
            with run.up_to_date():
                pass  # the last events, too

    def close(self) -> None:
        """Ends the server and all connections, for good. Any thread; blocks for two seconds at most."""
        self._closed.set()
        serving, self._server = self._server, None
        if serving is not None:
            serving.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is shown of the run, as plain JSON data."""
        if self._run is None:
            return ObservedRun().to_json()
        with self._run.up_to_date() as observed:
            return observed.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with what was shown. Raises StateError for another version or invalid data."""
        self._loaded = ObservedRun.parse(self.name or "Dashboard", state)

    def _serve(self, run: RunContext) -> None:
        """Starts the server. Blocks; in a thread of its own."""
        if self._server is not None and self._server.is_alive:
            return
        try:
            self._server = server.serve(
                self._frames, self._steering, self._tokens, self._host, self._port or 0, self._closed.is_set
            )
        except OSError as error:
            name = self.name or "Dashboard"
            text = (
                f"{name} cannot listen on {self._host} port {self._port}: {error.strerror or error}. This run is shown "
                "on no page. Set another port; port=0 takes a free one."
            )
            logger.error("%s", text)
            failed = SubscriberFailed(step=run.start_step, subscriber=name, event_kind="start", error=text)
            run.publish_blocking(failed, give_up=self._closed.is_set)
            return
        sys.stderr.write(f"Dashboard: {self.url}\n")  # and not the log, which must not contain the token
        sys.stderr.flush()
        if self._open and self.url is not None:
            threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()

    def _url(self, token: str) -> str | None:
        serving = self._server
        return serving.url(token) if serving is not None else None


class _Live:
    """A run in progress, as the page asks for it."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.loop_statistics = run.loop_statistics
        self.statistics = run.statistics

    def hyperparams(self) -> Mapping[str, Number]:
        return self._run.control.hyperparams

    def sample_names(self) -> tuple[str, ...]:
        return self._run.sample_names


class _Steering:
    """Sends commands to the runs in progress."""

    def __init__(self, runs: Mapping[str, RunContext], actions: Mapping[str, str]) -> None:
        self._runs = runs
        self.actions = actions

    async def send(self, run: str, command: Any) -> int:
        sent = issue(self._context(run).control.with_source(SOURCE), command)
        return (await sent.result()).step

    def request(self, run: str, action: str) -> None:
        context = self._context(run)
        if action not in self.actions:
            raise CommandRejectedError("There is no such action.", reason="there is no such action")
        context.publish(ActionRequested(step=context.control.step, name=action))

    def _context(self, run: str) -> RunContext:
        context = self._runs.get(run)
        if context is None:
            raise CommandRejectedError("There is no such run.", reason="there is no such run")
        return context


def _require_actions(actions: Any) -> None:
    for name, text in (actions or {}).items():
        if not isinstance(name, str) or not isinstance(text, str) or not 0 < len(name) <= 100:
            raise ConfigurationError(
                "Dashboard(actions=...): actions must be a dict from names of buttons, at most 100 characters, to "
                f"texts that say what they do; got {name!r}: {text!r}."
            )
