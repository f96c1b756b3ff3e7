"""Dashboard: a run is watched and steered over real HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.dashboard import dashboard as dashboard_module
from eventtrain.validation.optional_imports import MissingModule
from tests.support.dashboards import TOKEN, Client, Training, wait_until, watched
from tests.support.models import batches, new_state, step_fn

VENDOR = Path(dashboard_module.__file__).parent / "page" / "vendor"


def fit(trainer: et.Trainer[Any], steps: int = 3) -> None:
    trainer.fit(batches(steps), epochs=1, progress=False)


def test_a_rate_set_on_the_page_holds_from_the_step_that_the_answer_names(tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN)) as (training, client, run):
        answer = client.command(
            run, kind="set_hyperparam", name="learning_rate", value=0.125, reason="by hand"
        )
        assert answer.status_code == 200, answer.text
        step = answer.json()["step"]
        wait_until(lambda: len(training.steps) > step + 5)
        assert (training.steps[step - 1], training.steps[step]) == (np.float32(0.05), 0.125)
        for frame in client.frames():
            shown = frame.get("runs", {}).get(run, {})
            if shown.get("changes"):
                break
        (change,) = shown["changes"]
        assert (change["step"], change["new"], change["by"], change["reason"]) == (
            step,
            0.125,
            "dashboard",
            "by hand",
        )
        (command,) = shown["commands"]
        assert (command["text"], command["step"]) == ("learning_rate = 0.125", step)


def test_a_paused_run_makes_no_step_and_shows_that_until_it_is_resumed(tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN)) as (training, client, run):
        paused_at = client.command(run, kind="pause").json()["step"]
        frames = client.frames()
        wait_until(
            lambda: next(frames).get("runs", {}).get(run, {}).get("status", {}).get("state") == "paused"
        )
        time.sleep(0.2)
        assert training.trainer.step == paused_at
        assert client.command(run, kind="resume").status_code == 200
        wait_until(lambda: training.trainer.step > paused_at)


def test_newest_steps_figures_and_curves_arrive_while_the_run_goes_on(tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN, actions={"Render": "Draws"})) as (
        training,
        client,
        run,
    ):
        frames = client.frames()
        hello = next(frames)
        assert hello["control"] is True
        assert hello["actions"] == {"Render": "Draws"}
        sections: dict[str, Any] = {}
        for frame in frames:
            sections |= frame["runs"].get(run, {})
            if sections.get("subscribers") and sections["status"]["epochs_completed"]:
                break
        assert sections["title"] == tmp_path.name
        assert sections["values"] == {"learning_rate": pytest.approx(0.05)}
        assert sections["can_control"] is True
        assert "Dashboard" in [row["name"] for row in sections["subscribers"]]
        assert sections["loop"]["duration_s"] > 0
        assert training.trainer.step - sections["status"]["step"] < 2000


def test_commands_that_cannot_work_are_answered_with_the_reason(tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN)) as (_, client, run):
        unknown = client.command(run, kind="set_hyperparam", name="nope", value=1)
        assert (unknown.status_code, "learning_rate" in unknown.json()["error"]) == (409, True)
        huge = client.command(run, kind="set_hyperparam", name="learning_rate", value=10**400)
        assert huge.status_code in (409, 422)
        gone = client.command("another run", kind="pause")
        assert (gone.status_code, gone.json()["error"]) == (409, "there is no such run")
        for wrong in (
            {"kind": "launch"},
            {"kind": "set_hyperparam", "name": "learning_rate"},
            {"kind": "set_hyperparam", "name": "learning_rate", "value": "NaN"},
            {"kind": "stop", "due": 3},
            {"kind": "stop", "source": "NATS"},
            {"kind": "pause", "more": 1},
        ):
            assert client.command(run, **wrong).status_code == 422
        for content in (b"", b"[]", b"\xff", b"[" * 20_000, b'{"run": 1, "command": {"kind": "pause"}}'):
            answer = client.http.post(
                "/api/commands", content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 422, answer.text
        assert client.http.get("/api/commands").status_code == 405
        assert client.http.get("/api/nothing").status_code == 404
        assert client.http.get("/../dashboard.py").status_code == 404


def test_a_request_of_another_site_changes_nothing(tmp_path: Path) -> None:
    with watched(tmp_path, subs.Dashboard(token=TOKEN)) as (training, client, run):
        command = {"kind": "set_hyperparam", "name": "learning_rate", "value": 9}
        body = json.dumps({"run": run, "command": command})
        for headers, status in (
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
            ({"Content-Type": "application/json", "Host": "evil.example"}, 421),
            ({"Content-Type": "application/json", "Authorization": "Bearer wrong"}, 401),
        ):
            answer = client.http.post("/api/commands", content=body, headers=headers)
            assert answer.status_code == status, answer.text
        assert training.trainer.control.hyperparams["learning_rate"] == np.float32(0.05)


def test_the_read_only_token_watches_and_does_not_steer(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN)
    with watched(tmp_path, dashboard) as (training, _, run):
        assert dashboard.read_only_url is not None
        reader = Client(dashboard, dashboard.read_only_url.partition("token=")[2])
        with reader.http:
            assert next(reader.frames())["control"] is False
            assert reader.command(run, kind="stop").status_code == 403
        assert training.result is None


def test_without_control_nothing_can_be_steered(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN, control=False)
    with watched(tmp_path, dashboard) as (_, client, run):
        assert next(client.frames())["control"] is False
        assert client.command(run, kind="stop").status_code == 403


def test_an_action_is_an_event_of_the_run(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN, actions={"Render": "Draws"})
    found: list[et.ActionRequested] = []
    with watched(tmp_path, dashboard) as (training, client, run):
        training.trainer.on(et.ActionRequested)(found.append)
        assert client.http.post("/api/actions", json={"run": run, "action": "Render"}).status_code == 200
        assert client.http.post("/api/actions", json={"run": run, "action": "rm"}).status_code == 409
        wait_until(lambda: found)
    assert [(event.name, event.run_id) for event in found] == [("Render", run)]


def test_a_port_in_use_is_reported_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dashboard = subs.Dashboard(port)
        trainer = et.Trainer(step_fn, new_state(), subscribers=[dashboard], run_dir=tmp_path)
        failures: list[et.SubscriberFailed] = []
        trainer.on(et.SubscriberFailed)(failures.append)
        fit(trainer)
    assert trainer.step == 3
    assert dashboard.url is None
    assert str(port) in failures[0].error
    assert "port=0 takes a free one" in caplog.text


def test_the_server_outlives_the_run_and_serves_the_next_one(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN)
    trainer = et.Trainer(step_fn, new_state(), subscribers=[dashboard], run_dir=tmp_path)
    try:
        fit(trainer)
        url = dashboard.url
        client = Client(dashboard)
        frames = client.frames()
        next(frames)
        (shown,) = next(frames)["runs"].values()
        assert (shown["status"]["state"], shown["status"]["step"]) == ("completed", 3)
        assert shown["can_control"] is False
        fit(trainer)
        assert dashboard.url == url
        second = wait_until(lambda: next(frames)["runs"])
        while not any(one.get("status", {}).get("step") == 6 for one in second.values()):
            second = next(frames)["runs"]
        client.http.close()
    finally:
        dashboard.close()
    assert dashboard.url is None
    assert not [thread for thread in threading.enumerate() if thread.name == "eventtrain-dashboard"]
    port = int(re.findall(r":(\d+)/", url or "")[0])
    socket.create_server(("127.0.0.1", port)).close()  # the port is free again
    fit(trainer)  # and a closed dashboard does not come back
    assert dashboard.url is None


def test_readers_that_do_not_read_hold_up_neither_others_nor_the_end(tmp_path: Path) -> None:
    dashboard = subs.Dashboard(token=TOKEN)
    with watched(tmp_path, dashboard) as (training, client, run):
        port = client.http.base_url.port
        request = f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
        dead = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        for connection in dead:
            connection.sendall(request.encode())
        frames = client.frames()
        next(frames)
        step = training.trainer.step
        wait_until(
            lambda: next(frames).get("runs", {}).get(run, {}).get("status", {}).get("step", 0) > step + 100
        )
    began_s = time.monotonic()
    dashboard.close()
    assert time.monotonic() - began_s < 3
    for connection in dead:
        connection.close()


def test_the_token_is_in_the_line_on_stderr_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    dashboard = subs.Dashboard()
    log = subs.JSONLLogger("events.jsonl", events=et.Event)
    token = dashboard.token
    assert len(token) >= 43
    with Training(tmp_path, dashboard, log) as training:
        client = Client(dashboard, token)
        with client.http:
            run = client.run_id()
            client.command(run, kind="set_hyperparam", name="learning_rate", value=0.5)
            client.command(run, kind="set_hyperparam", name="nope", value=0.5)
            client.http.get("/api/stream", headers={"Authorization": "Bearer wrong"})
            page = client.http.get("/")
        state = dashboard.state_dict()
        assert token not in repr(dashboard) + repr(vars(dashboard)) + str(state) + page.text + str(
            page.headers
        )
    dashboard.close()
    assert training.result is not None
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()
    assert token not in caplog.text
    out, err = capfd.readouterr()
    assert token not in out
    assert err.count(token) == 1
    assert re.search(rf"^Dashboard: http://127\.0\.0\.1:\d+/#token={re.escape(token)}$", err, re.MULTILINE)


def test_a_run_that_resumes_has_the_curves_of_the_whole_run(tmp_path: Path) -> None:
    def train(steps: int) -> subs.Dashboard:
        dashboard = subs.Dashboard(None, token=TOKEN)
        subscribers = [dashboard, subs.Checkpointer("checkpoints", every=5)]
        trainer = et.Trainer(step_fn, new_state(), subscribers=subscribers, run_dir=tmp_path, run_id="r")
        trainer.fit(batches(10), steps=steps, resume=True, progress=False)
        return dashboard

    train(10)
    shown = train(20)._runs["r"].observed  # pyright: ignore[reportPrivateUsage]
    assert shown.status.step == 20
    assert shown.status.total_steps == 20
    assert shown.series.steps["loss"].points().steps.tolist() == list(range(1, 21))
    assert "resumed from" in shown.notices[0].text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"host": "0.0.0.0"}, "other machines may reach"),
        ({"host": "192.0.2.1"}, "Pass a token"),
        ({"token": "short"}, "at least 16 characters"),
        ({"token": ""}, "at least 16 characters"),
        ({"token": "with spaces in it, and more"}, "at least 16 characters"),
        ({"token": 1234567890123456}, "at least 16 characters"),
        ({"port": 70_000}, "port must be <= 65535"),
        ({"port": -1}, "port must be an integer >= 0"),
        ({"actions": {"": "x"}}, "names of buttons"),
        ({"actions": {"x": 3}}, "actions"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(et.ConfigurationError, match=match) as raised:
        subs.Dashboard(**arguments)
    assert "1234567890123456" not in str(raised.value)


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("no", name="uvicorn"), "dashboard", "Dashboard")
    monkeypatch.setattr(dashboard_module, "server", missing)
    with pytest.raises(et.ConfigurationError, match=r"eventtrain\[dashboard\]"):
        subs.Dashboard()


@pytest.fixture
def mounted() -> tuple[subs.Dashboard, httpx.ASGITransport]:
    """A dashboard without a server, and its app."""
    dashboard = subs.Dashboard(None, token=TOKEN)
    return dashboard, httpx.ASGITransport(dashboard.asgi_app(hosts=["train.example"]))


async def test_it_is_an_app_of_any_server_on_any_event_loop(
    mounted: tuple[subs.Dashboard, httpx.ASGITransport], tmp_path: Path
) -> None:
    dashboard, transport = mounted
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://train.example", headers=headers
    ) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/", headers={"Host": "localhost"})).status_code == 421
        trainer = et.Trainer(step_fn, new_state(), subscribers=[dashboard], run_dir=tmp_path, run_id="r")

        @trainer.on(et.StepCompleted, once=True)
        async def stop(event: et.StepCompleted) -> None:
            body = {"run": "r", "command": {"kind": "stop", "reason": "seen"}}
            answers.append(await client.post("/api/commands", json=body))

        answers: list[httpx.Response] = []
        result = await trainer.fit_async(batches(4), epochs=10_000)
        assert answers[0].status_code == 200, answers[0].text
        assert answers[0].json()["step"] == result.step
        assert result.stop_reason == "seen"
    assert dashboard.url is None


def test_the_vendored_files_are_those_of_the_recorded_package() -> None:
    sums = (VENDOR / "SHA256SUMS").read_text()
    assert "uplot 1.6.32" in sums
    recorded = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", sums, re.MULTILINE)}
    assert recorded["uPlot.iife.min.js"] == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    others = {"SHA256SUMS", "uPlot.LICENSE"}
    assert {path.name for path in VENDOR.iterdir()} == recorded.keys() | others
    for name, digest in recorded.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
    assert "MIT License" in (VENDOR / "uPlot.LICENSE").read_text()


def test_the_page_asks_no_other_host_and_has_no_inline_script_or_html() -> None:
    folder = VENDOR.parent
    html = (folder / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"\s(?:style|on\w+)=", html) == []
    own = html + "".join(
        (folder / name).read_text() for name in ("dashboard.js", "charts.js", "dashboard.css")
    )
    assert set(re.findall(r"https?://[^\s\"'`]+", own)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", own)
