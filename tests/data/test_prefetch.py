from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.data.batch_group import SMALL_BYTES, BatchGroup, GroupMaker
from eventtrain.data.prefetch import DEPTH_OF_SMALL, Prefetcher
from eventtrain.data.sources import EpochReader
from tests.support.jax_compilations import x64


class Consumer:
    """Takes from a Prefetcher the way the loop does: it waits for on_ready, never by polling."""

    def __init__(self, batches: Iterator[Any], steps_per_call: int = 1, **options: Any) -> None:
        self._news = threading.Semaphore(0)
        self.prefetcher = Prefetcher(
            lambda: EpochReader(lambda epoch: batches, 0),
            GroupMaker(steps_per_call),
            on_ready=self._news.release,
            **options,
        )

    def take(self) -> BatchGroup | None:
        while not self.prefetcher.ready():
            assert self._news.acquire(timeout=30)
        return self.prefetcher.take()

    def all(self) -> list[BatchGroup]:
        return list(iter(self.take, None))


def test_batches_arrive_in_order_and_end_with_none() -> None:
    consumer = Consumer(iter([{"x": np.full(2, i), "name": i} for i in range(10)]), depth=2)
    groups = consumer.all()
    assert [group.steps for group in groups] == [1] * 10
    for i, group in enumerate(groups):
        assert group.call["x"].tolist() == [i, i]
        assert group.call["name"] == i
    assert consumer.take() is None
    assert consumer.prefetcher.close()


def test_batches_are_grouped() -> None:
    groups = Consumer(iter([np.full(1, i) for i in range(7)]), steps_per_call=3).all()
    assert [group.steps for group in groups] == [3, 3, 1]
    assert [[int(group[i][0]) for i in range(group.steps)] for group in groups] == [[0, 1, 2], [3, 4, 5], [6]]


def test_no_more_than_depth_groups_are_made_ahead_and_more_when_half_of_them_are_taken() -> None:
    made: list[int] = []
    asked = threading.Semaphore(0)
    large = np.zeros(SMALL_BYTES + 1, np.uint8)

    def counted() -> Iterator[np.ndarray]:
        for i in range(20):
            made.append(i)
            asked.release()
            yield large

    consumer = Consumer(counted(), depth=4)
    for _ in range(5):  # four wait, the fifth is made and finds no room
        assert asked.acquire(timeout=30)
    assert not asked.acquire(timeout=0.05)
    consumer.take()
    assert not asked.acquire(timeout=0.05)
    assert len(made) == 5
    consumer.take()
    for _ in range(2):
        assert asked.acquire(timeout=30)
    assert len(made) == 7
    assert consumer.prefetcher.close()


@pytest.mark.parametrize("make", [np.zeros, jnp.zeros], ids=["host", "device"])
def test_more_small_batches_may_wait(make: Any) -> None:
    asked = threading.Semaphore(0)
    batch = make(1)

    def counted() -> Iterator[Any]:
        while True:
            asked.release()
            yield batch

    consumer = Consumer(counted())
    for _ in range(DEPTH_OF_SMALL + 1):
        assert asked.acquire(timeout=30)
    assert not asked.acquire(timeout=0.05)
    assert consumer.prefetcher.close()


def test_no_batch_is_drawn_beyond_the_most() -> None:
    batches = iter([np.full(1, i) for i in range(7)])
    groups = Consumer(batches, steps_per_call=2, most=5).all()
    assert [group.steps for group in groups] == [2, 2, 1]
    assert next(batches)[0] == 5


def test_the_users_exception_comes_unchanged_after_the_batches_before_it() -> None:
    def failing() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        yield np.ones(1)
        raise OSError("the disk is gone")

    consumer = Consumer(failing(), steps_per_call=4)
    group = consumer.take()
    assert group is not None
    assert group.steps == 2
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            consumer.take()


def test_taking_before_anything_is_ready_is_an_error() -> None:
    free = threading.Event()

    def waiting() -> Iterator[np.ndarray]:
        assert free.wait(30)
        yield np.zeros(1)

    consumer = Consumer(waiting())
    assert not consumer.prefetcher.ready()
    with pytest.raises(RuntimeError, match="nothing is ready"):
        consumer.prefetcher.take()
    free.set()
    assert consumer.take() is not None


def test_close_ends_the_thread_and_closes_the_generator_in_it() -> None:
    closed_by: list[str] = []

    def endless() -> Iterator[np.ndarray]:
        try:
            while True:
                yield np.zeros(1)
        finally:
            closed_by.append(threading.current_thread().name)

    consumer = Consumer(endless(), steps_per_call=2)
    assert consumer.take() is not None
    assert consumer.prefetcher.close()
    assert consumer.prefetcher.close()
    assert closed_by == ["eventtrain-prefetch"]
    assert not [t for t in threading.enumerate() if t.name == "eventtrain-prefetch"]


def test_close_does_not_wait_for_ever_on_an_iterator_that_blocks() -> None:
    free = threading.Event()

    def stuck() -> Iterator[np.ndarray]:
        assert free.wait(30)
        yield np.zeros(1)

    consumer = Consumer(stuck())
    assert not consumer.prefetcher.close(timeout_s=0.01)
    free.set()
    assert consumer.prefetcher.close(timeout_s=30)


def test_the_position_after_each_batch_is_recorded() -> None:
    class Resumable:
        def __init__(self) -> None:
            self.next = 0

        def __iter__(self) -> Resumable:
            return self

        def __next__(self) -> np.ndarray:
            if self.next == 5:
                raise StopIteration
            self.next += 1
            return np.full(1, self.next)

        def get_state(self) -> dict[str, int]:
            return {"next": self.next}

    groups = Consumer(Resumable(), steps_per_call=2).all()
    assert [[p["next"] for p in group.positions] for group in groups] == [[1, 2], [3, 4], [5]]
    (group,) = Consumer(iter([np.zeros(1)])).all()
    assert group.positions == (None,)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_prefetch_thread_has_the_64_bit_mode_of_its_maker(enabled: bool) -> None:
    with x64(enabled):
        (group,) = Consumer(iter([np.array([2**40 if enabled else 7])])).all()
    assert group.call.dtype == (np.int64 if enabled else np.int32)
