"""examples/service.py through real HTTP on loopback: it answers while it trains, and goes down cleanly."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import uvicorn

import eventtrain as et
import eventtrain.subscribers
from tests.conftest import python_path
from tests.support.brokers import NATSServer, running

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
spec = importlib.util.spec_from_file_location("service_example", EXAMPLES / "service.py")
assert spec is not None
assert spec.loader is not None
service = importlib.util.module_from_spec(spec)
spec.loader.exec_module(service)

optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)


def step(state: Any, batch: Any) -> Any:
    return state, {"loss": batch, "rate": state["opt_state"].hyperparams["learning_rate"]}


TOKEN = "a-token-for-tests-only"


def make_app(run_dir: Path, fit: Callable[[et.Trainer], Any]) -> Any:
    dashboard = eventtrain.subscribers.Dashboard(None, token=TOKEN)
    return service.make_app(lambda bus, dashboard: make_trainer(bus, run_dir, dashboard), fit, dashboard)


def make_trainer(bus: et.EventBus, run_dir: Path, dashboard: et.Subscriber) -> et.Trainer:
    params = jnp.zeros(2)
    state = {"params": params, "opt_state": optimiser.init(params)}
    return et.Trainer(
        step,
        state,
        eval_fn=lambda s, b: {"loss": b},
        subscribers=[dashboard],
        bus=bus,
        run_dir=run_dir,
        run_id="r",
    )


def endless(epoch: int) -> Iterator[np.ndarray]:
    """Slow enough that a machine under load still answers, and with no end but a stop."""
    for _ in range(100):
        time.sleep(0.001)
        yield np.float32(epoch)


@contextmanager
def serving(app: Any) -> Iterator[tuple[httpx.Client, Any]]:
    """The app on uvicorn, in a thread, on a free port."""
    server = service.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            yield client, server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(ready: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def app(tmp_path: Path) -> Any:
    return make_app(
        tmp_path,
        lambda trainer: trainer.fit_async(endless, epochs=10_000, eval_data=[np.float32(7)]),
    )


def set_rate(client: httpx.Client, value: float, headers: Mapping[str, str] = {}) -> httpx.Response:
    command = {"kind": "set_hyperparam", "name": "learning_rate", "value": value}
    content = json.dumps({"run": "r", "command": command})
    own = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    return client.post("/dashboard/api/commands", content=content, headers={**own, **headers})


def server_sent(client: httpx.Client, kinds: str) -> Iterator[dict[str, Any]]:
    with client.stream("GET", "/events", params={"kinds": kinds}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_status_moves_while_training(app: Any) -> None:
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["epochs_completed"] >= 1)
        first = client.get("/status").json()
        assert first["state"] == "training"
        assert first["hyperparams"] == {"learning_rate": 0.5}
        assert first["metrics"]["val_loss"] == 7
        assert first["metrics"]["loss"] >= 0
        wait_until(lambda: client.get("/status").json()["step"] > first["step"])


def test_events_come_in_order_and_none_is_missing(app: Any) -> None:
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["step"] > 0)
        steps: list[int] = []
        for body in server_sent(client, "step_completed"):
            event = et.parse_event(body)
            steps.append(event.step)
            if len(steps) == 300:
                break
        assert steps == list(range(steps[0], steps[0] + 300))


def test_a_new_learning_rate_holds_from_the_step_that_the_answer_names(app: Any) -> None:
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["step"] > 0)
        events = server_sent(client, "step_completed,hyperparam_changed")
        next(events)
        answer = set_rate(client, 0.125)
        assert answer.status_code == 200
        applied = answer.json()
        assert client.get("/status").json()["hyperparams"] == {"learning_rate": 0.125}
        rates: dict[int, float] = {}
        changed: list[int] = []
        for body in events:
            if body["kind"] == "hyperparam_changed":
                changed.append(body["step"])
            else:
                rates[body["step"]] = body["metrics"]["rate"]
            if applied["step"] + 1 in rates:
                break
        assert changed == [applied["step"]]
        assert (rates[applied["step"]], rates[applied["step"] + 1]) == (0.5, 0.125)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
        ({"Content-Type": "application/json", "Host": "evil.example"}, 400),
        ({"Content-Type": "application/json", "Authorization": "Bearer wrong"}, 401),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_a_page_of_another_site_cannot_command(app: Any, headers: dict[str, str], status: int) -> None:
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["step"] > 0)
        answer = set_rate(client, 0.25, headers)
        assert answer.status_code == status, answer.text
        rate = client.get("/status").json()["hyperparams"]["learning_rate"]
        assert rate == (0.25 if status == 200 else 0.5)


def test_a_failure_of_the_data_is_reported(tmp_path: Path) -> None:
    def broken(epoch: int) -> Iterator[np.ndarray]:
        yield np.float32(1)
        raise OSError("the disk went away")

    app = make_app(tmp_path, lambda t: t.fit_async(broken, epochs=2))
    with serving(app) as (client, _):
        wait_until(lambda: "failed" in client.get("/status").json()["state"])
        assert client.get("/status").json()["state"] == "failed: OSError: the disk went away"
        answer = set_rate(client, 0.25)
        assert (answer.status_code, answer.json()["error"]) == (
            409,
            "the run failed (OSError: the disk went away)",
        )


def test_unknown_events_are_422(app: Any) -> None:
    with serving(app) as (client, _):
        answer = client.get("/events", params={"kinds": "nonsense"})
        assert answer.status_code == 422
        assert "nonsense" in answer.json()["error"]


def test_when_training_is_over_a_command_is_409_with_the_reason(tmp_path: Path) -> None:
    app = make_app(
        tmp_path,
        lambda trainer: trainer.fit_async([np.float32(1)] * 3, epochs=1),
    )
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["state"] == "ended: completed")
        answer = set_rate(client, 0.1)
        assert answer.status_code == 409
        assert "ended" in answer.json()["error"] or "no run" in answer.json()["error"]


def test_training_that_fails_leaves_the_service_up(tmp_path: Path) -> None:
    app = make_app(tmp_path, lambda trainer: trainer.fit_async([], epochs=1))
    with serving(app) as (client, _):
        wait_until(lambda: client.get("/status").json()["state"].startswith("failed: "))


def test_going_down_in_the_middle_of_training_ends_streams_and_keeps_the_state(app: Any) -> None:
    with serving(app) as (client, server):
        wait_until(lambda: client.get("/status").json()["step"] > 10)
        kinds: list[str] = []
        for body in server_sent(client, "step_completed,run_completed"):
            if not kinds:
                server.should_exit = True
            kinds.append(body["kind"])
        assert kinds[-1] == "run_completed"  # and then the stream ended by itself, without an error
    trainer = app.state.training.trainer
    assert trainer.step > 10
    assert np.asarray(trainer.state["params"]).shape == (2,)
    left = [thread.name for thread in threading.enumerate() if "eventtrain" in thread.name]
    assert not left


def test_a_program_watches_a_run_over_nats_and_halves_its_rate_when_the_loss_rises(tmp_path: Path) -> None:
    pytest.importorskip("faststream.nats", reason="faststream is not installed")
    command = [sys.executable, "-m", "faststream", "run", "examples.watch_nats:app"]
    with running(NATSServer(tmp_path / "nats")) as server:
        watcher = subprocess.Popen(
            command, cwd=EXAMPLES.parent, env={**os.environ, "NATS_URL": server.url},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines: list[str] = []
        assert watcher.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(iter(watcher.stdout.readline, "")))
        reader.start()
        try:
            wait_until(lambda: "app started" in "".join(lines) or watcher.poll() is not None)
            params = jnp.zeros(2)
            trainer = et.Trainer(
                step,
                {"params": params, "opt_state": optimiser.init(params)},
                subscribers=[et.subscribers.NATSEvents(server.url, commands=True)],
                run_dir=tmp_path / "run",
                run_id="my.run",
            )

            @trainer.on(et.EpochCompleted)
            async def stop(event: et.EpochCompleted, control: et.Control) -> None:
                if event.hyperparams["learning_rate"] < 0.5 or event.epoch > 100:
                    control.stop("seen enough")

            trainer.fit(endless, epochs=200)
            wait_until(lambda: "halved" in "".join(lines))
        finally:
            watcher.terminate()
            watcher.wait(20)
            reader.join(10)
            watcher.stdout.close()
    assert trainer.control.hyperparams["learning_rate"] < 0.5
    assert "my.run: epoch 0 loss -> 0.0000" in "".join(lines)


@pytest.mark.parametrize("name", ["hello.py", "custom_subscriber.py"])
def test_the_other_examples_run(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout
    assert done.stderr == ""


def test_a_study_prunes_the_trials_that_fall_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("optuna_example", EXAMPLES / "optuna_pruning.py")
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    study = example.search(5)
    states = [trial.state.name for trial in study.trials]
    assert states.count("PRUNED") >= 1
    assert states.count("COMPLETE") >= 2
    pruned = next(trial for trial in study.trials if trial.state.name == "PRUNED")
    assert len(pruned.intermediate_values) < 5
    assert study.best_trial.state.name == "COMPLETE"


@pytest.mark.slow
def test_a_run_of_two_processes_that_was_killed_ends_on_four_with_every_step_logged_once(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    log = run_dir / "events.jsonl"

    def launched(processes: int) -> list[str]:
        program = ["from eventtrain.cli import app; app()", "launch", "-n", str(processes)]
        return [sys.executable, "-c", *program, str(EXAMPLES / "several_hosts.py"), str(run_dir)]

    environment = {**os.environ, "PYTHONPATH": python_path()}
    killed = subprocess.Popen(
        launched(2), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: log.exists() and log.read_bytes().count(b"step_completed") > 100, 120)
    finally:
        killed.kill()  # which kills its processes
        killed.wait()
    ended = subprocess.run(
        launched(4), env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    assert sorted(line for line in ended.stdout.splitlines() if "steps" in line) == [
        f"[{index}] process {index} of 4: 640 steps" for index in range(4)
    ]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step_completed"] == [*range(1, 641)]
