"""Alerts: raised once, resolved once, delivered over real HTTP, and silent about the URL."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

SECRET = "s3cr3t-t0ken"


class Target:
    """An HTTP server on loopback that answers what it is told to and remembers what it got."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        """What to answer next; 200 when used up."""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.hold = threading.Event()
        """Answers wait for it."""
        self.hold.set()
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                target.hold.wait(10)
                target.paths.append(self.path)
                target.headers.append(dict(self.headers))
                target.bodies.append(json.loads(body))
                status = target.statuses.pop(0) if target.statuses else 200
                self.send_response(status, f"because {SECRET}")
                if 300 <= status < 400:
                    self.send_header("Location", f"{target.url}/elsewhere?{SECRET}")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    target = Target()
    thread = threading.Thread(target=target.server.serve_forever, args=(0.01,))
    thread.start()
    yield target
    target.hold.set()
    target.server.shutdown()
    thread.join()
    target.server.server_close()


def fit(
    tmp_path: Path, alerts: subs.Alerts, losses: list[float], on: Callable[[et.Trainer], None] | None = None
) -> list[et.Event]:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    seen: list[et.Event] = []

    @trainer.on(et.AlertRaised | et.AlertResolved | et.SubscriberFailed)
    async def see(event: et.Event) -> None:
        seen.append(event)

    if on is not None:
        on(trainer)
    trainer.fit([np.float32(loss) for loss in losses], epochs=1)
    return seen


def brief(events: list[et.Event]) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in events]


def test_an_alert_is_raised_once_and_resolved_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = subs.Rule("loss", above=1.0, event=et.StepCompleted, severity="critical")
    seen = fit(tmp_path, subs.Alerts([rule]), [0.5, 2.0, 3.0, 1.0, 0.5, 9.0])
    assert brief(seen) == [("alert_raised", 2), ("alert_resolved", 4), ("alert_raised", 6)]
    raised = seen[0]
    assert isinstance(raised, et.AlertRaised)
    assert (raised.name, raised.severity, raised.metric, raised.value) == (
        "loss above 1",
        "critical",
        "loss",
        2.0,
    )
    assert raised.message == "loss = 2 at step 2 is above 1"
    records = [record for record in caplog.records if "loss above 1" in record.getMessage()]
    assert [record.levelno for record in records if record.levelno > logging.INFO] == [logging.CRITICAL] * 2


def test_the_non_finite_rule_sees_nan_and_infinity_and_the_others_do_not(tmp_path: Path) -> None:
    rules = [
        subs.Rule("loss", non_finite=True, event=et.StepCompleted),
        subs.Rule("loss", above=5.0, name="high", event=et.StepCompleted),
        subs.Rule("missing", below=5.0, event=et.StepCompleted),
    ]
    seen = fit(tmp_path, subs.Alerts(rules), [1.0, math.nan, math.inf, math.nan, 1.0])
    assert [(event.kind, event.step, event.name) for event in seen] == [  # type: ignore[attr-defined]
        ("alert_raised", 2, "loss not finite"),
        ("alert_raised", 3, "high"),
        ("alert_resolved", 5, "loss not finite"),
        ("alert_resolved", 5, "high"),
    ]


def test_epochs_are_judged_by_default_and_a_band_has_two_sides(tmp_path: Path) -> None:
    seen = fit(tmp_path, subs.Alerts([subs.Rule("loss", above=4.0, below=2.0)]), [0.0, 1.0])
    assert brief(seen) == [("alert_raised", 2)]


def test_each_alert_is_posted_as_the_stamped_events_json(tmp_path: Path, target: Target) -> None:
    alerts = subs.Alerts(
        [subs.Rule("loss", above=1.0, event=et.StepCompleted)], f"{target.url}/hook?token={SECRET}"
    )
    seen = fit(tmp_path, alerts, [2.0, 0.5, 3.0])
    assert [et.parse_event(body) for body in target.bodies] == seen
    assert all(body["seq"] > 0 and body["run_id"] for body in target.bodies)
    assert target.paths == [f"/hook?token={SECRET}"] * 3
    assert target.headers[0]["Content-Type"] == "application/json"


def test_userinfo_becomes_basic_authentication(tmp_path: Path, target: Target) -> None:
    url = target.url.replace("http://", "http://me:p%40ss@")
    fit(tmp_path, subs.Alerts([subs.Rule("loss", above=1.0)], url), [2.0])
    assert target.headers[0]["Authorization"] == "Basic bWU6cEBzcw=="
    assert "p%40ss" not in target.headers[0]["Host"]


def test_a_busy_server_is_tried_again(tmp_path: Path, target: Target) -> None:
    target.statuses = [503, 429]
    alerts = subs.Alerts([subs.Rule("loss", above=1.0)], target.url, retry_delay_s=0.01)
    seen = fit(tmp_path, alerts, [2.0])
    assert len(target.bodies) == 3
    assert brief(seen) == [("alert_raised", 1)]


@pytest.mark.parametrize(
    ("statuses", "tries", "said"),
    [
        ([404], 1, "404"),
        ([302], 1, "302; redirects are not followed"),
        ([500, 500, 500], 3, "500, at attempt 3"),
    ],
)
def test_what_cannot_be_delivered_is_said(
    tmp_path: Path, target: Target, statuses: list[int], tries: int, said: str
) -> None:
    target.statuses = statuses
    alerts = subs.Alerts(
        [subs.Rule("loss", above=1.0)], f"{target.url}/{SECRET}", label="ops", retries=2, retry_delay_s=0.01
    )
    seen = fit(tmp_path, alerts, [2.0])
    assert len(target.bodies) == tries
    failed = seen[-1]
    assert isinstance(failed, et.SubscriberFailed)
    assert (failed.subscriber, failed.event_kind) == ("Alerts", "alert_raised")
    assert "ops" in failed.error
    assert said in failed.error


def test_a_slow_server_delays_no_step(tmp_path: Path, target: Target) -> None:
    target.hold.clear()
    bodies_at_the_last_step: list[int] = []

    def watch(trainer: et.Trainer) -> None:
        @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 200)
        async def last(event: et.StepCompleted) -> None:
            bodies_at_the_last_step.append(len(target.bodies))
            target.hold.set()

    alerts = subs.Alerts([subs.Rule("loss", above=1.0, event=et.StepCompleted)], target.url)
    fit(tmp_path, alerts, [2.0] * 200, watch)
    assert bodies_at_the_last_step == [0]
    assert len(target.bodies) == 1


@pytest.mark.parametrize("status", [200, 302, 404, 503])
@pytest.mark.parametrize("place", ["query", "path", "userinfo", "host", "dead"])
def test_the_secret_is_shown_nowhere(
    tmp_path: Path, target: Target, place: str, status: int, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    target.statuses = [status] * 2
    host = target.url.removeprefix("http://")
    url = {
        "query": f"http://{host}/x?key={SECRET}",
        "path": f"http://{host}/{SECRET}/y",
        "userinfo": f"http://{SECRET}:{SECRET}@{host}/",
        "host": f"http://{SECRET}.invalid/",
        "dead": f"http://127.0.0.1:9/{SECRET}\n",
    }[place]
    alerts = subs.Alerts([subs.Rule("loss", above=1.0)], url, retries=1, retry_delay_s=0.01, timeout_s=2)
    seen = fit(tmp_path, alerts, [2.0])
    shown = [repr(alerts), str(vars(alerts)), repr(alerts.state_dict()), caplog.text, *capfd.readouterr()]
    shown += [event.model_dump_json() for event in seen]
    shown += [record.exc_text or "" for record in caplog.records]
    shown += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize(
    "url", [f"ftp://{SECRET}/", f"{SECRET}", f"http://[{SECRET}", f"http://h:{SECRET}/", "http:///x"]
)
def test_what_is_no_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Alerts([subs.Rule("loss", above=1.0)], url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"above": math.nan},
        {"above": 1, "below": 2},
        {"above": 1, "severity": "bad"},
        {"above": 1, "event": et.Event},
    ],
)
def test_rules_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match="'loss'"):
        subs.Rule("loss", **options)


def test_rules_need_names_of_their_own() -> None:
    with pytest.raises(et.ConfigurationError, match="loss above 1"):
        subs.Alerts([subs.Rule("loss", above=1.0), subs.Rule("loss", above=1.0)])
    with pytest.raises(et.ConfigurationError, match="at least one"):
        subs.Alerts([])


def test_a_resumed_run_does_not_raise_what_is_raised(tmp_path: Path) -> None:
    rule = subs.Rule("loss", above=1.0, event=et.StepCompleted)
    first, second = subs.Alerts([rule]), subs.Alerts([rule])
    assert brief(fit(tmp_path, first, [2.0])) == [("alert_raised", 1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert brief(fit(tmp_path, second, [2.0, 0.5])) == [("alert_resolved", 2)]


async def test_it_works_beside_any_event_loop(tmp_path: Path, target: Target) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    alerts = subs.Alerts([subs.Rule("loss", above=1.0, event=et.StepCompleted)], target.url)
    trainer = et.Trainer(step, {"w": jnp.zeros(1)}, subscribers=[alerts], run_dir=tmp_path)
    with anyio.fail_after(20):
        await trainer.fit_async([np.float32(2), np.float32(0)], epochs=1)
    assert [body["kind"] for body in target.bodies] == ["alert_raised", "alert_resolved"]
