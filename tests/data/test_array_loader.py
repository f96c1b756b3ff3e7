from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from eventtrain.data.array_loader import ArrayLoader
from eventtrain.errors import ConfigurationError, DataError
from tests.conftest import RunOnDevices
from tests.support.several_processes import run_processes

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


SHARDED = """
import sys
import jax
import jax.experimental.multihost_utils
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from eventtrain import ArrayLoader

jax.distributed.initialize()
mesh = jax.make_mesh((2, 2), ("data", "model"))
arrays = {"x": np.arange(80.0).reshape(20, 4), "y": np.arange(20)}
read = []

class Recorded(np.ndarray):
    def take(self, indices, axis=None):
        read.append(len(indices))
        return np.asarray(self).take(indices, axis)

def augment(batch, rng):
    return {"x": batch["x"] + rng.normal(size=batch["x"].shape), "y": batch["y"]}

def rows(batch):
    # The rows that this process has, each once, in their order.
    found = {shard.index[0].indices(8)[0]: np.asarray(shard.data) for shard in batch.addressable_shards}
    return [found[start] for start in sorted(found)]

for transform in (None, augment):
    for start in (0, 1):
        plain = ArrayLoader(arrays, 8, seed=3, drop_last=False, transform=transform)
        sharding = NamedSharding(mesh, P("data"))
        loader = ArrayLoader(arrays, 8, seed=3, drop_last=False, transform=transform, sharding=sharding)
        assert loader.fingerprint() == plain.fingerprint()
        assert len(loader) == len(plain) == 3
        for whole, batch in zip(plain(2, start), loader(2, start), strict=True):
            for name in arrays:
                assert batch[name].shape == whole[name].shape
                assert batch[name].sharding == sharding
                (own,) = rows(batch[name])
                half = len(own)
                first = jax.process_index() * half
                expected = whole[name][first : first + half].astype(own.dtype)
                assert own.tolist() == expected.tolist(), (own, expected)

for array in loader._arrays[:1]:
    recorded = ArrayLoader(arrays, 8, sharding=sharding)
    recorded._arrays = [one.view(Recorded) for one in recorded._arrays]
    next(iter(recorded))
assert read == [4, 4], read  # half of the batch of each array, once for the two devices of this process
print("ok", flush=True)
"""


def test_two_processes_make_the_parts_of_the_batches_of_one() -> None:
    assert [one.stdout.splitlines()[-1] for one in run_processes(2, SHARDED, devices=2)] == ["ok", "ok"]


REFUSED = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from eventtrain import ArrayLoader, DataError
from eventtrain.data.epoch_iterator import EpochIterator

jax.distributed.initialize()
mesh = jax.make_mesh((2,), ("data",))
sharding = NamedSharding(mesh, P("data"))

class Waiter:
    def wait(self, ready):
        while not ready():
            pass
        return True
    def wake(self):
        pass

def batches(data, steps_per_call):
    iterator = EpochIterator(data, 0, steps_per_call=steps_per_call, sharding=NamedSharding(mesh, P()), waiter=Waiter())
    try:
        while (group := iterator.next()) is not None:
            yield group
    finally:
        iterator.close()

numbers = np.arange(8, dtype=np.float32)
for steps_per_call in (1, 2):
    scalars, own = (jax.numpy.ones(()), np.float32(1)), jax.numpy.ones(3)
    for data in ([{"x": numbers}], [scalars], [own], ArrayLoader({"x": numbers}, 4)):
        try:
            list(batches(data, steps_per_call))
        except DataError as error:
            print(error, flush=True)
        else:
            raise AssertionError(data)
    own = numbers[4 * jax.process_index() :][:4]
    given = [jax.make_array_from_process_local_data(sharding, own)]
    assert len(list(batches(given, steps_per_call))) == 1
    groups = list(batches(ArrayLoader({"x": numbers}, 2, sharding=sharding), steps_per_call))
    assert len(groups) == 4 / steps_per_call
