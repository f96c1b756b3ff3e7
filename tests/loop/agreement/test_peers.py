"""Messages, signs of life and failures of the processes of a run, on a store in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import pytest

from eventtrain.errors import PeerLost
from eventtrain.loop.agreement import peers as module
from eventtrain.loop.agreement.channel import Channel
from eventtrain.loop.agreement.peers import Peers
from tests.support.key_values import KeyValues


class Process:
    """One process of a run: what it has to write, what it has read, and whom it has lost."""

    def __init__(self, store: KeyValues, index: int, count: int) -> None:
        self.unsent: deque[str] = deque()
        self.read: list[str] = []
        self.lost: list[PeerLost] = []
        self.how: list[str] = []
        self.changed = threading.Condition()
        self.peers = Peers(
            Channel(store, "run/"), index, count, next_message=self._next, take=self._take, on_lost=self._lose
        )

    def _next(self) -> str | None:
        return self.unsent.popleft() if self.unsent else None

    def _take(self, text: str) -> None:
        with self.changed:
            self.read.append(text)
            self.changed.notify_all()

    def _lose(self, lost: PeerLost, how: str) -> None:
        with self.changed:
            self.lost.append(lost)
            self.how.append(how)
            self.changed.notify_all()

    def send(self, *messages: str) -> None:
        self.unsent.extend(messages)
        self.peers.wake()

    def wait_until_read(self, count: int, timeout_s: float = 30) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.read) >= count, timeout_s)

    def wait_until_lost(self, timeout_s: float = 30) -> PeerLost:
        with self.changed:
            assert self.changed.wait_for(lambda: self.lost, timeout_s)
        return self.lost[0]


@pytest.fixture
def store() -> KeyValues:
    return KeyValues()


@pytest.fixture
def three(store: KeyValues, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Process]]:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    monkeypatch.setattr(module, "READ_S", 0.05)
    monkeypatch.setattr(module, "LOST_AFTER_S", 0.5)
    processes = [Process(store, index, 3) for index in range(3)]
    for process in processes:
        process.peers.start()
    yield processes
    for process in processes:
        process.peers.leave()


def test_every_process_reads_the_log_in_order_and_process_0_reads_all_requests(three: list[Process]) -> None:
    first, second, third = three
    first.send(*map(str, range(50)))
    second.send("a", "b")
    third.send("c")
    second.wait_until_read(50)
    third.wait_until_read(50)
    first.wait_until_read(3)
    assert second.read == third.read == [str(number) for number in range(50)]
    assert sorted(first.read) == ["a", "b", "c"]
    assert first.read.index("a") < first.read.index("b")


def test_the_store_holds_a_bounded_number_of_messages(
    store: KeyValues, three: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UNREAD", 1_000)
    first, second, third = three
    first.send(*map(str, range(20_000)))
    second.wait_until_read(20_000, 120)
    third.wait_until_read(20_000, 120)
    assert second.read[-1] == third.read[-1] == "19999"
    assert store.most < 1_100


def test_a_process_without_a_sign_of_life_is_lost_and_named(three: list[Process]) -> None:
    first, second, third = three
    third.peers._closed.set()  # as if it were killed
    third.peers.wake()
    for process in (first, second):
        lost = process.wait_until_lost()
        assert lost.process == 2
        assert "has given no sign of life" in str(lost)
        assert process.peers.lost is lost
        assert process.how == ["silent"]
    assert not third.lost


def test_a_process_that_fails_says_why_and_one_that_has_finished_is_not_lost(three: list[Process]) -> None:
    first, second, third = three
    third.peers.leave()
    second.peers.leave("DataError: the file is gone")
    lost = first.wait_until_lost()
    assert (lost.process, "DataError: the file is gone" in str(lost)) == (1, True)
    assert first.how == ["failed"]
    first.peers.wait_for_failure(10)
    assert len(first.lost) == 1


def test_a_store_that_is_gone_is_the_loss_of_process_0(
    store: KeyValues, three: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("UNAVAILABLE: socket closed")

    for name in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
        monkeypatch.setattr(store, name, gone)
    lost = three[1].wait_until_lost()
    assert (lost.process, "cannot be reached" in str(lost)) == (0, True)
    assert three[1].how == ["cut_off"]
    monkeypatch.undo()


def test_leaving_writes_what_is_left_and_ends_the_threads(three: list[Process]) -> None:
    first, second, third = three
    first.send("the last order")
    first.peers.leave()
    second.wait_until_read(1)
    third.wait_until_read(1)
    assert not any(thread.is_alive() for thread in first.peers._threads)
