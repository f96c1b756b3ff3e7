"""Every example runs; the services through real HTTP on loopback: they answer while they train, and go down cleanly."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import uvicorn

import eventtrain as et
import eventtrain.subscribers
from tests.conftest import python_path
from tests.support.brokers import NATSServer, running
from tests.support.notebook_kernel import kernel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


service = load_example("service")

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
def serving(app: Any, make_server: Any = service.Server) -> Iterator[tuple[httpx.Client, Any]]:
    """The app on uvicorn, in a thread, on a free port."""
    server = make_server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=10))
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
    study = load_example("optuna_pruning").search(5)
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


# --- a program that a user would copy from --------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, so that ``runs/`` is in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_small(
    name: str, capsys: pytest.CaptureFixture[str], *given: Any, **named: Any
) -> tuple[list[str], Any]:
    """Runs ``main`` of an example twice, and returns the lines of the first run, and the module.

    The second run finds a run that has ended, so it trains nothing and ends with the same line.
    """
    example = load_example(name)
    example.main(*given, **named)
    lines = capsys.readouterr().out.splitlines()
    example.main(*given, **named)
    again = capsys.readouterr().out.splitlines()
    assert not [line for line in again if line.startswith("epoch ")]
    [ended] = [line for line in lines if re.match(r"step \d+ \(", line)]
    assert ended in again
    return lines, example


@pytest.mark.slow
@pytest.mark.allow_blocking  # a relative run_dir, as a user writes it
def test_augmented_images_are_those_of_an_uninterrupted_run_after_a_resume(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, example = run_small("images", capsys, small=True)
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "step 20 (completed)"]
    data, _ = example.load()
    plain, _ = example.load(augmented=False)
    (images, labels), (unchanged, same_labels) = next(iter(data(0))), next(iter(plain(0)))
    assert (labels == same_labels).all()
    assert images.dtype == np.float32
    assert 0.05 < np.abs(images - unchanged).mean() < 0.3

    def run(steps: int, resume: bool) -> Any:
        checkpointer = et.subscribers.Checkpointer("checkpoints")
        trainer = example.make_trainer("runs/in-two-parts", [checkpointer])
        return trainer.fit(data, steps=steps, resume=resume).state.params

    run(13, resume=False)
    resumed = run(20, resume=True)
    whole = example.make_trainer("runs/whole").fit(data, steps=20).state.params
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
@pytest.mark.allow_blocking
def test_a_language_model_writes_a_line_and_measures_its_bits(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, example = run_small("char_lm", capsys, load_example("char_lm").SMALL)
    written = [line for line in lines if re.match("step \\d+: ['\"]", line)]
    assert len(written) == 2
    [measured] = [line for line in lines if line.startswith("epoch 0: ")]
    assert 3 < float(measured.split()[2]) < 7
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimiser = example.make_optimiser(steps=4, every=2)
    state, no_gradient = optimiser.init(params), jax.tree.map(jnp.zeros_like, params)
    sizes = []
    for _ in range(4):
        updates, state = optimiser.update(no_gradient, state, params)
        sizes.append([float(jnp.abs(updates[name]).max()) for name in ("matrix", "bias")])
    assert [matrix > 0 for matrix, _ in sizes] == [
        False,
        False,
        False,
        True,
    ]  # the first rate of the warm-up is 0
    assert not any(bias for _, bias in sizes)


@pytest.mark.slow
@pytest.mark.allow_blocking
def test_words_are_counted_by_what_they_were_taken_for(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, example = run_small("speech_like", capsys, small=True)
    rows = [line.split() for line in lines[-9:]]
    assert [row[0] for row in rows] == ["-".join(word) for word in example.WORDS]
    assert sum(int(count) for row in rows for count in row[1:]) == 64
    words = example.Words(4)
    for (waves, labels), (late, late_labels) in zip(list(words(1))[2:], words(1, start=2), strict=True):
        assert np.array_equal(waves, late)
        assert np.array_equal(labels, late_labels)


@pytest.mark.allow_blocking
def test_each_episode_is_one_event_in_the_log(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, example = run_small("policy_gradient", capsys, 6)
    assert re.fullmatch(r"step 6 \(all steps\): mean return [+-]\d\.\d\d", lines[-1])
    rows = (in_folder / "runs/policy_gradient/episodes.jsonl").read_text().splitlines()
    events = [et.parse_event(row, types=(example.EpisodeCompleted,)) for row in rows]
    assert [event.episode for event in events] == list(range(6 * example.EPISODES))
    assert {event.episode_return for event in events} == {-1.0, 1.0}


@pytest.mark.slow
@pytest.mark.allow_blocking
def test_two_optimisers_have_rates_of_their_own(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = run_small("vae", capsys, small=True)
    assert lines[-2:] == [
        "['opt_state']['decoder'].hyperparams['learning_rate'] = 0.001",
        "['opt_state']['encoder'].hyperparams['learning_rate'] = 0.002",
    ]
    assert "data:image/png" in (in_folder / "runs/vae/report.html").read_text()


@pytest.mark.allow_blocking
def test_a_model_with_batch_normalisation_in_equinox_learns(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, _ = run_small("equinox_batchnorm", capsys, small=True)
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 0", "epoch 1"]
    assert float(lines[1].split()[3].rstrip(",")) < float(lines[0].split()[3].rstrip(","))


def run_script(name: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_over_a_mesh_continues_with_a_divided_state(tmp_path: Path) -> None:
    printed = run_script("data_parallel.py", "--small", folder=tmp_path)
    assert "step 16 (completed) on 4 devices; the first holds (16, 256) of (16, 256)" in printed
    printed = run_script("data_parallel.py", "--small", "--fsdp", folder=tmp_path)
    assert printed == "step 16 (completed) on 4 devices; the first holds (4, 256) of (16, 256)\n"


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_digest_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run_script("resume.py", "whole", "--small", folder=tmp_path)
    command = [sys.executable, str(EXAMPLES / "resume.py"), "killed", "--small"]
    killed = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": python_path()}, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: list(tmp_path.glob("killed/checkpoints/step-*")), 120)
    killed.kill()
    killed.wait()
    assert run_script("resume.py", "killed", "--small", folder=tmp_path) == whole
    rows = [json.loads(line) for line in (tmp_path / "killed/events.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step_completed"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.allow_blocking
def test_a_fastapi_service_predicts_while_it_trains_and_resumes(in_folder: Path) -> None:
    pytest.importorskip("fastapi")
    image = [0.0] * 64

    def start() -> Any:
        example = load_example("fastapi_service")
        example.EPOCHS = 100_000
        return example.app

    with serving(start(), uvicorn.Server) as (client, _):
        wait_until(lambda: client.post("/predict", json={"images": [image]}).status_code == 200)
        answer = client.post("/predict", json={"images": [image] * 3}).json()
        assert len(answer["digits"]) == 3
        assert answer["step"] > 0
        assert client.post("/predict", json={"images": [image[1:]]}).status_code == 422
        assert client.get("/status", headers={"Host": "evil.example"}).status_code == 400
        command = {"run": "digits", "command": {"kind": "stop"}}
        assert client.post("/dashboard/api/commands", json=command).status_code == 401
        assert client.get("/docs").status_code == 404
        with client.stream("GET", "/events") as response:
            kind = next(response.iter_lines())
        assert kind == "event: epoch_completed"
        status = client.get("/status").json()
        assert status["state"] == "training"
    with serving(start(), uvicorn.Server) as (client, _):
        wait_until(lambda: client.get("/status").json()["step"] > 0)
        assert client.get("/status").json()["step"] >= status["step"]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_saved_in_it(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with kernel(tmp_path) as running:
        for cell in cells:
            output = running.run("".join(cell["source"]))
            assert output.error == ""
            saved = [text for shown in cell["outputs"] for text in shown.get("text", ())]
            assert without_numbers(output.printed) == without_numbers("".join(saved))
            results = [shown["data"] for shown in cell["outputs"] if shown["output_type"] == "execute_result"]
            for result, data in zip(output.of("execute_result"), results, strict=True):
                assert without_numbers(result["data"]["text/plain"]) == without_numbers(
                    "".join(data["text/plain"])
                )


def without_numbers(text: str) -> list[str]:
    """The lines of ``text``, sorted, since subscribers print independently of one another."""
    return sorted(" ".join(re.sub(r"\d[\d.,e+-]*", "#", line).split()) for line in text.splitlines())


def test_every_example_is_in_the_index_and_in_the_tests() -> None:
    index = (ROOT / "docs" / "examples.md").read_text()
    tests = Path(__file__).read_text() + (ROOT / "tests" / "cli" / "test_main.py").read_text()
    examples = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".toml")]
    assert len(examples) >= 18
    for example in examples:
        assert f"| `{example.name}` |" in index, f"{example.name} is not in docs/examples.md"
        assert re.search(rf"\b{example.stem}\b", tests), f"no test names {example.name}"
