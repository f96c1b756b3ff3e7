"""A running training is steered through its control socket and by files, and nothing that comes from there harms it."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli.main import app
from eventtrain.events.commands import Pause, SetHyperparam, Stop
from eventtrain.runs import control_address
from eventtrain.runs.control_client import ControlClient
from eventtrain.trainer import remote_control

OPTIMISER = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)


def step_fn(state: Any, batch: Any) -> Any:
    updates, opt_state = OPTIMISER.update({"w": jnp.float32(0.001)}, state["opt"])
    return {"w": state["w"] + updates["w"], "opt": opt_state}, {"loss": state["w"]}


def new_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer[Any]:
    state = {"w": jnp.float32(0), "opt": OPTIMISER.init({"w": jnp.float32(0)})}
    return et.Trainer(
        step_fn,
        state,
        subscribers=[subs.JSONLLogger("events.jsonl"), *subscribers],
        run_dir=run_dir,
        **options,
    )


def slow_batches(_: int) -> Iterator[np.ndarray[Any, Any]]:
    for _ in range(10_000):
        time.sleep(0.001)
        yield np.float32(1)


@contextmanager
def running(trainer: et.Trainer[Any], data: Any = slow_batches) -> Iterator[Callable[[], et.FitResult[Any]]]:
    """Trains in a thread; the run is ended at the end of the block. Gives what waits for its result."""
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit(data, steps=10**6, progress=False))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit)
    thread.start()

    def result() -> et.FitResult[Any]:
        thread.join(60)
        assert not thread.is_alive()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    try:
        wait_for(lambda: not thread.is_alive() or trainer.step > 0)
        yield result
    finally:
        trainer.control.stop()
        thread.join(60)


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def ctl(run_dir: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["ctl", str(run_dir), *arguments])


def test_ctl_prints_the_step_at_which_a_command_took_effect(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer) as result:
        done = ctl(tmp_path, "set", "learning_rate", "1e-4", "--json")
        applied = et.parse_event(done.stdout)
        assert isinstance(applied, et.CommandApplied)
        assert applied.command.source == "control socket"
        assert ctl(tmp_path, "scale", "learning_rate", "0.5").exit_code == 0
        shown = json.loads(ctl(tmp_path, "status", "--json").stdout)
        assert shown["hyperparams"]["learning_rate"] == pytest.approx(5e-5)
        assert shown["state"] == "running"
        assert ctl(tmp_path, "stop", "--reason", "enough").stdout.startswith("step ")
        ended = result()
    assert ended.stop_reason == "enough"
    logged = list(et.read_events(tmp_path, kinds=(et.CommandApplied, et.HyperparamChanged)))
    assert [event.kind for event in logged] == [
        "command_applied", "hyperparam_changed", "command_applied", "hyperparam_changed", "command_applied",
    ]  # fmt: skip
    assert logged[0].step == applied.step


def test_a_rejection_is_printed_with_exit_code_1_and_no_run_with_2(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer):
        done = ctl(tmp_path, "set", "momentum", "0.5")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("Rejected. No hyperparameter 'momentum': ")
        assert ctl(tmp_path, "set", "learning_rate", "nan").exit_code == 2
        assert json.loads(ctl(tmp_path, "profile", "3", "--json").stdout)["rejected"]
    done = ctl(tmp_path, "stop")
    assert done.exit_code == 2
    assert f"No run answers in {tmp_path}. The last one there was stopped at step " in done.stderr
    assert json.loads(ctl(tmp_path, "stop", "--json").stdout)["error"]


def test_pause_holds_the_run_until_resume(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer):
        assert ctl(tmp_path, "pause").exit_code == 0
        before = trainer.step
        assert json.loads(ctl(tmp_path, "status", "--json").stdout)["state"] == "paused"
        time.sleep(0.1)
        assert trainer.step == before
        assert ctl(tmp_path, "resume").exit_code == 0
        wait_for(lambda: trainer.step > before)


def test_the_socket_is_for_its_user_only_and_gone_after_the_run(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer):
        mode = (tmp_path / "control.sock").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == [".eventtrain.attempts", "events.jsonl"]
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith("eventtrain-control")
    ]


def test_remote_control_false_opens_nothing(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, remote_control=False)
    with running(trainer):
        (tmp_path / "STOP").touch()
        time.sleep(2 * remote_control.LOOK_S)
        assert not (tmp_path / "control.sock").exists()
        assert ctl(tmp_path, "stop").exit_code == 2
        assert (tmp_path / "STOP").exists()


def test_a_socket_left_by_a_killed_run_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "control.sock"))
    left.close()
    assert ctl(tmp_path, "stop").exit_code == 2
    with running(new_trainer(tmp_path)):
        assert ctl(tmp_path, "status").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names the folder through /proc")
def test_a_path_too_long_for_a_socket_works(tmp_path: Path) -> None:
    run_dir = tmp_path / ("long" * 30) / ("é" * 60)
    with running(new_trainer(run_dir)):
        assert (run_dir / "control.sock").is_socket()
        assert ctl(run_dir, "status").exit_code == 0


def test_without_unix_sockets_a_token_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run_dir: Path) -> socket.socket:
        raise OSError("no UNIX sockets here")

    monkeypatch.setattr(control_address, "_listen_in", refuse)
    with running(new_trainer(tmp_path)):
        file = tmp_path / "control.token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        address = json.loads(file.read_text())
        assert len(address["token"]) >= 43
        assert ctl(tmp_path, "status").exit_code == 0
        for first in (
            '{"kind":"status"}',
            '{"kind":"token","token":""}',
            '{"kind":"token","token":"é\\ud800"}',
        ):
            with socket.create_connection(("127.0.0.1", address["port"]), 5) as client:
                client.sendall(f'{first}\n{{"kind":"stop"}}\n'.encode())
                assert b"error" in client.makefile("rb").read()
        assert ctl(tmp_path, "status").exit_code == 0
    assert not file.exists()


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"{}\n",
        b'{"kind":"set_hyperparam","name":"learning_rate","value":1,"due":5}\n',
        b'{"kind":"stop","source":"dashboard"}\n',
        b'{"kind":"set_hyperparam","name":"learning_rate","value":"NaN"}\n',
        b'{"kind":"stop","extra":1}\n',
        b"\xff\xfe\n",
        b"x" * (control_address.LONGEST_LINE + 10) + b"\n",
        b"[" * 60_000 + b"\n",
    ],
)
def test_garbage_is_answered_with_an_error_and_ends_the_connection(tmp_path: Path, line: bytes) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(tmp_path / "control.sock"))
        client.sendall(line)
        answers = client.makefile("rb").read().splitlines()
        assert len(answers) == 1
        assert list(json.loads(answers[0])) == ["error"]
        assert len(answers[0]) < 1000
        assert ctl(tmp_path, "status").exit_code == 0


def test_clients_beyond_the_limit_are_refused_and_dead_ones_slow_nothing(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    with running(trainer) as result:
        dead = [control_address.connect(tmp_path, 5)[0] for _ in range(remote_control.MOST_CLIENTS)]
        wait_for(lambda: ctl(tmp_path, "status").exit_code == 1)
        assert "clients already" in ctl(tmp_path, "status").stderr
        dead.pop().close()
        wait_for(lambda: ctl(tmp_path, "stop").exit_code == 0)
        begin_s = time.monotonic()
        result()
        assert time.monotonic() - begin_s < 10
        for client in dead:
            client.close()


@pytest.mark.allow_blocking
def test_a_blocked_event_loop_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    release = threading.Event()
    blocked = threading.Event()

    @trainer.on(et.StepCompleted, once=True)
    async def block(event: et.Event) -> None:
        blocked.set()
        release.wait(30)

    with running(trainer) as result:
        assert blocked.wait(30)
        try:
            done = ctl(tmp_path, "stop")
            assert (done.exit_code, done.stdout[:5]) == (0, "step ")
        finally:
            release.set()
        assert result().stop_reason == "stopped"


def test_a_stop_while_the_first_batch_is_awaited_is_answered_as_applied(tmp_path: Path) -> None:
    release = threading.Event()

    def batches(_: int) -> Iterator[Any]:
        release.wait(30)
        yield np.float32(1)

    trainer = new_trainer(tmp_path)
    results: list[et.FitResult[Any]] = []
    thread = threading.Thread(target=lambda: results.append(trainer.fit(batches, steps=5, progress=False)))
    thread.start()
    try:
        wait_for(lambda: (tmp_path / "control.sock").exists())
        with ControlClient(tmp_path) as client:
            assert client.status()["state"] == "starting"
            assert client.send(Stop(reason="early")).step == 0
    finally:
        release.set()
        thread.join(30)
    assert results[0].stop_reason == "early"


def test_stop_and_checkpoint_files_are_found_taken_up_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(tmp_path, subs.Checkpointer("checkpoints", every_epochs=1))
    with caplog.at_level(logging.WARNING, "eventtrain"), running(trainer) as result:
        (tmp_path / "CHECKPOINT").write_text("mine\n")
        wait_for(lambda: not (tmp_path / "CHECKPOINT").exists(), 1.5)
        wait_for(lambda: list(tmp_path.glob("checkpoints/*mine*")))
        (tmp_path / "STOP").touch()
        wait_for(lambda: not (tmp_path / "STOP").exists(), 1.5)
        assert result().stop_reason == "stopped"
    text = caplog.text
    assert "The file CHECKPOINT was found" in text
    assert "The file STOP was found" in text
    commands = list(et.read_events(tmp_path, kinds=et.CommandApplied))
    assert [(event.command.kind, event.command.source) for event in commands] == [
        ("save_checkpoint", "file"),
        ("stop", "file"),
    ]


def test_a_client_that_waits_when_the_run_ends_gets_an_answer(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path)
    answers: list[BaseException] = []
    with running(trainer) as result, ControlClient(tmp_path) as client:
        client.send(Pause())
        (tmp_path / "STOP").touch()
        result()
        with pytest.raises((et.CommandRejectedError, et.RunNotReachable)) as raised:
            client.send(SetHyperparam(name="learning_rate", value=0.1))
        answers.append(raised.value)
    assert answers


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    done = ctl(tmp_path / "missing", "status")
    assert done.exit_code == 2
    assert "is not a folder" in done.stderr
    assert os.listdir(tmp_path) == []
