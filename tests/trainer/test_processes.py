"""How a process ends when another one of its run is lost: the watch, without JAX's processes."""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.control.control_plane import ControlPlane
from eventtrain.errors import PeerLost
from eventtrain.trainer import processes as module
from eventtrain.trainer.processes import EXIT_CODE, FAILED_CODE, _Watch
from eventtrain.trainer.signals import SignalGuard

LOST = PeerLost("Process 1 of the run is lost: it has given no sign of life for 10 s", 1)


class Exits:
    """Stands for the end of the process: records exit codes, and calls what is registered for the interpreter's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.registered: list[Callable[[], Any]] = []
        monkeypatch.setattr(module, "_exit", self._exit)
        monkeypatch.setattr(atexit, "register", self.registered.append)
        monkeypatch.setattr(atexit, "unregister", self.registered.remove)
        for name in ("END_AFTER_S", "EXIT_AFTER_S", "EXIT_TOGETHER_S"):
            monkeypatch.setattr(module, name, 0.05)

    def _exit(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()

    def end_interpreter(self) -> None:
        for function in self.registered:
            function()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exits]:
    exits = Exits(monkeypatch)
    yield exits
    exits.end_interpreter()
    for thread in threading.enumerate():
        if thread.name == "eventtrain-exit":  # before it would end the process of the tests
            thread.join(30)


def watch(end_events: Callable[[PeerLost], None] = lambda lost: None) -> _Watch:
    core = core_of(et.EventBus())
    return _Watch(core, ControlPlane(core), end_events)


def test_a_training_thread_that_hangs_is_ended_with_its_code_behind_the_last_events(exits: Exits) -> None:
    told: list[PeerLost] = []
    watch(told.append).report(LOST, "silent")
    assert exits.ended.wait(30)
    assert told == [LOST]
    assert exits.codes == [EXIT_CODE]


def test_a_training_thread_that_leaves_in_time_is_not_ended(exits: Exits) -> None:
    leaving = watch()
    leaving.report(LOST, "failed")
    leaving.end(LOST)
    assert leaving._timer is not None
    leaving._timer.join(30)
    assert not exits.codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LOST, EXIT_CODE),
        (OSError("gone"), FAILED_CODE),
        (SystemExit(143), 143),
        (SystemExit("a message"), FAILED_CODE),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_interpreter_that_waits_for_a_lost_process_ends_with_the_code_of_the_failure(
    exits: Exits, error: BaseException, code: int
) -> None:
    watch().end(error)
    assert not exits.ended.wait(0.3)  # the program may do what it likes
    exits.end_interpreter()
    assert exits.ended.wait(30)
    assert exits.codes == [code]


@pytest.mark.parametrize(("process", "wait_s"), [(0, 3.0), (1, 2.0)])
def test_process_0_waits_longer_for_the_others_than_a_process_that_has_failed_for_it(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, process: int, wait_s: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module, "sleep", slept.append)
    monkeypatch.setattr(module, "EXIT_AFTER_S", 2.0)
    monkeypatch.setattr(module, "EXIT_TOGETHER_S", 3.0)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    watch().end(OSError("gone"))
    exits.end_interpreter()
    assert exits.ended.wait(30)
    assert (exits.codes, slept) == ([FAILED_CODE], [wait_s])


def test_after_a_run_that_ends_by_itself_the_interpreter_ends_as_ever(exits: Exits) -> None:
    watch().end(None)
    assert exits.registered == []


def test_when_jax_is_about_to_end_the_process_the_last_events_are_delivered_at_once(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_AFTER_S", 300)
    told: list[PeerLost] = []
    cut_off = watch(told.append)
    cut_off.report(LOST, "cut_off")
    assert told == [LOST]
    cut_off.end(LOST)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_another_process_received_is_raised_here(
    number: signal.Signals, raised: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    guard = SignalGuard(lambda reason, number: None)
    guard.raise_received()
    with pytest.raises(raised) as caught:
        guard.raise_received(int(number))
    if raised is SystemExit:
        assert caught.value.code == 143
    assert number.name in caplog.text
