"""PrometheusExporter: scraped over loopback while a run is under way, and read with Prometheus' own parsers."""

from __future__ import annotations

import errno
import gzip
import math
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.trackers import prometheus_exporter
from eventtrain.testing import ScriptedStep
from eventtrain.validation.optional_imports import MissingModule
from tests.support.saved_in_memory import MemoryCheckpointer

pytest.importorskip("prometheus_client", reason="it is not installed: pip install 'eventtrain[prometheus]'")
from prometheus_client import generate_latest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ODD = 'odd "name"\\ with\nlines, ü {x="1"} \udcff'

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str, parse: Any = text_string_to_metric_families) -> Samples:
    """(name, labels) -> value, without the prefix."""
    found = {}
    for family in parse(text):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            key = (sample.name.removeprefix("eventtrain_"), frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def at(samples: Samples, name: str, /, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def get(port: int | None, headers: Mapping[str, str] = {}, host: str = "127.0.0.1") -> bytes:
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=dict(headers))
    with OPENER.open(request, timeout=30) as answer:
        assert answer.status == 200
        return answer.read()


def scrape(exporter: subs.PrometheusExporter) -> Samples:
    return parsed(get(exporter.port).decode())


def of_registry(exporter: subs.PrometheusExporter) -> Samples:
    return parsed(generate_latest(exporter.registry).decode())


def scrape_until(exporter: subs.PrometheusExporter, condition: Callable[[Samples], bool]) -> Samples:
    end = time.monotonic() + 60
    while not condition(samples := scrape(exporter)):
        assert time.monotonic() < end
    return samples


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch, ODD: -batch, "count": jnp.int32(7)}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"accuracy": batch}


def data(epoch: int) -> list[Any]:
    return [np.float32(epoch), np.float32(epoch + 1)]


def new_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer:
    return et.Trainer(
        step_fn, {"w": jnp.zeros(2)}, eval_fn=eval_fn, subscribers=subscribers, run_dir=run_dir, **options
    )


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_scrape_in_the_middle_of_a_run_shows_its_newest_window_loop_and_subscribers(
    tmp_path: Path, backend: str
) -> None:
    exporter = subs.PrometheusExporter(0, labels={"team": "vision"})
    trainer = new_trainer(
        tmp_path, exporter, subs.Checkpointer("ck", every_epochs=1), run_id="run-7", backend=backend
    )
    seen: list[Samples] = []

    @trainer.on(et.EpochCompleted, lag=0)
    def look(event: et.EpochCompleted) -> None:
        epochs = event.epoch + 1
        seen.append(
            scrape_until(
                exporter,
                lambda found: (
                    at(found, "epochs_total", team="vision") == epochs
                    and at(found, "checkpoints_total", result="committed", team="vision") == event.epoch
                ),
            )
        )

    trainer.fit(data, epochs=3, eval_data=[np.float32(0.25)])
    assert exporter.port is None
    for epoch, samples in enumerate(seen):

        def of(what: str, /, samples: Samples = samples, **labels: str) -> float | None:
            return at(samples, what, team="vision", **labels)

        assert of("run_info", run_id="run-7") == 1
        assert of("running") == 1
        assert of("steps_total") == 2 * epoch + 2
        assert of("metric", name="loss") == epoch + 1
        assert of("metric", name="count") == 7
        assert of("metric", name=ODD.replace("\udcff", "\\udcff")) == -epoch - 1
        assert of("epoch_metric", name="loss") == epoch + 0.5
        assert of("epoch_metric", name="val_accuracy") == 0.25
        assert of("evaluation_metric", name="accuracy") == 0.25
        assert 0 < of("last_window_timestamp_seconds") <= time.time()  # type: ignore[operator]
        for part in ("data_wait", "dispatch", "device_wait", "observer_wait", "observing"):
            assert of("loop_seconds_total", part=part) >= 0  # type: ignore[operator]
        assert of("loop_seconds_total", part="duration") is None
        assert of("run_seconds_total") > 0  # type: ignore[operator]
        mine = {"subscriber": "PrometheusExporter"}
        assert of("subscriber_active", **mine) == 1
        assert of("subscriber_events_total", **mine) > 0  # type: ignore[operator]
        assert of("subscriber_errors_total", **mine) == of("subscriber_dropped_total", **mine) == 0
        for name in (
            "pending",
            "lag_events",
            "lag_seconds",
            "handler_seconds_total",
            "longest_slice_seconds",
        ):
            assert of(f"subscriber_{name}", **mine) >= 0  # type: ignore[operator]
        assert of("checkpoints_total", result="failed") == 0
    assert at(seen[1], "checkpoint_step", team="vision") == 2
    assert at(seen[1], "checkpoint_size_bytes", team="vision") > 0  # type: ignore[operator]
    after = of_registry(exporter)
    assert at(after, "running", team="vision") == 0
    assert at(after, "steps_total", team="vision") == 6
    assert at(after, "loop_seconds_total", team="vision", part="dispatch") > 0  # type: ignore[operator]


