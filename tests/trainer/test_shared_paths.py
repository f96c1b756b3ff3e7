"""What the processes of a run find out about their paths before it begins. Two threads stand for two processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.bus.bus import core_of
from eventtrain.control.command_queue import CommandQueue
from eventtrain.control.control_plane import ControlPlane
from eventtrain.loop.agreement.channel import Channel
from eventtrain.trainer import shared_paths
from eventtrain.trainer.shared_paths import MARK, check_paths, marked
from tests.support.key_values import KeyValues

NAME = f"{MARK}1"


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # only the other process asks
    monkeypatch.setattr(shared_paths, "LOOK_S", 0.3)


def new_queue() -> CommandQueue:
    return ControlPlane(core_of(et.EventBus())).queue


class Process:
    """One of the two."""

    def __init__(self, store: KeyValues, index: int, run_dir: Path, *subscribers: et.Subscriber) -> None:
        self.run_dir, self.subscribers, self.queue, self.decides = (
            run_dir,
            subscribers,
            new_queue(),
            index == 0,
        )
        self.asked: list[str] = []
        self.agreement: Any = SimpleNamespace(
            exchange=Channel(store, "exchange/"),
            decides=self.decides,
            ask=self._ask,
        )

    def _ask(self) -> None:
        while self.queue.arrived:
            self.asked.append(self.queue.arrived.popleft().command.kind)

    def check(self) -> str:
        """Returns the error, empty if there is none."""
        try:
            with marked(self.run_dir, self.subscribers if self.decides else (), NAME):
                check_paths(self.agreement, self.queue, self.run_dir, self.subscribers, NAME)
        except et.ConfigurationError as error:
            return str(error)
        return ""


def errors(first: tuple[Path, et.Subscriber], second: tuple[Path, et.Subscriber]) -> Sequence[str]:
    store = KeyValues()
    processes = [Process(store, index, *given) for index, given in enumerate((first, second))]
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(Process.check, processes))


def test_one_directory_is_accepted_and_left_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"{MARK}of-a-killed-run").touch()
    assert errors((tmp_path, subs.Checkpointer("c")), (tmp_path, subs.Checkpointer("c"))) == ["", ""]
    assert not list((tmp_path / "c").iterdir())


def test_a_directory_that_is_not_shared_is_refused_in_each_process_with_the_same_words(
    tmp_path: Path,
) -> None:
    (tmp_path / "theirs" / "c").mkdir(parents=True)
    first, second = errors(
        (tmp_path / "ours", subs.Checkpointer("c")), (tmp_path / "theirs", subs.Checkpointer("c"))
    )
    assert first == second
    assert first.startswith(f"Checkpointer writes to {tmp_path / 'theirs' / 'c'}, and process 1 (on ")
    assert "on a file system that they share: Trainer(run_dir=...)" in first
    assert not list((tmp_path / "ours" / "c").iterdir())


def test_a_directory_that_is_missing_is_not_shared(tmp_path: Path) -> None:
    first, second = errors(
        (tmp_path / "ours", subs.Checkpointer("c")), (tmp_path / "theirs", subs.Checkpointer("c"))
    )
    assert first == second != ""
    assert not (tmp_path / "theirs").exists()


def test_a_file_that_two_processes_would_write_is_refused_in_each_of_them(tmp_path: Path) -> None:
    def logger(path: str) -> et.Subscriber:
        made = subs.JSONLLogger(path)
        made.per_host = True
        return made

    first, second = errors((tmp_path, logger("log.jsonl")), (tmp_path, logger("x/../log.jsonl")))
    assert first == second
    assert first.startswith(f"JSONLLogger writes to {tmp_path / 'log.jsonl'} in process 0 and in process 1")
    assert "jax.process_index()" in first
    assert errors((tmp_path, logger("log-0.jsonl")), (tmp_path, logger("log-1.jsonl"))) == ["", ""]


def test_a_stop_ends_the_wait_for_a_process_that_has_not_come(tmp_path: Path) -> None:
    store = KeyValues()
    first, second = (Process(store, index, tmp_path, subs.Checkpointer("c")) for index in range(2))
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(first.check()))
    waiting.start()
    first.queue.ask_to_stop("preempted")
    waiting.join(10)
    assert found == [""]
    assert second.check() == ""  # it comes later, and the run that it joins ends at once


def test_a_stop_is_passed_to_process_0_while_that_waits_for_another_process(tmp_path: Path) -> None:
    store = KeyValues()
    second = Process(store, 1, tmp_path, subs.DeviceStats())
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(second.check()))
    waiting.start()
    second.queue.ask_to_stop("preempted")
    while not second.asked and waiting.is_alive():
        waiting.join(0.01)
    assert second.asked == ["stop"]
    second.agreement.exchange.set("paths/verdict", "")
    waiting.join(10)
    assert found == [""]
