from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_compilations import x64

from eventtrain.data import ArrayLoader, BatchGroup, Prefetcher, epoch_batches, on_device
from eventtrain.errors import ConfigurationError, DataError

ARRAYS = {"x": np.arange(20.0).reshape(10, 2), "y": (np.arange(10), np.arange(10) * 2)}


def same(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


# ArrayLoader


def test_every_example_comes_once_an_epoch_with_its_fields_together() -> None:
    loader = ArrayLoader(ARRAYS, 3, drop_last=False)
    assert len(loader) == 4
    batches = list(loader(0))
    assert [len(b["y"][0]) for b in batches] == [3, 3, 3, 1]
    assert sorted(np.concatenate([b["y"][0] for b in batches]).tolist()) == list(range(10))
    for b in batches:
        assert np.array_equal(b["y"][1], b["y"][0] * 2)
        assert np.array_equal(b["x"][:, 0], b["y"][0] * 2)


def test_drop_last_leaves_the_short_batch_out() -> None:
    loader = ArrayLoader(ARRAYS, 3)
    assert len(loader) == len(list(loader)) == 3


def test_without_shuffle_the_order_is_that_of_the_arrays() -> None:
    loader = ArrayLoader(ARRAYS, 5, shuffle=False)
    assert [b["y"][0].tolist() for b in loader(3)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_batches_depend_on_seed_and_epoch_only() -> None:
    loader, twin = ArrayLoader(ARRAYS, 5), ArrayLoader(ARRAYS, 5)
    list(twin(7))
    assert same(list(loader(2)), list(twin(2)))
    assert same(list(loader), list(loader(0)))
    orders = {
        tuple(np.concatenate([b["y"][0] for b in ArrayLoader(ARRAYS, 5, seed=seed)(epoch)]).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_of_an_epoch_never_changes_between_versions() -> None:
    order = [int(b["y"][0][0]) for b in ArrayLoader(ARRAYS, 1, seed=1)(1)]
    philox = np.random.Philox(key=np.array([1, 1], np.uint64), counter=np.zeros(4, np.uint64))
    assert order == np.random.Generator(philox).permutation(10).tolist()


def test_seeking_gives_the_batches_of_an_uninterrupted_epoch_augmentation_included() -> None:
    def noisy(batch: Any, rng: np.random.Generator) -> Any:
        return batch | {"x": batch["x"] + rng.normal(size=batch["x"].shape)}

    loader = ArrayLoader(ARRAYS, 2, transform=noisy, seed=3)
    whole = list(loader(4))
    for start in range(6):
        assert same(list(loader(4, start=start)), whole[start:])
    assert not same(whole, list(loader(5)))
    noise = [b["x"] - np.stack([b["y"][0] * 2, b["y"][0] * 2 + 1], axis=1) for b in whole]
    assert len({n.tobytes() for n in noise}) == 5


def test_batches_are_fresh_arrays() -> None:
    loader = ArrayLoader(ARRAYS, 5, shuffle=False)
    one, two = next(loader(0)), next(loader(0))
    assert not np.shares_memory(one["x"], two["x"])
    assert not np.shares_memory(one["x"], ARRAYS["x"])


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (({}, 1), DataError, "without any array"),
        ((None, 1), DataError, "NoneType without any array"),
        (({"x": [1, 2]}, 1), DataError, r"arrays\['x'\]\[0\] is int"),
        ((np.float32(3), 1), DataError, "arrays is float32"),
        (({"x": np.ones(3), "y": np.ones(4)}, 1), DataError, r"arrays\['x'\]: 3, arrays\['y'\]: 4"),
        ((np.ones((0, 3)), 1), DataError, "no examples"),
        ((np.ones(3), 0), ConfigurationError, "batch_size=0"),
        ((np.ones(3), -2), ConfigurationError, "batch_size=-2"),
        ((np.ones(3), 4), ConfigurationError, "only 3 examples.*drop_last=False"),
        ((np.ones(3), 1, True, -1), ConfigurationError, "seed=-1"),
        ((np.ones(3), 1, True, 2**64), ConfigurationError, r"0 <= seed < 2\*\*64"),
    ],
)
def test_arrays_and_options_that_cannot_work_are_refused(
    arguments: tuple[Any, ...], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        ArrayLoader(*arguments)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 5)])
def test_epochs_and_starts_outside_the_data_are_refused(epoch: int, start: int) -> None:
    with pytest.raises(ConfigurationError, match=f"epoch={epoch}, start={start}"):
        ArrayLoader(ARRAYS, 3)(epoch, start)


# epoch_batches


def test_an_iterable_is_iterated_anew_each_epoch() -> None:
    data = [1, 2, 3]
    assert [list(epoch_batches(data, epoch)) for epoch in range(2)] == [[1, 2, 3]] * 2


def test_a_callable_gets_the_epoch() -> None:
    assert list(epoch_batches(lambda epoch: range(epoch), 3)) == [0, 1, 2]
    loader = ArrayLoader(ARRAYS, 5)
    assert same(list(epoch_batches(loader, 1)), list(loader(1)))


