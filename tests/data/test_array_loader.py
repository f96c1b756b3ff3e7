from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from eventtrain.data.array_loader import ArrayLoader
from eventtrain.errors import ConfigurationError, DataError

ARRAYS = {"x": np.arange(20.0).reshape(10, 2), "y": (np.arange(10), np.arange(10) * 2)}


def same(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


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
        (({"x": np.ones(3), "y": np.ones(4)}, 1), DataError, r"arrays\['x'\]: 3; arrays\['y'\]: 4"),
        ((np.ones((0, 3)), 1), DataError, "no examples"),
        ((np.ones(3), 0), ConfigurationError, "batch_size must be an integer >= 1, got 0"),
        ((np.ones(3), -2), ConfigurationError, "batch_size must be an integer >= 1, got -2"),
        ((np.ones(3), 4), ConfigurationError, "only 3 examples.*drop_last=False"),
        ((np.ones(3), 1, True, -1), ConfigurationError, "seed must be .*, got -1"),
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
