from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.data.prefetch import EpochIterator
from eventtrain.errors import DataError


class Waiter:
    """Waits on a condition, until the run has to end."""

    def __init__(self) -> None:
        self.ended = False
        self._news = threading.Condition()

    def wait(self, ready: Callable[[], object]) -> bool:
        with self._news:
            assert self._news.wait_for(lambda: ready() or self.ended, timeout=30)
        return not self.ended

    def wake(self) -> None:
        with self._news:
            self._news.notify_all()


class Seekable:
    """Three batches with a state, as a Grain iterator has."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.next = 0

    def __iter__(self) -> Seekable:
        return self

    def __next__(self) -> Any:
        if self.next == 3:
            raise StopIteration
        self.next += 1
        return self.make(self.next)

    def get_state(self) -> int:
        return self.next

    def set_state(self, state: int) -> None:
        self.next = state


def of(data: Any, waiter: Waiter | None = None, **options: Any) -> EpochIterator:
    arguments: dict[str, Any] = {"steps_per_call": 1, "sharding": None} | options
    return EpochIterator(data, 0, waiter=waiter or Waiter(), **arguments)


def prefetching() -> bool:
    return any(thread.name == "eventtrain-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("make", [lambda i: np.full(1, i), lambda i: jnp.full(1, i)], ids=["numpy", "device"])
def test_every_batch_comes_with_the_state_of_the_iterator_after_it(make: Callable[[int], Any]) -> None:
    iterator = of(Seekable(make))
    groups = list(iter(iterator.next, None))
    iterator.close()
    assert [int(group.batches[0][0]) for group in groups] == [1, 2, 3]
    assert [group.positions for group in groups] == [(1,), (2,), (3,)]
    assert iterator.exhausted


def test_batches_on_the_device_are_handed_out_without_a_thread() -> None:
    batches = [jnp.ones(2), jnp.zeros(2)]
    iterator = of(batches)
    assert not prefetching()
    assert [batch is given for batch, given in zip(iterator.batches(), batches, strict=True)] == [True, True]


def test_batches_on_the_device_are_grouped_by_the_thread() -> None:
    iterator = of([jnp.ones(2)] * 3, steps_per_call=2)
    assert [group.steps for group in iter(iterator.next, None)] == [2, 1]
    iterator.close()
    assert not prefetching()


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_empty_data_is_refused_with_its_epoch(steps_per_call: int) -> None:
    with pytest.raises(DataError, match="data of epoch 0 is empty: it ended before its first batch"):
        of([], steps_per_call=steps_per_call)
    assert not prefetching()


def test_a_resumed_epoch_begins_behind_the_batches_that_were_trained_on() -> None:
    skipping = of([np.full(1, i) for i in (1, 2, 3)], start=2)
    assert [int(batch[0]) for batch in skipping.batches()] == [3]
    seeking = of(Seekable(lambda i: np.full(1, i)), start=2, data_state=2)
    assert [int(batch[0]) for batch in seeking.batches()] == [3]
    behind = of([np.full(1, 1)], start=1)
    assert behind.next() is None
    assert behind.exhausted
    for iterator in (skipping, seeking, behind):
        iterator.close()


def test_a_run_that_ends_while_a_batch_is_awaited_gets_none_and_the_epoch_is_not_exhausted() -> None:
    free, waiter = threading.Event(), Waiter()

    def stuck() -> Iterator[np.ndarray]:
        yield np.zeros(1)
        assert free.wait(30)
        yield np.ones(1)

    iterator = of(stuck(), waiter)
    assert iterator.next() is not None
    waiter.ended = True
    waiter.wake()
    assert iterator.next() is None
    assert not iterator.exhausted
    free.set()
    iterator.close()
