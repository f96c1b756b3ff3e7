from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict
from eventtrain.device.state import copy_leaves, place, split_state
from eventtrain.errors import DataError, MetricsError, StateError, StepError
from tests.support.jax_compilations import COMPILATIONS

STATE = {"w": jnp.arange(3.0), "f": jnp.tanh}


def measure(state: Any, batch: Any) -> dict[str, Any]:
    return {"sum": jnp.sum(state["f"](state["w"] * batch)), "size": batch.shape[0]}


def split(state: Any) -> tuple[list[jax.Array], Any]:
    leaves, structure = split_state(state)
    return copy_leaves(place(leaves)), structure


def batch(value: float, size: int = 1) -> np.ndarray:
    return np.full((size, 3), value, np.float32)


def test_metrics_of_all_batches_are_fetched_from_the_ring() -> None:
    leaves, structure = split(STATE)
    evaluation = CompiledEval(measure, structure, leaves, capacity=8)
    evaluation.prepare(batch(1))
    carry = evaluation.initial()
    for i in range(5):
        evaluation(carry, leaves, batch(i / 4))
    columns = evaluation.take_ring(carry).fetch().metrics
    expected = [float(jnp.sum(jnp.tanh(STATE["w"] * (i / 4)))) for i in range(5)]
    np.testing.assert_allclose(columns["sum"], expected, rtol=1e-6)
    assert columns["size"].tolist() == [1] * 5
    assert not any(leaf.is_deleted() for leaf in leaves)
    assert (carry.rows, evaluation.compilations) == (0, 1)


def test_the_last_short_batch_is_compiled_once_for_all_epochs() -> None:
    leaves, structure = split(STATE)
    evaluation = CompiledEval(measure, structure, leaves)
    evaluation.prepare(batch(1, size=4))
    carry = evaluation.initial()
    evaluation(carry, leaves, batch(1, size=2))
    COMPILATIONS.start()
    for _ in range(3):
        evaluation(carry, leaves, batch(1, size=4))
        evaluation(carry, leaves, batch(1, size=2))
    assert COMPILATIONS.since() == 0
    assert evaluation.compilations == 2


@pytest.mark.parametrize(
    ("eval_fn", "error", "expected"),
    [
        (lambda s, b: {"acc": s["w"]}, MetricsError, ["eval_fn", "'acc'", "(3,)", "jnp.mean"]),
        (lambda s, b: (s, {}), MetricsError, ["eval_fn returned tuple", "flat dict"]),
        (lambda s, b: s["v"], StepError, ["eval_fn raised KeyError: 'v'"]),
    ],
)
def test_a_broken_eval_fn_is_named(
    eval_fn: Callable[..., Any], error: type[Exception], expected: list[str]
) -> None:
    leaves, structure = split(STATE)
    with pytest.raises(error) as caught:
        CompiledEval(eval_fn, structure, leaves).prepare(batch(1))
    for part in expected:
        assert part in str(caught.value)


def test_metrics_that_depend_on_the_batch_shape_are_refused() -> None:
    leaves, structure = split(STATE)
    evaluation = CompiledEval(lambda s, b: {f"n{b.shape[0]}": 1}, structure, leaves)
    evaluation.prepare(batch(1))
    with pytest.raises(
        MetricsError, match=r"eval_fn returned other metrics.*'n2' was added; 'n1' is missing"
    ):
        evaluation(evaluation.initial(), leaves, batch(1, size=2))


def test_refusals_of_batch_state_ring_and_order() -> None:
    leaves, structure = split(STATE)
    evaluation = CompiledEval(measure, structure, leaves, capacity=1)
    with pytest.raises(StepError, match=r"prepare\(batch\) first"):
        evaluation.initial()
    evaluation.prepare(batch(1))
    carry = evaluation.initial()
    with pytest.raises(DataError, match="batch is str"):
        evaluation(carry, leaves, "text")
    with pytest.raises(StateError, match=r"state\['w'\] is float32\[4\]"):
        evaluation(carry, [jnp.zeros(4)], batch(1))
    evaluation(carry, leaves, batch(1))
    with pytest.raises(StepError, match="holds 1 rows"):
        evaluation(carry, leaves, batch(1))


def test_predictions_are_any_pytree_of_arrays() -> None:
    leaves, structure = split(STATE)
    predict = CompiledPredict(lambda s, b: {"y": s["w"] * b, "n": [b.shape[0]]}, structure, leaves)
    predict.prepare(batch(2))
    outputs = predict(leaves, batch(2))
    assert outputs["y"].tolist() == [[0, 2, 4]]
    assert outputs["n"][0].tolist() == 1
    assert predict(leaves, batch(3, size=2))["y"].shape == (2, 3)
    assert predict.compilations == 2
    assert not leaves[0].is_deleted()


def test_a_broken_predict_fn_is_named() -> None:
    leaves, structure = split(STATE)
    with pytest.raises(StepError, match=r"predict_fn returned outputs\['label'\] as str"):
        CompiledPredict(lambda s, b: {"label": "cat"}, structure, leaves).prepare(batch(1))
    with pytest.raises(StepError, match="predict_fn raised IndexError"):
        CompiledPredict(lambda s, b: [][0], structure, leaves).prepare(batch(1))
    predict = CompiledPredict(lambda s, b: s["w"], structure, leaves)
    with pytest.raises(StepError, match=r"prepare\(batch\) first"):
        predict(leaves, batch(1))
    predict.prepare(batch(1))
    with pytest.raises(DataError, match=r"batch\['t'\] is str"):
        predict(leaves, {"t": "text"})


def test_evaluation_of_a_sharded_state_works_unchanged(run_on_devices: Any) -> None:
    def sharded() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.device.compiled_eval import CompiledEval, CompiledPredict
        from eventtrain.device.state import copy_leaves, place, split_state

        for axes in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
            spread = NamedSharding(mesh, P("data"))
            leaves, structure = split_state({"w": jax.device_put(jnp.arange(16.0), spread)})
            leaves = copy_leaves(place(leaves))
            batch = jax.device_put(jnp.ones(16), spread)
            evaluation = CompiledEval(lambda s, b: {"mean": jnp.mean(s["w"] * b)}, structure, leaves)
            evaluation.prepare(batch)
            carry = evaluation.initial()
            for _ in range(3):
                evaluation(carry, leaves, batch)
            columns = evaluation.take_ring(carry).fetch().metrics
            assert columns["mean"].tolist() == [7.5] * 3
            predict = CompiledPredict(lambda s, b: s["w"] * b, structure, leaves)
            predict.prepare(batch)
            assert np.array_equal(predict(leaves, batch), np.arange(16.0))
        print("both")

    assert "both" in run_on_devices(8, sharded)