def test_before_a_run_there_is_little_to_see_and_it_is_legal() -> None:
    samples = of_registry(subs.PrometheusExporter(None))
    assert at(samples, "running") == 0
    assert at(samples, "steps_total") == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinities_are_legal(tmp_path: Path, value: str) -> None:
    exporter = subs.PrometheusExporter(None)
    new_trainer(tmp_path, exporter).fit([np.float32(value)], epochs=1)
    found = at(of_registry(exporter), "metric", name="loss")
    assert found == float(value) or (found is not None and math.isnan(found) and value == "nan")


def test_openmetrics_and_compression_are_spoken_too(tmp_path: Path) -> None:
    exporter = subs.PrometheusExporter(0)
    trainer = new_trainer(tmp_path, exporter, subs.Checkpointer("ck"))
    answers: list[bytes] = []

    @trainer.on(et.EpochCompleted, lag=0)
    def look(event: et.EpochCompleted) -> None:
        scrape_until(exporter, lambda found: at(found, "epochs_total") == 1)
        accept = "application/openmetrics-text; version=1.0.0"
        answers.append(get(exporter.port, {"Accept": accept, "Accept-Encoding": "gzip"}))

    trainer.fit(data, epochs=1)
    samples = parsed(gzip.decompress(answers[0]).decode(), openmetrics.text_string_to_metric_families)
    assert at(samples, "steps_total") == 2
    assert at(samples, "metric", name="loss") == 1


def test_hyperparameters_are_those_in_effect(tmp_path: Path) -> None:
    exporter = subs.PrometheusExporter(None)
    script = ScriptedStep({"loss": [1.0]}, steps_per_epoch=2, learning_rate=0.5)
    scheduler = subs.LearningRateScheduler(lambda epoch, rate: rate / 2)
    et.Trainer(script.step_fn, script.state, subscribers=[exporter, scheduler], run_dir=tmp_path).fit(
        script.data, epochs=2
    )
    assert at(of_registry(exporter), "hyperparam", name="learning_rate") == 0.125


async def test_alerts_and_what_became_of_checkpoints_are_counted(tmp_path: Path) -> None:
    exporter = subs.PrometheusExporter(None)
    control: Any = type("Control", (), {"hyperparams": {}})()
    await exporter.start(et.RunContext("run", tmp_path, control, lambda event: None))
    await exporter.handle(et.AlertRaised(name="spike", severity="critical"))
    await exporter.handle(et.AlertRaised(name="stall"))
    await exporter.handle(et.AlertResolved(name="spike"))
    await exporter.handle(et.CheckpointFailed(path="", error="no"))
    await exporter.handle(et.CheckpointSkipped(requested_by="x", in_flight=2))
    await exporter.handle(et.CheckpointSkipped(requested_by="x", in_flight=2))
    samples = of_registry(exporter)
    assert at(samples, "alert", name="spike", severity="critical") == 0
    assert at(samples, "alert", name="stall", severity="warning") == 1
    assert at(samples, "checkpoints_total", result="failed") == 1
    assert at(samples, "checkpoints_total", result="skipped") == 2
    await exporter.stop()
    await exporter.start(et.RunContext("next", tmp_path, control, lambda event: None))
    samples = of_registry(exporter)
    assert at(samples, "alert", name="stall", severity="warning") is None
    assert at(samples, "checkpoints_total", result="skipped") == 2  # a counter of this exporter's
    await exporter.stop()