@pytest.mark.parametrize("data", [3, None, "text", b"bytes", {"x": np.ones(3)}])
def test_what_yields_no_batches_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=f"data is {type(data).__name__}, which yields no batches"):
        epoch_batches(data, 0)


def test_a_callable_that_returns_no_iterable_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\(epoch=2\) returned NoneType"):
        epoch_batches(lambda epoch: None, 2)


def test_errors_of_the_users_callable_pass_unchanged() -> None:
    with pytest.raises(KeyError, match="train"):
        epoch_batches(lambda epoch: {}["train"], 0)


# Prefetcher


class Consumer:
    """Takes from a Prefetcher the way the loop does: it waits for on_ready, never by polling."""

    def __init__(self, batches: Iterator[Any], **options: Any) -> None:
        self._news = threading.Semaphore(0)
        self.prefetcher = Prefetcher(batches, on_ready=self._news.release, **options)

    def take(self) -> BatchGroup | None:
        while not self.prefetcher.ready():
            assert self._news.acquire(timeout=30)
        return self.prefetcher.take()

    def all(self) -> list[BatchGroup]:
        return list(iter(self.take, None))


def test_batches_arrive_on_the_device_in_order_and_end_with_none() -> None:
    consumer = Consumer(iter([{"x": np.full(2, i), "name": i} for i in range(10)]), depth=2)
    groups = consumer.all()
    assert [group.steps for group in groups] == [1] * 10
    for i, group in enumerate(groups):
        assert isinstance(group.batches[0]["x"], jax.Array)
        assert group.batches[0]["x"].tolist() == [i, i]
        assert group.batches[0]["name"] == i
    assert consumer.take() is None
    assert consumer.prefetcher.close()


def test_batches_are_grouped_and_the_last_group_is_padded_with_its_last_batch() -> None:
    consumer = Consumer(iter([np.full(1, i) for i in range(7)]), steps_per_call=3)
    groups = consumer.all()
    assert [group.steps for group in groups] == [3, 3, 1]
    assert [[int(b[0]) for b in group.batches] for group in groups] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_a_group_ends_where_the_next_batch_has_another_shape() -> None:
    sizes = [4, 4, 4, 2, 4, 4]
    consumer = Consumer(iter([np.full(n, i) for i, n in enumerate(sizes)]), steps_per_call=4)
    groups = consumer.all()
    assert [group.steps for group in groups] == [3, 1, 2]
    assert [{b.shape for b in group.batches} for group in groups] == [{(4,)}, {(2,)}, {(4,)}]


def test_an_iterator_that_fills_one_buffer_again_and_again_is_harmless() -> None:
    memory = np.zeros(1024 + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4  # JAX takes over memory on the CPU if it is aligned to 64 bytes
    buffer = memory[first : first + 1024]

    def reusing() -> Iterator[np.ndarray]:
        for i in range(50):
            buffer[:] = i
            yield buffer

    groups = Consumer(reusing(), depth=50).all()
    assert [set(group.batches[0].tolist()) for group in groups] == [{float(i)} for i in range(50)]


def test_no_more_than_depth_groups_are_made_ahead() -> None:
    made: list[int] = []
    asked = threading.Semaphore(0)

    def counted() -> Iterator[np.ndarray]:
        for i in range(20):
            made.append(i)
            asked.release()
            yield np.zeros(1)

    consumer = Consumer(counted(), depth=3)
    for _ in range(4):  # three wait, the fourth is made and finds no room
        assert asked.acquire(timeout=30)
    assert len(made) == 4
    consumer.take()
    assert asked.acquire(timeout=30)
    assert len(made) == 5
    assert consumer.prefetcher.close()


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


def test_empty_data_is_refused() -> None:
    with pytest.raises(DataError, match="data is empty: it ended before its first batch"):
        Consumer(iter([])).take()


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


@pytest.mark.parametrize("options", [{"steps_per_call": 0}, {"depth": 0}])
def test_counts_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="must be 1 at least"):
        Prefetcher(iter([]), **options)


def test_batches_of_jax_arrays_need_no_transfer() -> None:
    assert on_device({"x": jnp.ones(2), "n": None})
    assert not on_device({"x": jnp.ones(2), "y": np.ones(2)})
    assert not on_device({"x": 3})


@pytest.mark.parametrize("enabled", [False, True])
def test_the_prefetch_thread_has_the_64_bit_mode_of_its_maker(enabled: bool) -> None:
    with x64(enabled):
        (group,) = Consumer(iter([np.array([2**40 if enabled else 7])])).all()
    assert group.batches[0].dtype == (np.int64 if enabled else np.int32)


def test_numpy_batches_are_replicated_over_the_mesh(run_on_devices: Any) -> None:
    def replicated() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.data import Prefetcher

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        news = __import__("threading").Semaphore(0)
        batch = {"x": np.ones(8), "y": jax.device_put(jnp.ones(8), spread)}
        prefetcher = Prefetcher(iter([batch]), sharding=everywhere, on_ready=news.release)
        while not prefetcher.ready():
            assert news.acquire(timeout=30)
        (taken,) = prefetcher.take().batches
        assert taken["x"].sharding == everywhere
        assert taken["y"].sharding == spread
        assert prefetcher.close()
        print("placed")

    assert "placed" in run_on_devices(8, replicated)
