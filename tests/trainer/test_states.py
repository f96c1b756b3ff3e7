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


def narrow() -> Case:
    """Frozen weights of less than a byte an element, as of a quantised model, and one such leaf that changes."""
    names = [name for name in NARROW if hasattr(jnp, name)]

    def step(state: Any, batch: Any) -> Any:
        base = sum(state[name].astype(jnp.float32) for name in names)
        value, grad = jax.value_and_grad(lambda w: jnp.mean((w * batch + base) ** 2))(state["w"])
        flipped = jnp.where(batch > 2, -state["int4"], state["int4"])
        return state | {"w": state["w"] - 0.1 * grad, "int4": flipped}, {"loss": value}

    unsigned = ("uint2", "uint4", "float8_e8m0fnu")
    made = {name: jnp.asarray([1, 1 if name in unsigned else -1, 1, 1]).astype(name) for name in names}
    return step, made | {"w": jnp.ones(4)}


NARROW = ("int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e8m0fnu", "float8_e4m3fn")


def columns_first() -> Case:
    """Another layout than JAX' own, as `jax.device_put` or a compiled function can give to an array."""
    layouts = pytest.importorskip("jax.experimental.layout")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = layouts.Format(layouts.Layout(major_to_minor=(1, 0)), device)

    def step(state: Any, batch: Any) -> Any:
        new = state["w"] * 0.5 + batch
        return state | {"w": new}, {"sum": new.sum()}

    wide = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    return step, {"w": jax.device_put(wide, layout), "base": jax.device_put(wide, layout)}


CASES = [
    linen, dynamic_scale, nnx, equinox, numbers, keys, weak, weak_becomes_strong, tied, narrow, columns_first,
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


@pytest.mark.parametrize(
    "case", [linen, dynamic_scale, numbers, weak, weak_becomes_strong, narrow, columns_first]
)
def test_it_is_resumed_by_a_trainer_with_the_first_state(tmp_path: Path, case: Callable[[], Case]) -> None:
    step, state = case()

    def fit(steps: int, folder: str) -> Any:
        trainer = et.Trainer(step, state, subscribers=[subs.Checkpointer("ck")], run_dir=tmp_path / folder)
        return trainer.fit(BATCHES, steps=steps, resume=True).state

    fit(2, "parts")
    assert bits(fit(5, "parts")) == bits(fit(5, "whole"))
    (newest,) = [path for path in (tmp_path / "parts/ck").iterdir() if path.name.endswith("5")]
    assert bits(et.load_state(newest, like=state)) == bits(fit(5, "whole"))


@pytest.mark.parametrize("case", [narrow, columns_first])
@pytest.mark.parametrize(
    "options", [{"steps_per_call": 2}, {"donate": False}, {"snapshot": "copy"}, {"debug": True}]
)
def test_its_layout_is_taken_by_every_compiled_function(
    tmp_path: Path, case: Callable[[], Case], options: Any
) -> None:
    step, state = case()
    trainer = et.Trainer(
        step,
        state,
        lambda state, batch: {"sum": state["w"].sum()},
        lambda state, batch: state["w"],
        subscribers=[subs.Checkpointer("ck", every=2)],
        step_extensions=[et.EMA(0.5)],
        params=lambda state: {"w": state["w"]},
        run_dir=tmp_path,
        **options,
    )
    before = trainer.evaluate(BATCHES[:1])
    result = trainer.fit(BATCHES, epochs=2, eval_data=BATCHES[:1])
    expected = state
    for batch in BATCHES * 2:
        expected, _ = jax.jit(step)(expected, batch)
    assert bits(result.state) == bits(expected)
    assert before["sum"] == float(state["w"].sum())
    assert len(list(trainer.predict(BATCHES[:1]))) > 0


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


def test_a_sharded_state_ends_as_under_plain_jit_with_its_shardings(run_on_devices: Any) -> None:
    def sharded() -> None:
        import pathlib
        import tempfile

        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        import eventtrain as et
        from eventtrain import subscribers as subs

        optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)

        def loss(params: object, batch: object) -> jax.Array:
            return jnp.mean((jnp.tanh(batch @ params["w"] + params["b"]) * params["scale"] - 0.5) ** 2)

        def step(state: object, batch: object) -> object:
            value, grads = jax.value_and_grad(loss)(state["params"], batch)
            updates, opt = optimiser.update(grads, state["opt"], state["params"])
            return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": value}

        def made(mesh: object) -> object:
            """Parameters split over both axes, one axis and none, and Adam's moments as their parameters."""
            specs = {"w": P("data", "model"), "b": P("model"), "scale": P()}
            params = {"w": jnp.arange(32.0).reshape(8, 4) / 32, "b": jnp.zeros(4), "scale": jnp.ones(())}
            state = {"params": params, "opt": optimiser.init(params)}
            place = lambda path, leaf: jax.device_put(  # noqa: E731
                leaf, NamedSharding(mesh, specs.get(getattr(path[-1], "key", None), P()))
            )
            return jax.tree_util.tree_map_with_path(place, state)

        def bits(tree: object) -> list[bytes]:
            return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]

        def shardings(tree: object) -> list[object]:
            return [leaf.sharding for leaf in jax.tree.leaves(tree)]

        def fit(state: object, data: object, steps: int, folder: pathlib.Path, options: object) -> object:
            saves = subs.Checkpointer("ck", every=2)
            trainer = et.Trainer(step, state, subscribers=[saves], run_dir=folder, **options)
            return trainer.fit(data, steps=steps, resume=True).state

        for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
            over = NamedSharding(mesh, P(None, None))
            batches = [jax.device_put(jnp.ones((4, 8)) * (i + 1) / 8, over) for i in range(6)]
            state = made(mesh)
            placed = shardings(state)
            jitted = jax.jit(step, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
            expected = state
            for batch in batches:
                expected, _ = jitted(expected, batch)
            for options in ({}, {"steps_per_call": 3}, {"donate": False}):
                folder = pathlib.Path(tempfile.mkdtemp())
                result = fit(made(mesh), batches, 6, folder / "whole", options)
                assert bits(result) == bits(expected), (kind, options)
                assert shardings(result) == placed, (kind, options)
                fit(made(mesh), batches, 2, folder / "parts", options)
                resumed = fit(made(mesh), batches, 6, folder / "parts", options)
                assert bits(resumed) == bits(expected), (kind, options)
                assert shardings(resumed) == placed, (kind, options)
            loaded = et.load_state(folder / "whole/ck/step-00000006", like=state)
            assert bits(loaded) == bits(expected)
            assert shardings(loaded) == placed
        print("the same")

    assert "the same" in run_on_devices(4, sharded)