def test_a_run_that_resumes_shows_the_alerts_that_stay_raised(tmp_path: Path) -> None:
    def alerts() -> subs.Alerts:
        return subs.Alerts([subs.Rule("loss", above=0.0, name="high", event=et.StepCompleted)])

    checkpointer, exporter = MemoryCheckpointer(every=3), subs.PrometheusExporter(0)
    trainer = new_trainer(tmp_path, alerts(), exporter, checkpointer)

    @trainer.on(et.EpochCompleted, once=True, lag=0)
    def wait(event: et.EpochCompleted) -> None:
        scrape_until(exporter, lambda found: at(found, "alert", name="high", severity="warning") == 1)

    trainer.fit(data, epochs=2)
    exporter = subs.PrometheusExporter(None)
    resumed, raised = new_trainer(tmp_path, alerts(), exporter, checkpointer), []
    resumed.on(et.AlertRaised)(raised.append)
    resumed.fit(data, epochs=2, resume=3)
    assert raised == []
    assert at(of_registry(exporter), "alert", name="high", severity="warning") == 1


def test_a_run_that_resumes_shows_the_step_it_is_at(tmp_path: Path) -> None:
    checkpointer = MemoryCheckpointer(every=3)
    new_trainer(tmp_path, checkpointer).fit(data, epochs=2)
    exporter = subs.PrometheusExporter(0)
    trainer = new_trainer(tmp_path, checkpointer, exporter)

    @trainer.on(et.StepStarted, once=True, lag=0)
    def look(event: et.StepStarted) -> None:
        scrape_until(exporter, lambda found: at(found, "steps_total") == 3)

    trainer.fit(data, epochs=2, resume=3)
    assert at(of_registry(exporter), "steps_total") == 4


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True])
def test_a_port_in_use_is_said_and_ends_the_run_only_if_that_is_wanted(
    tmp_path: Path, required: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        exporter = subs.PrometheusExporter(port, require_port=required)
        trainer = new_trainer(tmp_path, exporter)
        said: list[et.SubscriberFailed] = []

        @trainer.on(et.SubscriberFailed)
        async def note(event: et.SubscriberFailed) -> None:
            said.append(event)

        expected = f"PrometheusExporter cannot listen on 127.0.0.1 port {port}: "
        if required:
            with pytest.raises(OSError, match=expected) as caught:
                trainer.fit(data, epochs=1)
            assert caught.value.errno == errno.EADDRINUSE
        else:
            assert trainer.fit(data, epochs=1).step == 2
            (failed,) = said
            assert failed.error.startswith(expected)
            assert expected in caplog.text
            assert exporter.port is None
            assert at(of_registry(exporter), "steps_total") == 2


def test_the_port_is_free_again_after_the_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    exporter = subs.PrometheusExporter(port, require_port=True)
    trainer = new_trainer(tmp_path, exporter)
    for _ in range(2):
        trainer.fit(data, epochs=1)
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_only_this_machine_can_reach_it_unless_told_otherwise(tmp_path: Path) -> None:
    exporter = subs.PrometheusExporter(0)
    trainer = new_trainer(tmp_path, exporter)
    addresses: list[str] = []

    @trainer.on(et.RunStarted, lag=0)
    def look(event: et.RunStarted) -> None:
        assert exporter._server is not None
        addresses.append(exporter._server._server.socket.getsockname()[0])

    trainer.fit(data, epochs=1)
    assert addresses == ["127.0.0.1"]


async def test_clients_that_hang_hold_up_neither_others_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = subs.PrometheusExporter(0)
    control: Any = type("Control", (), {"hyperparams": {}})()
    await exporter.start(et.RunContext("run", tmp_path, control, lambda event: None))
    hanging = [socket.create_connection(("127.0.0.1", exporter.port or 0)) for _ in range(5)]
    try:
        hanging[0].sendall(b"GET /metrics HT")
        samples = await anyio.to_thread.run_sync(scrape, exporter)
        assert at(samples, "running") == 1
        with anyio.fail_after(30):
            await exporter.stop()
    finally:
        for one in hanging:
            one.close()


async def test_a_client_that_says_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventtrain.subscribers.trackers.prometheus_exporter.CLIENT_TIMEOUT_S", 0.05)
    exporter = subs.PrometheusExporter(0)
    control: Any = type("Control", (), {"hyperparams": {}})()
    await exporter.start(et.RunContext("run", tmp_path, control, lambda event: None))

    def wait() -> bytes:
        with socket.create_connection(("127.0.0.1", exporter.port or 0), timeout=60) as silent:
            return silent.recv(1)

    assert await anyio.to_thread.run_sync(wait) == b""
    await exporter.stop()


def test_scrapes_while_values_change_are_all_whole(tmp_path: Path) -> None:
    exporter = subs.PrometheusExporter(0)
    trainer = new_trainer(tmp_path, exporter, subs.EvaluateEvery(steps=5))
    done = threading.Event()
    found: list[float] = []
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while not done.is_set():
                if exporter.port is not None:
                    found.append(at(scrape(exporter), "steps_total") or 0)
        except OSError:
            pass  # the run has ended
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    trainer.fit(data, epochs=100, eval_data=[np.float32(0.25)])
    done.set()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(found) > 0


# --- mounted in an app ------------------------------------------------------------------------------------------------


async def ask(app: Any, path: str) -> tuple[int, dict[bytes, bytes], str]:
    """One request as an ASGI server makes it: status, headers, body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"service")],
        "server": ("service", 80),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], {name.lower(): text for name, text in sent[0]["headers"]}, body.decode()


@pytest.mark.parametrize("way", ["route", "mount"])
async def test_in_a_starlette_app_it_answers_without_a_server(tmp_path: Path, way: str) -> None:
    starlette = pytest.importorskip("starlette.applications")
    routing = pytest.importorskip("starlette.routing")
    exporter = subs.PrometheusExporter(None)
    place = {"route": routing.Route, "mount": routing.Mount}[way]("/metrics", exporter.asgi_app())
    app = starlette.Starlette(routes=[place])
    path = {"route": "/metrics", "mount": "/metrics/"}[way]
    answers: list[Samples] = []
    async with et.EventBus() as bus:
        trainer = new_trainer(tmp_path, exporter, bus=bus)

        @bus.on(et.EpochCompleted, lag=0)
        async def look(event: et.EpochCompleted) -> None:
            while True:
                status, headers, body = await ask(app, path)
                assert status == 200
                assert headers[b"content-type"].startswith(b"text/plain; version=")
                if at(parsed(body), "epochs_total") == event.epoch + 1:
                    break
                await anyio.lowlevel.checkpoint()
            answers.append(parsed(body))

        await trainer.fit_async(data, epochs=2)
    assert exporter.port is None
    assert [at(samples, "metric", name="loss") for samples in answers] == [1, 2]


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65_536},
        {"port": 1.5},
        {"labels": {"a-b": "x"}},
        {"labels": {"__a": "x"}},
        {"labels": {"": "x"}},
        {"labels": {"name": "x"}},
        {"labels": {"fold": 3}},
        {"labels": ["fold"]},
    ],
)
def test_arguments_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match=f"PrometheusExporter.{next(iter(wrong))}=.* must"):
        subs.PrometheusExporter(**wrong)


def test_without_prometheus_client_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'prometheus_client'")
    missing = MissingModule(error, "prometheus", "PrometheusExporter")
    monkeypatch.setattr(prometheus_exporter, "prometheus_client", missing)
    with pytest.raises(
        et.ConfigurationError, match=r"No module named 'prometheus_client'.*'eventtrain\[prometheus\]'"
    ):
        subs.PrometheusExporter()
