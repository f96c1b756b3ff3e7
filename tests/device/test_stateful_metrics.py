"""Metrics with state: merged on the device over batches of any size, computed once, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from sklearn import metrics as sklearn_metrics

from eventtrain.device.compiled_eval import CompiledEval
from eventtrain.device.state import place, split_state
from eventtrain.device.stateful_metrics import HostArray
from eventtrain.errors import MetricsError, StateError, StepError
from tests.support.stateful_metrics import AUC, F1, Confusion, Summed, measured, scored, uneven

LEAVES, STRUCTURE = split_state({"w": jnp.arange(3.0)})
LEAVES = place(LEAVES)


def evaluated(eval_fn: Callable[..., Any], batches: list[Any]) -> dict[str, HostArray]:
    """What the metrics of ``eval_fn`` with state compute."""
    evaluation = CompiledEval(eval_fn, STRUCTURE, LEAVES)
    evaluation.prepare(batches[0])
    carry = evaluation.initial()
    for batch in batches:
        evaluation(carry, LEAVES, batch)
    return evaluation.take_values(carry).fetch().arrays


def test_numbers_on_uneven_batches_agree_with_scikit_learn() -> None:
    examples = scored()
    found = evaluated(measured, uneven(examples))
    score, label = examples["score"], examples["label"]
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(label, score > 0.5), abs=1e-7)
    assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(label, score), abs=1e-7)
    expected = sklearn_metrics.confusion_matrix(examples["class"], examples["predicted"])
    assert found["confusion"].tolist() == expected.tolist()
    assert not found["confusion"].flags.writeable


def test_an_evaluation_that_was_cut_short_continues_with_its_states() -> None:
    batches = uneven(scored())
    whole = evaluated(measured, batches)
    evaluation = CompiledEval(measured, STRUCTURE, LEAVES)
    evaluation.prepare(batches[0])
    carry = evaluation.initial()
    for batch in batches[:2]:
        evaluation(carry, LEAVES, batch)
    states = list(evaluation.take_states(carry).fetch().arrays.values())
    carry = evaluation.initial(states)
    for batch in batches[2:]:
        evaluation(carry, LEAVES, batch)
    parts = evaluation.take_values(carry).fetch().arrays
    assert {name: value.tolist() for name, value in parts.items()} == {
        n: v.tolist() for n, v in whole.items()
    }
    with pytest.raises(StateError, match="cut short cannot continue"):
        evaluation.initial(states[:-1])


@struct.dataclass
class Average:
    """As of clu.metrics, with a Python number that no merge changes and one that it does."""

    total: jax.Array
    count: int
    scale: int

    def merge(self, other: Average) -> Average:
        return Average(self.total + other.total, self.count + other.count, self.scale)

    def compute(self) -> dict[str, Any]:
        return {"mean": self.total / self.count, "first": [self.total][: self.scale]}


def test_python_numbers_are_static_unless_merge_changes_them() -> None:
    def eval_fn(state: Any, batch: Any) -> Any:
        return {"x": Average(batch.sum(), len(batch), 1)}

    found = evaluated(eval_fn, [np.float32([1, 2, 3]), np.float32([6])])
    assert {name: value.tolist() for name, value in found.items()} == {"x/mean": 3.0, "x/first/0": 12.0}


def test_a_collection_may_be_all_that_eval_fn_returns() -> None:
    found = evaluated(lambda state, batch: Average(batch.sum(), len(batch), 1), [np.float32([1, 3])])
    assert found["mean"] == 2.0


def test_metrics_of_flax_nnx_are_merged_by_their_state() -> None:
    def eval_fn(state: Any, batch: Any) -> Any:
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("loss"))
        metrics.update(loss=batch)
        return metrics

    values = np.random.default_rng(0).normal(3, 2, 13).astype(np.float32)
    found = evaluated(eval_fn, [values[:6], values[6:12], values[12:]])
    assert found["loss"] == pytest.approx(values.mean(), rel=1e-6)
    assert found["spread/mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert found["spread/standard_deviation"] == pytest.approx(values.std(), rel=1e-5)


class Own(nnx.metrics.Metric):
    def __init__(self) -> None:
        self.seen = nnx.metrics.MetricState(jnp.zeros(2))

    def reset(self) -> None: ...
    def update(self, **_: Any) -> None: ...
    def compute(self) -> Any:
        return self.seen[...]


@jax.tree_util.register_dataclass
@dataclass
class Collected:
    """Grows, as a metric that collects examples does."""

    values: Any

    def merge(self, other: Collected) -> Collected:
        return Collected(jnp.concatenate([self.values, other.values]))

    def compute(self) -> Any:
        return jnp.median(self.values)


@jax.tree_util.register_dataclass
@dataclass
class OnHost(Summed):
    value: Any

    def compute(self) -> Any:
        return {"x": float(self.value)}


@pytest.mark.parametrize(
    ("metrics", "error", "expected"),
    [
        (
            {"median": Collected(jnp.ones(4))},
            MetricsError,
            r"merge\(\) changed the state.*\[4\] to float32\[8\].*bins",
        ),
        ({"own": Own()}, MetricsError, r"the metric 'own' \(Own\).*merge\(other\)"),
        (
            {"host": OnHost(jnp.ones(()))},
            StepError,
            r"compute\(\) of the metric 'host' \(OnHost\) raised Concret",
        ),
        ({"f1": F1(jnp.ones((), jnp.complex64), 2)}, MetricsError, "state.*complex"),
        ({"f1/x": 1.0, "f1": Average(jnp.ones(()), 1, 1)}, None, ""),
        ({"x/mean": 1.0, "x": Average(jnp.ones(()), 1, 1)}, MetricsError, "two metrics named 'x/mean'"),
        (Confusion(jnp.ones(2)), MetricsError, "without a name"),
    ],
)
def test_what_cannot_be_merged_on_the_device_is_refused_by_name(
    metrics: Any, error: Any, expected: str
) -> None:
    def eval_fn(state: Any, batch: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf + 0 * batch.sum().astype(leaf.dtype) if hasattr(leaf, "dtype") else leaf,
            metrics,
        )

    if error is None:
        evaluated(eval_fn, [np.float32([1])])
        return
    with pytest.raises(error, match=expected):
        evaluated(eval_fn, [np.float32([1])])


def test_a_state_that_depends_on_the_size_of_the_batch_is_refused() -> None:
    with pytest.raises(
        MetricsError, match=r"another state for a batch of another shape.*\.positives is int32\[1\]"
    ):
        evaluated(lambda s, b: {"a": AUC(jnp.zeros_like(b), b)}, [np.int32([1, 2]), np.int32([1])])


def test_states_are_merged_over_a_mesh(run_on_devices: Any) -> None:
    def sharded() -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.device.compiled_eval import CompiledEval
        from eventtrain.device.state import place, split_state
        from tests.support.stateful_metrics import Confusion

        for axes in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4,), ("data",), axis_types=(axes,))
            spread = NamedSharding(mesh, P("data"))
            leaves, structure = split_state({"w": jax.device_put(jnp.arange(3), NamedSharding(mesh, P()))})
            leaves = place(leaves)
            batch = jax.device_put(jnp.arange(8) % 3, spread)

            def eval_fn(state, batch):
                one_hot = state["w"][:, None] == batch[None, :]
                return {"confusion": Confusion(jnp.sum(one_hot, axis=1))}

            evaluation = CompiledEval(eval_fn, structure, leaves)
            evaluation.prepare(batch)
            carry = evaluation.initial()
            for _ in range(3):
                evaluation(carry, leaves, batch)
            assert evaluation.take_values(carry).fetch().arrays["confusion"].tolist() == [9, 9, 6]
        print("both")

    assert "both" in run_on_devices(4, sharded)
