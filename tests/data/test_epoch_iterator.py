from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain.data.batch_group import SMALL_BYTES
from eventtrain.data.epoch_iterator import EpochIterator, Leftovers
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
        self.next, self.last = 0, 3

    def __iter__(self) -> Seekable:
        return self

    def __next__(self) -> Any:
        if self.next == self.last:
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
    assert [int(group[0][0]) for group in groups] == [1, 2, 3]
    assert [group.positions for group in groups] == [(1,), (2,), (3,)]


def test_batches_on_the_device_are_handed_out_without_a_thread() -> None:
    batches = [jnp.ones(2), jnp.zeros(2)]
    iterator = of(batches)
    assert not prefetching()
    assert [batch is given for batch, given in zip(iterator.batches(), batches, strict=True)] == [True, True]


ROWS = np.arange(12.0, dtype=np.float32).reshape(6, 2)


@pytest.mark.parametrize("steps_per_call", [1, 2])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([ROWS[:2], ROWS[2:4], ROWS[4:]], [ROWS[:2], ROWS[2:4], ROWS[4:]]),
        (tuple(map(jnp.asarray, (ROWS[:2], ROWS[2:4], ROWS[4:]))), [ROWS[:2], ROWS[2:4], ROWS[4:]]),
        (et.ArrayLoader(ROWS, 2, shuffle=False), [ROWS[:2], ROWS[2:4], ROWS[4:]]),
    ],
    ids=["list", "tuple on the device", "ArrayLoader"],
)
@pytest.mark.parametrize(("start", "most"), [(0, None), (1, None), (0, 2), (1, 1), (3, None), (0, 0)])
def test_small_batches_in_memory_are_taken_without_a_thread(
    data: Any, expected: list[np.ndarray], steps_per_call: int, start: int, most: int | None
) -> None:
    iterator = of(data, steps_per_call=steps_per_call, start=start, most=most)
    assert not prefetching()
    groups = list(iter(iterator.next, None))
    end = None if most is None else start + most
    found = [np.asarray(group[index]).tolist() for group in groups for index in range(group.steps)]
    assert found == [batch.tolist() for batch in expected[start:end]]
    if not expected[start:end]:  # one to compile for
        np.testing.assert_array_equal(groups[0][0], expected[0])


def test_what_has_to_be_transferred_is_transferred_ahead_by_the_thread() -> None:
    with jax.transfer_guard_host_to_device("disallow"):
        iterators = [of([ROWS]), of(et.ArrayLoader(ROWS, 2))]
        assert [iterator._prefetcher is not None for iterator in iterators] == [True, True]
        for iterator in iterators:
            group = iterator.next()
            assert group is not None
            assert isinstance(group.call, jax.Array)
            iterator.close()
        assert of([jax.device_put(ROWS)])._prefetcher is None


def waits_for_disk(tmp_path: Path) -> et.ArrayLoader:
    stored = tmp_path / "rows.npy"
    np.save(stored, ROWS)
    return et.ArrayLoader(np.load(stored, mmap_mode="r"), 2)


class Derived(et.ArrayLoader):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda _: et.ArrayLoader(ROWS, 2, transform=lambda batch, rng: batch),
        lambda _: Derived(ROWS, 2),
        lambda _: et.ArrayLoader(np.zeros(1_000_001, np.uint8), 2),
        waits_for_disk,
        lambda _: [np.zeros(SMALL_BYTES // 8 + 1)] * 2,
        lambda _: lambda epoch: [ROWS],
        lambda _: iter([ROWS]),
    ],
    ids=["transform", "subclass", "long order", "file", "large", "callable", "iterator"],
)
def test_what_may_take_long_is_read_by_the_thread(make: Callable[[Path], Any], tmp_path: Path) -> None:
    iterator = of(make(tmp_path))
    assert iterator.next() is not None
    assert iterator._prefetcher is not None
    iterator.close()


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_empty_data_is_refused_with_its_epoch(steps_per_call: int) -> None:
    for data in ([], iter([]), lambda epoch: iter([])):
        iterator = of(data, steps_per_call=steps_per_call)
        with pytest.raises(DataError, match="data of epoch 0 is empty: it ended before its first batch"):
            iterator.next()
        iterator.close()
    assert not prefetching()


