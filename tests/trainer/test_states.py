"""A state is taken as ``jax.jit`` takes it: one corpus of states under plain jit and under Trainer, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

BATCHES = [jnp.full(4, 1.0 + i, jnp.float32) for i in range(5)]
Case = tuple[Callable[[Any, Any], Any], Any]


def params() -> dict[str, jax.Array]:
    return {"w": jnp.arange(4, dtype=jnp.float32), "b": jnp.zeros(())}


def loss(tree: Any, batch: Any) -> jax.Array:
    return jnp.mean((tree["w"] * batch + tree["b"] - 1.0) ** 2)


def linen() -> Case:
    state_of = pytest.importorskip("flax.training.train_state").TrainState
    state = state_of.create(apply_fn=None, params=params(), tx=optax.adam(0.1))

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": value}

    return step, state


def dynamic_scale() -> Case:
    scale = pytest.importorskip("flax.training.dynamic_scale").DynamicScale

    def step(state: Any, batch: Any) -> Any:
        new, _, value, grads = state["scale"].value_and_grad(lambda tree: loss(tree, batch))(state["params"])
        moved = jax.tree.map(lambda leaf, grad: leaf - 0.01 * grad, state["params"], grads)
        return {"scale": new, "params": moved}, {"loss": value}

    return step, {"scale": scale(), "params": params()}


def nnx() -> Case:
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(nnx.Linear(4, 1, rngs=nnx.Rngs(0)))

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda s: jnp.mean(nnx.merge(graph, s)(batch[None]) ** 2))(state)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, state, grads), {"loss": value}

    return step, state


def equinox() -> Case:
    eqx = pytest.importorskip("equinox")

    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda model: jnp.mean(model(batch) ** 2))(state)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, state, grads), {"loss": value}

    return step, eqx.nn.Linear(4, 1, key=jax.random.key(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counted:
    w: jax.Array
    steps: int = 0
    scale: float = 1.0
    grown: float = 0


def numbers() -> Case:
    def step(state: Any, batch: Any) -> Any:
        grown = state.grown + jnp.sum(batch)
        return Counted(state.w + batch * state.scale, state.steps + 1, state.scale, grown), {
            "steps": state.steps
        }

    return step, Counted(jnp.zeros(4))


def keys() -> Case:
    def step(state: Any, batch: Any) -> Any:
        key, use = jax.random.split(state["key"])
        return {"key": key, "w": state["w"] + jax.random.normal(use, (4,)) * batch}, {}

    return step, {"key": jax.random.key(3), "w": jnp.zeros(4)}


def weak() -> Case:
    """A strong rate would make the weights float32, and the carry of the scan another type."""

    def step(state: Any, batch: Any) -> Any:
        def body(w: Any, x: Any) -> Any:
            return w - state["rate"] * x.astype(w.dtype), None

        w, _ = jax.lax.scan(body, state["w"], batch)
        return {"w": w, "rate": state["rate"]}, {"sum": w.sum()}

    return step, {"w": jnp.ones((), jnp.bfloat16), "rate": jnp.asarray(0.1)}


def weak_becomes_strong() -> Case:
    def step(state: Any, batch: Any) -> Any:
        return {"sum": state["sum"] + batch.sum(), "count": state["count"] + 1}, {}

    return step, {"sum": jnp.asarray(0.0), "count": jnp.asarray(0)}


def tied() -> Case:
    shared = jnp.ones(4)
    return lambda state, batch: ({"a": state["a"] + batch, "b": state["b"] * 2}, {}), {
        "a": shared,
        "b": shared,
    }


CASES = [
    linen, dynamic_scale, nnx, equinox, numbers, keys, weak, weak_becomes_strong, tied,
]  # fmt: skip


def bits(tree: Any) -> list[tuple[str, bytes]]:
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [(str(jnp.asarray(leaf).dtype), np.asarray(jnp.asarray(leaf)).tobytes()) for leaf in leaves]


@pytest.mark.parametrize("case", CASES)
def test_a_state_ends_as_under_plain_jit(tmp_path: Path, case: Callable[[], Case]) -> None:
    step, state = case()
    expected, jitted = state, jax.jit(step)
    for batch in BATCHES:
        expected, _ = jitted(expected, batch)
    result = et.Trainer(step, state, run_dir=tmp_path).fit(BATCHES, epochs=1)
    assert bits(result.state) == bits(expected)
    assert jax.tree.structure(result.state) == jax.tree.structure(expected)


@pytest.mark.parametrize("case", [linen, dynamic_scale, numbers, weak, weak_becomes_strong])
def test_it_is_resumed_by_a_trainer_with_the_first_state(tmp_path: Path, case: Callable[[], Case]) -> None:
    step, state = case()

    def fit(steps: int, folder: str) -> Any:
        trainer = et.Trainer(step, state, subscribers=[subs.Checkpointer("ck")], run_dir=tmp_path / folder)
        return trainer.fit(BATCHES, steps=steps, resume=True).state

    fit(2, "parts")
    assert bits(fit(5, "parts")) == bits(fit(5, "whole"))
    (newest,) = [path for path in (tmp_path / "parts/ck").iterdir() if path.name.endswith("5")]
    assert bits(et.load_state(newest, like=state)) == bits(fit(5, "whole"))


def test_a_number_that_stays_is_static_and_one_that_changes_to_another_shape_is_refused(
    tmp_path: Path,
) -> None:
    def scaled(state: Any, batch: Any) -> Any:
        assert isinstance(state["rate"], float)
        return state | {"w": state["w"] + state["rate"] * batch}, {}

    trainer = et.Trainer(scaled, {"w": jnp.zeros(4), "rate": 0.5}, run_dir=tmp_path)
    assert trainer.fit(BATCHES, epochs=1).state["rate"] == 0.5
    broken = et.Trainer(
        lambda s, b: ({"w": s["w"], "n": b}, {}), {"w": jnp.zeros(4), "n": 0}, run_dir=tmp_path
    )
    with pytest.raises(et.StateError, match=r"state\['n'\] from 0 to the array"):
        broken.fit(BATCHES, epochs=1)


def test_a_state_that_is_not_committed_goes_to_the_mesh_of_the_batch(run_on_devices: Any) -> None:
    def sharded() -> None:
        import tempfile

        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        import eventtrain as et

        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = NamedSharding(mesh, P("data"))
        batches = [jax.device_put(jnp.arange(8.0) + i, spread) for i in range(4)]

        def step(state: object, batch: object) -> object:
            return {"w": state["w"] * 0.5 + batch}, {"mean": batch.mean()}

        state = {"w": jnp.zeros(8)}
        trainer = et.Trainer(step, state, run_dir=tempfile.mkdtemp())
        result = trainer.fit(batches, epochs=1)
        expected = state
        for batch in batches:
            expected, _ = jax.jit(step)(expected, batch)
        assert np.asarray(result.state["w"]).tobytes() == np.asarray(expected["w"]).tobytes()
        assert result.state["w"].sharding.device_set == spread.device_set
        print("moved")

    assert "moved" in run_on_devices(4, sharded)
