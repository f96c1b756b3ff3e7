"""Promises over TCP on this machine: delivered, refused, cut off, and repeated in the log."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import pytest

import eventtrain as et
from eventtrain.control.control_plane import ControlPlane
from eventtrain.loop.agreement import agreement, peers
from eventtrain.loop.agreement.agreement import Follower, Leader
from eventtrain.loop.agreement.channel import Channel
from eventtrain.loop.agreement.log import Moment, Promise
from eventtrain.loop.agreement.promise_stream import KEY, PromiseReceiver, PromiseSender
from tests.support.key_values import KeyValues

HOST = "127.0.0.1"


def until(ready: Callable[[], object], timeout_s: float = 20) -> None:
    end_s = monotonic() + timeout_s
    while not ready():
        assert monotonic() < end_s
        sleep(0.002)


class Receiving:
    """Another process: what it has received."""

    def __init__(self, channel: Channel, host: str | None = HOST) -> None:
        self.received: list[Promise] = []
        self.receiver = PromiseReceiver(channel, host, self.received.append, 0.05)


@pytest.fixture
def channel() -> Channel:
    return Channel(KeyValues(), "run/")


@pytest.fixture
def sender(channel: Channel) -> Iterator[PromiseSender]:
    sender = PromiseSender(channel, 2, HOST)
    yield sender
    sender.close()


def promise(number: int) -> Promise:
    return Promise(number, Moment(2, 3 * number), 7)


def sends(sender: PromiseSender, promise: Promise) -> bool:
    sender.accept()
    return sender.send(promise)


def test_each_process_gets_every_promise_in_order(channel: Channel, sender: PromiseSender) -> None:
    others = [Receiving(channel), Receiving(channel)]
    until(lambda: sends(sender, promise(0)))
    for number in range(1, 100):
        assert sender.send(promise(number))
    for other in others:
        until(lambda other=other: len(other.received) >= 100)
        assert other.received == [promise(number) for number in range(100)]
        other.receiver.close()
        other.receiver.close()


def test_nothing_is_sent_before_every_process_is_connected(channel: Channel, sender: PromiseSender) -> None:
    one = Receiving(channel)
    until(lambda: sends(sender, promise(0)) or len(sender._connected) == 1)
    assert not sender.send(promise(0))
    one.receiver.close()
    assert one.received == []


@pytest.mark.parametrize("sent", [b"", b"x" * 10, b"x" * 64])
def test_who_does_not_know_the_secret_gets_nothing(
    channel: Channel, sender: PromiseSender, sent: bytes
) -> None:
    found = channel.wait_for(KEY, 1)
    assert found is not None
    port = int(found.split()[0])
    strangers = [socket.create_connection((HOST, port)) for _ in range(20)]
    for stranger in strangers:
        stranger.sendall(sent)
    others = [Receiving(channel), Receiving(channel)]
    until(lambda: sends(sender, promise(0)))
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
        stranger.close()
    for other in others:
        until(lambda other=other: other.received)
        other.receiver.close()


@pytest.mark.parametrize("host", [None, "192.0.2.1"])
def test_where_nobody_can_connect_all_is_left_to_the_log(channel: Channel, host: str | None) -> None:
    sender = PromiseSender(channel, 1, host)  # 192.0.2.1 is no address of this machine
    other = Receiving(channel)
    other.receiver._thread.join(5)
    assert not other.receiver._thread.is_alive()
    assert not sends(sender, promise(0))
    sender.close()


def test_a_connection_that_is_cut_leaves_the_rest_to_the_log(channel: Channel, sender: PromiseSender) -> None:
    others = [Receiving(channel), Receiving(channel)]
    until(lambda: sends(sender, promise(0)))
    others[0].receiver.close()
    until(lambda: not sender.send(promise(1)))
    others[1].receiver._thread.join(5)
    assert not others[1].receiver._thread.is_alive()


def test_a_process_that_does_not_read_holds_nobody_up(channel: Channel, sender: PromiseSender) -> None:
    stopped = threading.Event()
    for _ in range(2):
        PromiseReceiver(channel, HOST, lambda promise: stopped.wait(20), 0.05)
    until(lambda: sends(sender, promise(0)))
    began_s = monotonic()
    while sender.send(promise(1)):
        assert monotonic() - began_s < 20
    stopped.set()


def ignore(*arguments: Any) -> None: ...


def plane() -> ControlPlane:
    return ControlPlane(et.EventBus()._core)


class Run:
    """Process 0 and another one of a run, on a store in memory."""

    def __init__(self) -> None:
        self.store = KeyValues()
        channel = Channel(self.store, "run/")
        self.leader = Leader(channel, 2, plane(), ignore, ignore)
        self.follower = Follower(channel, 1, 2, plane().queue, ignore)

    def promise(self, count: int) -> None:
        self.leader._log.promise(Moment(0, count))
        self.leader._peers.wake()

    def leave(self) -> None:
        self.follower.end()
        self.leader.end()
        self.follower.leave()
        self.leader.leave()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(peers, "BEAT_S", 0.02)
    monkeypatch.setattr(peers, "READ_S", 0.05)
    monkeypatch.setattr(agreement, "READ_S", 0.05)
    monkeypatch.setattr(agreement, "coordinator_host", lambda: HOST)
    run = Run()
    yield run
    run.leave()


def records(run: Run) -> int:
    return run.leader._records


def test_promises_go_past_the_store(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.promise(1)
    until(lambda: len(run.leader._stream._connected) == 1)
    monkeypatch.setattr(peers, "BEAT_S", 2)
    sleep(0.1)  # no repetition is under way
    before = records(run)
    for count in range(2, 200):
        run.promise(count)
        until(lambda count=count: run.follower._log.promised == Moment(0, count))
    assert records(run) - before <= 1


def test_a_promise_that_is_lost_on_its_way_is_in_the_log_a_beat_later(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.leader._stream, "send", lambda promise: True)
    run.promise(5)
    until(lambda: run.follower._log.promised == Moment(0, 5))
    before = records(run)
    sleep(0.2)
    assert records(run) == before  # once, not at each beat
