"""Each device computes its part of the batch: with ``batch_sharding``, on several CPU devices."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eventtrain as et
from eventtrain.device.batch_sharding import BatchSharding
from tests.project.test_docs import DOCS, blocks
from tests.support.models import batches, new_state, step_fn

CHECKS = """
single = et.Trainer(train_step, make_state(), eval_fn=eval_step)
expected = single.fit(data, epochs=5, eval_data=val_data)

def assert_close(reached):
    one, other = (trainer.state["params"]["hidden"] for trainer in (reached, single))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)

one_device = float(single._model.compiled.program().cost["flops"])
for reached in (trainer, sharded):
    assert reached._model.compiled.program().cost["flops"] < 0.5 * one_device
    assert_close(reached)
assert [s.data.shape for s in sharded.state["params"]["out"].addressable_shards] == [(16,)] * 4

def predict(state, batch):
    return jnp.tanh(batch @ state["params"]["hidden"]) @ state["params"]["out"]

grouped = et.Trainer(
    train_step, make_state(), eval_fn=eval_step, predict_fn=predict, steps_per_call=4, batch_sharding=rows
)
grouped.fit(data, epochs=5)
assert_close(grouped)
short = [(x[:64], y[:64]), (x[64:94], y[64:94])]  # 30 examples are not for 4 devices
assert abs(grouped.evaluate(short)["loss"] - single.evaluate(short)["loss"]) < 1e-6
np.testing.assert_allclose(grouped.predict([x[:64], x[64:94]]), predict(single.state, x[:94]), rtol=1e-2, atol=1e-3)

own = et.Trainer(train_step, make_state(), batch_sharding=(rows, rows))
with own.session() as session:
    for batch in data(0):
        session.step(batch)
    assert session.program().cost["flops"] < 0.5 * one_device
with own.session() as session:
    for batch in data(0):
        session.step(jax.tree.map(jnp.asarray, batch))
assert own._model.compiled.compilations == 1

try:
    et.Trainer(train_step, jax.device_put(make_state(), jax.devices()[0]), batch_sharding=rows)
except et.ConfigurationError as error:
    assert "batch_sharding is over 4 devices, and the state is committed to 1 others" in str(error)
else:
    raise AssertionError("not refused")
"""


@pytest.mark.slow
def test_on_four_devices_each_computes_its_part_of_the_batch(run_on_devices: Any) -> None:
    page = "\n\n".join(block.source for block in blocks(DOCS / "data-parallel.md"))
    printed = run_on_devices(4, page + CHECKS, timeout_s=900)
    assert printed.count("val_loss") == 2


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("given", [P("data"), "data", [], {"x": None}, jax.devices])
def test_what_is_no_sharding_is_refused(given: Any) -> None:
    with pytest.raises(et.ConfigurationError, match="batch_sharding must be a NamedSharding"):
        et.Trainer(step_fn, new_state(), batch_sharding=given)


def test_shardings_like_another_batch_are_refused_by_name(tmp_path: Path) -> None:
    rows = NamedSharding(one_device(), P("data"))
    trainer = et.Trainer(step_fn, new_state(), batch_sharding={"x": rows}, run_dir=tmp_path)
    with pytest.raises(et.DataError, match=r"batch_sharding=.* is not that of the batch"):
        trainer.fit([{"x": np.ones((4, 3)), "y": np.ones(4)}], epochs=1)
    trainer = et.Trainer(step_fn, new_state(), batch_sharding={"x": rows, "y": rows}, run_dir=tmp_path)
    assert trainer.fit(batches(2), epochs=1).step == 2


def test_an_array_that_cannot_be_shared_equally_is_whole_everywhere_and_the_first_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    split = BatchSharding({"a": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P(None, "data"))})  # type: ignore[arg-type]
    treedef = jax.tree.structure({"a": (0, 0), "b": 0})
    with caplog.at_level(logging.WARNING):
        found = split.of([np.ones((8, 2)), np.float32(1), jnp.ones((2, 8))], treedef)
        assert [one.spec for one in found] == [P("data"), P(), P(None, "data")]  # type: ignore[attr-defined]
        assert not caplog.text
        found = split.of([np.ones(6), np.ones(7), np.ones((2, 8))], treedef)
    assert [one.spec for one in found] == [P(), P(), P(None, "data")]  # type: ignore[attr-defined]
    assert caplog.text.count("cannot share an array of shape (6,) equally") == 1
    assert caplog.text.count("cannot share") == 1
    stacked = split.of([np.ones((3, 8)), np.ones((3, 8)), np.ones((3, 2, 8))], treedef, stacked=True)
    assert [one.spec for one in stacked] == [P(None, "data"), P(None, "data"), P(None, None, "data")]  # type: ignore[attr-defined]
