from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device.fetcher import Fetcher
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import MetricColumns, TakenRing

LAYOUT = MetricLayout.of({"n": jnp.int32(0)}, "step_fn")


def ring(first: int, rows: int, capacity: int = 8) -> TakenRing:
    values = np.zeros((capacity, 1), np.uint32)
    values[:rows, 0] = range(first, first + rows)
    return TakenRing(jnp.asarray(values), rows, LAYOUT, window=first)


@contextmanager
def running(**options: Any) -> Iterator[tuple[Fetcher, list[Any]]]:
    delivered: list[Any] = []
    fetcher = Fetcher(**({"deliver": delivered.append} | options))
    fetcher.start()
    try:
        yield fetcher, delivered
    finally:
        fetcher.close()


def test_rings_become_columns_and_everything_keeps_its_order() -> None:
    items: list[Any] = [ring(0, 3), "an event", ring(3, 8), 7, ring(11, 0)]
    with running() as (fetcher, delivered):
        for item in items:
            fetcher.put(item)
    assert [type(item) for item in delivered] == [MetricColumns, str, MetricColumns, int, MetricColumns]
    assert delivered[1] == "an event"
    windows = [item for item in delivered if isinstance(item, MetricColumns)]
    assert [window.metrics["n"].tolist() for window in windows] == [[0, 1, 2], list(range(3, 11)), []]
    assert [(window.rows, window.window) for window in windows] == [(3, 0), (8, 3), (0, 11)]


def test_columns_are_copies_and_cannot_be_written() -> None:
    item = ring(0, 4)
    with running() as (fetcher, delivered):
        fetcher.put(item)
    item.ring.delete()
    column = delivered[0].metrics["n"]
    assert column.tolist() == [0, 1, 2, 3]
    assert not column.flags.writeable


def test_watched_hyperparameters_are_delivered_beside_the_metrics() -> None:
    layout = MetricLayout.of({}, "step_fn", watched={4: jnp.float32(0)})
    rows = jnp.stack([layout.encode({}, [jnp.float32(v)]) for v in (0.5, 0.25)])
    with running() as (fetcher, delivered):
        fetcher.put(TakenRing(rows, 2, layout, None))
    assert {k: v.tolist() for k, v in delivered[0].watched.items()} == {4: [0.5, 0.25]}


def test_put_never_blocks_and_what_waits_is_delivered_later() -> None:
    free = threading.Event()
    delivered: list[int] = []

    def deliver(columns: MetricColumns) -> None:
        assert free.wait(30)
        delivered.append(columns.window)

    with running(deliver=deliver) as (fetcher, _):
        for first in range(0, 80, 8):
            fetcher.put(ring(first, 8))
        assert delivered == []
        free.set()
    assert delivered == list(range(0, 80, 8))


def test_a_failing_delivery_is_reported_once_and_what_follows_is_discarded() -> None:
    failures: list[BaseException] = []
    delivered: list[Any] = []

    def deliver(item: Any) -> None:
        if item == "bad":
            raise ValueError("no consumer")
        delivered.append(item)

    with running(deliver=deliver, on_failure=failures.append) as (fetcher, _):
        for item in ["good", "bad", "bad", "late", ring(0, 5)]:
            fetcher.put(item)
    assert delivered == ["good"]
    assert [str(error) for error in failures] == ["no consumer"]
    assert fetcher.failure is failures[0]


def test_an_error_of_the_device_is_a_failure_of_the_fetcher() -> None:
    failures: list[BaseException] = []
    broken = ring(0, 3)
    broken.ring.delete()
    with running(on_failure=failures.append) as (fetcher, delivered):
        fetcher.put(broken)
    assert delivered == []
    assert "deleted" in str(failures[0])
    assert len(failures) == 1


def test_close_delivers_what_was_put_ends_the_thread_and_may_be_repeated() -> None:
    delivered: list[Any] = []
    fetcher = Fetcher(delivered.append)
    fetcher.start()
    for first in range(0, 50, 5):
        fetcher.put(ring(first, 5))
    fetcher.close()
    fetcher.close()
    assert sum(window.rows for window in delivered) == 50
    assert not [t for t in threading.enumerate() if t.name == "eventtrain-fetch"]
    with pytest.raises(RuntimeError, match="after close"):
        fetcher.put("late")


def test_a_fetcher_that_never_started_closes_at_once() -> None:
    fetcher = Fetcher(print)
    fetcher.close()
    with pytest.raises(RuntimeError, match="after close"):
        fetcher.put("late")


def test_the_fetch_thread_keeps_no_ring_alive_while_it_waits() -> None:
    seen = threading.Event()
    with running(deliver=lambda item: seen.set()) as (fetcher, _):
        item = ring(0, 2)
        fetcher.put(item)
        assert seen.wait(30)
        fetcher.put("next")
        shape = item.ring.shape
        pointer = item.ring.unsafe_buffer_pointer()
        del item
        fetcher.close()
        alive = [a for a in jax.live_arrays() if a.shape == shape and a.unsafe_buffer_pointer() == pointer]
    assert alive == []