def test_a_resumed_epoch_begins_behind_the_batches_that_were_trained_on() -> None:
    skipping = of([np.full(1, i) for i in (1, 2, 3)], start=2)
    assert [int(batch[0]) for batch in skipping.batches()] == [3]
    seeking = of(Seekable(lambda i: np.full(1, i)), start=2, data_state=2)
    assert [int(batch[0]) for batch in seeking.batches()] == [3]
    for iterator in (skipping, seeking):
        iterator.close()


def test_behind_the_last_batch_there_is_one_to_compile_for_and_none_to_train_on() -> None:
    seekable = Seekable(lambda i: np.full(1, i))
    arrays = et.ArrayLoader(np.ones((3, 1)), 1)
    for data, state in (
        ([np.ones(1)] * 3, None),
        ([jnp.ones(1)] * 3, None),
        (iter([np.ones(1)] * 3), None),
        (seekable, 3),
        (lambda epoch: Seekable(lambda i: np.full(1, i)), 3),
        (arrays, None),
    ):
        iterator = of(data, start=3, data_state=state)
        group = iterator.next()
        assert group is not None
        assert (group.steps, group.positions, float(group[0].ravel()[0])) == (0, (), 1.0)
        assert iterator.next() is None
        iterator.close()
    assert seekable.next == 3  # as it was set


def test_a_run_that_ends_while_a_batch_is_awaited_gets_none() -> None:
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
    began_s = time.monotonic()
    iterator.close()
    assert time.monotonic() - began_s < 2
    free.set()


@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("make", [lambda i: np.full(1, i), lambda i: jnp.full(1, i)], ids=["numpy", "device"])
@pytest.mark.parametrize("kind", ["iterator", "with a state", "generator"])
def test_what_was_read_ahead_of_the_users_iterator_comes_first_when_it_is_given_again(
    kind: str, make: Callable[[int], Any], steps_per_call: int
) -> None:
    data: Any = map(make, range(1, 30))
    if kind == "with a state":
        data = Seekable(make)
        data.last = 29
    if kind == "generator":
        data = (make(i) for i in range(1, 30))
    leftovers, seen = Leftovers(), []
    for count in (4, 2, 5, 0, 18):
        iterator = of(data, leftovers=leftovers, steps_per_call=steps_per_call)
        while count > 0 and (group := iterator.next()) is not None:
            used = min(count, group.steps)
            seen += [int(batch[0]) for batch in (group[index] for index in range(used))]
            iterator.used(used)
            count -= used
        iterator.close()
    assert seen == list(range(1, 30))


def test_an_iterator_of_the_user_stays_open_and_one_made_from_a_callable_is_closed() -> None:
    closed = []

    def numbers(name: str) -> Iterator[np.ndarray]:
        try:
            while True:
                yield np.zeros(1)
        finally:
            closed.append(name)

    given = numbers("given")
    for data in (given, lambda epoch: numbers("made")):
        iterator = of(data)
        assert iterator.next() is not None
        iterator.close()
    assert closed == ["made"]
    given.close()


def test_a_batch_that_comes_after_the_run_ended_is_not_lost() -> None:
    free, waiter, leftovers = threading.Event(), Waiter(), Leftovers()

    def slow() -> Iterator[np.ndarray]:
        assert free.wait(30)
        yield np.full(1, 1)
        yield np.full(1, 2)

    data = slow()
    waiter.ended = True
    iterator = of(data, waiter, leftovers=leftovers)
    assert iterator.next() is None
    iterator.close()
    free.set()
    again = of(data, leftovers=leftovers)
    assert [int(batch[0]) for batch in again.batches()] == [1, 2]
    again.close()
