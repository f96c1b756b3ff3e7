"""The thread that sends, with a transport that fails as it is told: again until acknowledged, reported, and ended."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.subscribers.brokers import sender
from eventtrain.subscribers.brokers.batches import EventBuffer, Message
from eventtrain.subscribers.brokers.sender import BrokerError, BrokerSender


class StubTransport:
    """Keeps what it is sent; ``fault`` is called before each message, and may raise or wait."""

    target = "stub://broker"
    most_bytes = 10_000

    def __init__(self) -> None:
        self.tries: list[Message] = []
        self.stored: list[Message] = []
        self.opened = 0
        self.fault: Callable[[], Any] = lambda: None

    async def open(self) -> None:
        self.opened += 1

    async def send(self, message: Message) -> None:
        self.tries.append(message)
        waits = self.fault()
        if waits is not None:
            await waits
        self.stored.append(message)

    async def close(self) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [event for message in self.stored for event in json.loads(message.body)]


class Rig:
    def __init__(self, limit: int = 1_000) -> None:
        self.transport = StubTransport()
        self.buffer = EventBuffer(limit)
        self.published: list[Any] = []
        self.sender = BrokerSender("rig", self.buffer, self.transport, self.published.append, limit)

    def put(self, *steps: int) -> None:
        for step in steps:
            self.buffer.put(str(step).encode())

    async def until(self, ready: Callable[[], object]) -> None:
        with anyio.fail_after(20):
            while not ready():  # noqa: ASYNC110
                await anyio.sleep(0.01)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(sender, "RETRY_S", 0.01)
    monkeypatch.setattr(sender, "SEND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(sender, "REPORT_S", 0.05)
    return Rig()


async def test_a_message_is_sent_again_as_it_is_until_it_is_acknowledged(rig: Rig) -> None:
    def fail() -> None:
        if len(rig.transport.tries) < 4:
            rig.put(len(rig.transport.tries) + 10)  # what comes meanwhile does not change the message
            raise BrokerError("it is away")

    rig.transport.fault = fail
    rig.put(1, 2)
    rig.sender.start()
    await rig.until(lambda: not rig.buffer.waiting)
    assert await rig.sender.finish(5)
    first, *again = rig.transport.tries[:4]
    assert again == [first] * 3
    assert rig.transport.steps == [1, 2, 11, 12, 13]
    assert rig.transport.opened == 4
    (failure,) = rig.published
    assert (failure.kind, failure.subscriber) == ("subscriber_failed", "rig")
    assert failure.error == "stub://broker: it is away"
    assert rig.buffer.statistics.outages == 1


async def test_what_the_limit_drops_is_reported_when_it_begins_and_counted_when_it_ends(rig: Rig) -> None:
    away = True

    def fail() -> None:
        if away:
            raise BrokerError("it is away")

    rig.transport.fault = fail
    rig.put(*range(1, 1_301))
    rig.sender.start()
    await rig.until(lambda: rig.published)
    away = False
    await rig.until(lambda: len(rig.published) == 2)
    assert await rig.sender.finish(5)
    assert rig.transport.steps == list(range(1, 1_001))
    assert [event.kind for event in rig.published] == ["subscriber_failed", "subscriber_lagged"]
    assert rig.published[1].dropped == rig.buffer.statistics.dropped == 300


async def test_a_limit_that_is_reached_without_a_failure_is_reported_too(rig: Rig) -> None:
    rig.put(*range(1_010))
    rig.sender.start()
    await rig.until(lambda: len(rig.published) == 2)
    assert await rig.sender.finish(5)
    assert "slower than the run: more than 1000 events wait" in rig.published[0].error
    assert rig.published[1].dropped == 10


async def test_a_transport_that_hangs_is_given_up_and_tried_again(rig: Rig) -> None:
    rig.transport.fault = lambda: asyncio.sleep(60) if len(rig.transport.tries) == 1 else None
    rig.put(1)
    rig.sender.start()
    await rig.until(lambda: rig.transport.stored)
    assert await rig.sender.finish(5)
    assert rig.published[0].error == "stub://broker: it did not acknowledge a message within 0.2 s"


async def test_a_transport_that_hangs_delays_the_end_by_the_timeout_and_no_longer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SEND_TIMEOUT_S", 60.0)
    rig.transport.fault = lambda: asyncio.sleep(60)
    rig.put(1, 2)
    rig.sender.start()
    await rig.until(lambda: rig.transport.tries)
    began_s = time.monotonic()
    assert not await rig.sender.finish(0.3)
    assert time.monotonic() - began_s < 5
    rig.sender.join(5)
    assert not rig.sender.is_alive()
    assert rig.buffer.waiting == 2


async def test_what_is_too_large_is_halved_and_the_size_remembered_and_one_event_given_up(rig: Rig) -> None:
    def refuse() -> None:
        if len(rig.transport.tries[-1].body) > 30:
            raise BrokerError("the server takes 30 bytes", too_large=True)

    rig.transport.fault = refuse
    rig.put(*range(100, 140), 10**40, 7)
    rig.sender.start()
    assert await rig.sender.finish(5)
    assert rig.transport.steps == [*range(100, 140), 7]
    numbers = [message.number for message in rig.transport.stored]
    assert numbers == sorted(set(numbers))
    assert len(rig.transport.tries) < 2 * len(rig.transport.stored)
    assert [event.kind for event in rig.published] == ["subscriber_failed", "subscriber_lagged"]
    assert "an event of 43 bytes was dropped" in rig.published[0].error


async def test_what_a_client_raises_is_not_quoted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def fail() -> None:
        logging.getLogger("nats.aio.client").error("to nats://user:hunter2@host")
        asyncio.get_running_loop().create_task(fails(), name="forgotten")
        if len(rig.transport.tries) < 3:
            raise ValueError("cannot send to nats://user:hunter2@host")

    async def fails() -> None:
        raise ValueError("hunter2")

    logging.getLogger("nats.aio.client")
    rig.transport.fault = fail
    rig.put(1)
    rig.sender.start()
    await rig.until(lambda: rig.transport.stored)
    assert await rig.sender.finish(5)
    assert rig.published[0].error == "stub://broker: it failed with ValueError"
    assert "hunter2" not in caplog.text


async def test_a_bus_without_room_gets_the_report_later_and_a_closed_one_none(rig: Rig) -> None:
    room = threading.Event()
    published: list[Any] = []

    def publish(event: et.Event) -> None:
        if not room.is_set():
            raise et.QueueFull("full")
        published.append(event)

    rig.sender._publish = publish
    rig.sender.start()
    for _ in range(3):
        rig.sender.refuse("it has expired")
    await anyio.sleep(0.2)
    assert not published
    room.set()
    await rig.sender.report()
    await rig.until(lambda: published)
    assert sum(event.count for event in published) == 3
    assert "commands were refused: it has expired" in published[0].error
    assert await rig.sender.finish(5)
    assert rig.buffer.statistics.refused == 3