"""


def test_other_numpy_batches_are_refused_by_name_in_a_run_of_several_processes() -> None:
    for one in run_processes(2, REFUSED):
        said = [line for line in one.stdout.splitlines() if line.startswith("The data of epoch 0 yields ")]
        assert len(said) == 8
        assert "NumPy arrays (batch['x']: float32[8]), and the run has 2 JAX processes" in said[0]
        assert "NumPy arrays (batch[1]: float32[])" in said[1]
        assert "arrays of one process (batch: float32[3])" in said[2]
        assert all("ArrayLoader(arrays, batch_size, sharding=sharding)" in line for line in said)
        assert all("make_array_from_process_local_data" in line for line in said)


def test_sharded_batches_train_on_the_devices_of_one_process(run_on_devices: RunOnDevices) -> None:
    def train() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax
        from jax.sharding import NamedSharding, PartitionSpec

        import eventtrain as et

        mesh = jax.make_mesh((2,), ("data",))
        arrays = (
            np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32),
            np.arange(20, dtype=np.float32),
        )

        def step_fn(state, batch):
            loss, grad = jax.value_and_grad(lambda w: jnp.mean((batch[0] @ w - batch[1]) ** 2))(
                state["params"]
            )
            return {"params": optax.apply_updates(state["params"], -0.1 * grad)}, {"loss": loss}

        results = []
        for sharding in (None, NamedSharding(mesh, PartitionSpec("data"))):
            for steps_per_call in (1, 2):
                data = et.ArrayLoader(arrays, 4, sharding=sharding)
                trainer = et.Trainer(step_fn, {"params": jnp.zeros(3)}, steps_per_call=steps_per_call)
                result = trainer.fit(data, epochs=2, progress=False)
                assert result.step == 10
                results.append(np.asarray(result.state["params"]))
        for params in results[1:]:
            np.testing.assert_allclose(params, results[0], rtol=1e-5)

    run_on_devices(2, train)


def test_batches_that_the_sharding_cannot_divide_are_refused_by_name(run_on_devices: RunOnDevices) -> None:
    def refuse() -> None:
        import jax
        import numpy as np
        import pytest
        from jax.sharding import NamedSharding, PartitionSpec

        from eventtrain import ArrayLoader, ConfigurationError, DataError

        mesh = jax.make_mesh((4,), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        arrays = (np.zeros((10, 3)), np.zeros(10))
        with pytest.raises(
            ConfigurationError, match=r"batch_size=6 does not fit the sharding .* another batch_size"
        ):
            ArrayLoader(arrays, 6, sharding=sharding)
        with pytest.raises(
            ConfigurationError, match=r"the last batch of 2 examples .* drop_last=True, or pad"
        ):
            ArrayLoader(arrays, 8, drop_last=False, sharding=sharding)
        assert len(ArrayLoader(arrays, 8, sharding=sharding)) == 1
        with pytest.raises(ConfigurationError, match="the last batch of 10 examples"):
            ArrayLoader(arrays, 16, drop_last=False, sharding=sharding)
        with pytest.raises(ConfigurationError, match="does not fit the sharding"):
            ArrayLoader(arrays, 8, sharding=NamedSharding(mesh, PartitionSpec(None, "data")))
        loader = ArrayLoader(arrays, 8, transform=lambda batch, rng: batch[0][:6], sharding=sharding)
        with pytest.raises(
            DataError, match=r"transform returned batch as ndarray of shape \(6, 3\), which does not"
        ):
            list(loader)
        loader = ArrayLoader(arrays, 8, transform=lambda batch, rng: {"n": 3}, sharding=sharding)
        with pytest.raises(DataError, match=r"transform returned batch\['n'\]"):
            list(loader)
        with pytest.raises(ConfigurationError, match="sharding"):
            ArrayLoader(arrays, 8, sharding=mesh)  # type: ignore[arg-type]

    run_on_devices(4, refuse)
