"""Events become messages in their order, none is lost without being counted, and a body never changes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.brokers.batches import MOST_EVENTS, EventBuffer


def table(first: int, rows: int) -> StepTable:
    steps = range(first, first + rows)
    metrics = {"loss": np.arange(first, first + rows, dtype=np.float64)}
    return StepTable(steps, 0, steps, metrics, "run", 1, "training", datetime.now(UTC), steps)


def line(number: int) -> bytes:
    return json.dumps({"step": number, "text": 'a,"\n'}, separators=(",", ":")).encode()


def steps_in(body: bytes) -> list[int]:
    return [event["step"] for event in json.loads(body)]


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 5)),
    st.tuples(st.just("table"), st.integers(1, 700)),
    st.tuples(st.just("send"), st.integers(60, 5_000)),
    st.tuples(st.just("fail"), st.integers(60, 5_000)),
    st.tuples(st.just("split"), st.integers(60, 5_000)),
)


@given(limit=st.integers(1, 2_000), operations=st.lists(OPERATIONS, max_size=30))
def test_what_is_sent_and_what_is_counted_as_dropped_is_everything_in_order(
    limit: int, operations: list[tuple[str, int]]
) -> None:
    buffer, put, sent, numbers = EventBuffer(limit), 0, list[int](), list[int]()
    frozen: dict[int, bytes] = {}

    def send(most_bytes: int) -> None:
        message = buffer.next_message(most_bytes)
        if message is None:
            return
        assert frozen.setdefault(message.number, message.body) == message.body
        assert message.events <= MOST_EVENTS
        assert message.events == 1 or len(message.body) <= most_bytes or message.number in frozen
        sent.extend(steps_in(message.body))
        numbers.append(message.number)
        buffer.acknowledge(message)

    for operation, number in operations:
        if operation == "put":
            for _ in range(number):
                put += 1
                buffer.put(line(put))
        elif operation == "table":
            buffer.put_table(table(put + 1, number))
            put += number
        elif operation == "send":
            send(number)
        elif message := buffer.next_message(number):
            frozen[message.number] = message.body
            if operation == "split" and buffer.split(message):
                del frozen[message.number]
        assert buffer.waiting <= max(limit, 1)
    while buffer.waiting:
        send(500)
    now = buffer.statistics
    assert sent == sorted(set(sent))
    assert (now.sent, now.dropped, now.waiting) == (len(sent), put - len(sent), 0)
    assert numbers == sorted(set(numbers))
    assert now.messages == len(numbers)


def test_the_limit_drops_the_newest_and_keeps_lifecycle_events() -> None:
    buffer = EventBuffer(3)
    for number in range(1, 6):
        buffer.put(line(number))
    for number in range(6, 12):
        buffer.put(line(number), lifecycle=True)
    message: Any = buffer.next_message(10_000)
    assert steps_in(message.body) == [1, 2, 3, 6, 7, 8]
    assert buffer.statistics.dropped == 5


def test_a_window_counts_as_its_steps_and_one_above_the_limit_is_sent_if_nothing_waits() -> None:
    buffer = EventBuffer(100)
    buffer.put(line(1), 1_000)
    buffer.put(line(2), 1)
    message: Any = buffer.next_message(10_000)
    assert (message.events, message.weight) == (1, 1_000)
    buffer.acknowledge(message)
    assert (buffer.statistics.sent, buffer.statistics.dropped) == (1_000, 1)


def test_a_single_event_cannot_be_split_and_can_be_given_up() -> None:
    buffer = EventBuffer(10)
    buffer.put(line(1))
    message: Any = buffer.next_message(10)
    assert not buffer.split(message)
    buffer.drop(message)
    assert buffer.statistics.dropped == 1
    assert buffer.next_message(10) is None
