from __future__ import annotations

from typing import Any, Literal

import pytest

import eventtrain as et
from eventtrain.errors import QueueFull
from eventtrain.events import PeerLost, RunFailed, SubscriberLagged
from eventtrain.loop.agreement.forwarding import (
    MOST_CHARACTERS,
    MOST_IN_A_MESSAGE,
    Forwarded,
    Outbox,
    publish_forwarded,
)


class Measured(et.Event):
    kind: Literal["measured"] = "measured"
    value: float
    text: str = ""


class Unwritable(et.Event):
    kind: Literal["unwritable"] = "unwritable"

    def model_dump_json(self, **options: Any) -> str:
        raise ValueError("cannot be written")


def measured(*values: float, text: str = "") -> list[Measured]:
    return [Measured(step=3, value=value, text=text) for value in values]


def taken(outbox: Outbox) -> list[Forwarded]:
    messages: list[Forwarded] = []
    while (text := outbox.take()) is not None:
        messages.append(Forwarded.model_validate_json(text))
    return messages


def test_an_event_arrives_equal_with_the_process_and_without_a_number() -> None:
    woken: list[int] = []
    outbox = Outbox(2, lambda: woken.append(1))
    event = Measured(step=3, value=float("nan"), run_id="r")
    event.__dict__["seq"] = 7
    outbox.offer([event])
    assert woken == [1]
    published: list[et.Event] = []
    (message,) = taken(outbox)
    publish_forwarded(message, published.append)
    (arrived,) = published
    assert type(arrived) is Measured
    assert (arrived.process, arrived.seq, arrived.step, arrived.run_id) == (2, 0, 3, "r")
    assert arrived.value != arrived.value


@pytest.mark.parametrize(
    "event",
    [
        RunFailed(error="x"),
        PeerLost(process=1, error="x"),
        et.CheckpointCommitted(path="x", tag=None, size_bytes=1, duration_s=1.0),
    ],
)
def test_what_process_0_publishes_itself_is_not_forwarded(event: et.Event) -> None:
    outbox = Outbox(1, lambda: None)
    outbox.offer([event])
    assert taken(outbox) == []


def test_at_most_so_many_wait_and_the_others_are_counted_once() -> None:
    outbox = Outbox(1, lambda: None, limit=5)
    outbox.offer(measured(*range(3)))
    outbox.offer(measured(*range(3, 9)))
    (message,) = taken(outbox)
    assert len(message.events) == 5
    assert (message.dropped, message.step) == (4, 3)
    outbox.offer(measured(9))
    (message,) = taken(outbox)
    assert (len(message.events), message.dropped) == (1, 0)


def test_messages_are_bounded_and_in_order() -> None:
    outbox = Outbox(1, lambda: None)
    outbox.offer(measured(*range(MOST_IN_A_MESSAGE + 1)))
    outbox.offer(measured(1000, 1001, 1002, text="x" * (MOST_CHARACTERS * 2 // 5)))
    outbox.offer(measured(1003, text="x" * (MOST_CHARACTERS + 1)))
    outbox.offer(measured(1004))
    messages, published = taken(outbox), list[et.Event]()
    assert max(sum(len(event.text) for event in message.events) for message in messages) <= MOST_CHARACTERS
    assert max(len(message.events) for message in messages) <= MOST_IN_A_MESSAGE
    for message in messages:
        publish_forwarded(message, published.append)
    values = [event.value for event in published if isinstance(event, Measured)]
    assert values == [*range(MOST_IN_A_MESSAGE + 1), 1000, 1001, 1002, 1004]
    assert sum(event.dropped for event in published if isinstance(event, SubscriberLagged)) == 1


def test_an_event_that_cannot_be_written_is_counted() -> None:
    outbox = Outbox(1, lambda: None)
    outbox.offer([Unwritable()])
    (message,) = taken(outbox)
    assert (message.events, message.dropped) == ((), 1)


def test_what_a_full_queue_or_an_unknown_class_keeps_out_is_reported() -> None:
    outbox = Outbox(1, lambda: None)
    outbox.offer(measured(1, 2))
    (message,) = taken(outbox)
    unknown = message.events[0].model_copy(update={"type": "elsewhere.Event"})
    message = message.model_copy(update={"events": (*message.events, unknown), "dropped": 5})
    published: list[et.Event] = []

    def publish(event: et.Event) -> None:
        if isinstance(event, Measured) and event.value == 2:
            raise QueueFull("full")
        published.append(event)

    publish_forwarded(message, publish)
    assert [type(event) for event in published] == [Measured, SubscriberLagged]
    assert isinstance(published[1], SubscriberLagged)
    assert (published[1].dropped, published[1].process, published[1].step) == (7, 1, 3)
