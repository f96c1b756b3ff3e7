from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.extensions import StepExtension
from eventtrain.device.fused_step import StepOptions
from eventtrain.device.hyperparams import find_hyperparams, write
from eventtrain.device.metric_ring import MetricColumns
from eventtrain.device.state import copy_leaves, place, split_state
from eventtrain.device.weight_averaging import EMA
from eventtrain.errors import (
    ConfigurationError,
    DataError,
    MetricsError,
    SnapshotError,
    StateError,
    StepError,
)
from tests.support.jax_compilations import COMPILATIONS, x64

OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)


def initial_state(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    w1, w2 = jax.random.split(jax.random.key(seed))
    params = {
        "w1": jax.random.normal(w1, (4, 16), dtype) / 2,
        "b1": jnp.zeros(16, dtype),
        "w2": jax.random.normal(w2, (16, 3), dtype) / 4,
    }
    return {"params": params, "opt_state": OPTIMISER.init(params), "count": jnp.asarray(0, jnp.int32)}


def train(state: dict[str, Any], batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    def loss_of(params: Any) -> jax.Array:
        hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
        return jnp.mean(jnp.square(hidden @ params["w2"] - batch["y"]))

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, opt_state = OPTIMISER.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "count": state["count"], "even": state["count"] % 2 == 0}
    return {"params": params, "opt_state": opt_state, "count": state["count"] + 1}, metrics


def batches(number: int, size: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {
            "x": random.normal(size=(size, 4)).astype(np.float32),
            "y": random.normal(size=(size, 3)).astype(np.float32),
        }
        for _ in range(number)
    ]


OPTIONS = {field.name for field in dataclasses.fields(StepOptions)}


def build(
    step_fn: Callable[..., Any], state: Any, batch: Any, **arguments: Any
) -> tuple[CompiledStep, Carry]:
    leaves, structure = split_state(state)
    placed = copy_leaves(place(leaves))
    options = StepOptions(**{name: arguments.pop(name) for name in OPTIONS & arguments.keys()})
    step = CompiledStep(step_fn, structure, placed, options=options, **arguments)
    step.prepare(batch)
    return step, step.initial(placed)


def references(carry: Carry) -> tuple[list[jax.Array], list[jax.Array]]:
    """What a snapshot of this boundary refers to; a keeping call has to follow."""
    return carry.leaves, carry.ext_leaves


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many leaves each copy on the device had, of those that a keeping call makes without its variant."""
    counts: list[int] = []

    def counted(leaves: list[jax.Array]) -> list[jax.Array]:
        counts.append(len(leaves))
        return copy_leaves(leaves)

    monkeypatch.setattr("eventtrain.device.compiled_step.copy_leaves", counted)
    return counts


def on_host(leaves: list[jax.Array]) -> list[bytes]:
    return [np.array(leaf).tobytes() for leaf in leaves]


def fetched(step: CompiledStep, carry: Carry) -> dict[str, list[Any]]:
    return {name: column.tolist() for name, column in step.take_ring(carry).fetch().metrics.items()}


# What a step computes


def test_steps_compute_what_a_bare_jitted_loop_computes() -> None:
    data = batches(20)
    step, carry = build(train, initial_state(), data[0])
    state, losses = initial_state(), []
    bare = jax.jit(train)
    for batch in data:
        step(carry, batch)
        state, metrics = bare(state, batch)
        losses.append(float(metrics["loss"]))
    assert carry.rows == 20
    columns = fetched(step, carry)
    assert columns["loss"] == losses
    assert columns["count"] == list(range(20))
    assert columns["even"] == [i % 2 == 0 for i in range(20)]
    assert on_host(carry.leaves) == on_host(jax.tree.leaves(state))
    assert carry.rows == 0


def test_step_fn_is_traced_once_for_both_variants(copied: list[int]) -> None:
    traces = []

    def counted(state: Any, batch: Any) -> Any:
        traces.append(1)
        return train(state, batch)

    step, carry = build(counted, initial_state(), batches(1)[0])
    step.request_keeping()
    step.close()
    step(carry, batches(1)[0], keep=True)
    assert copied == []
    assert len(traces) == 1


@pytest.mark.parametrize("per_call", [2, 5, 16])
def test_groups_of_steps_are_bitwise_equal_to_single_steps(per_call: int) -> None:
    data = batches(37)
    single, one = build(train, initial_state(), data[0], extensions=[EMA(0.9)])
    for batch in data:
        single(one, batch)
    padded = [data[i : i + per_call] for i in range(0, len(data), per_call)]
    groups = [(tuple(g + g[-1:] * (per_call - len(g))), len(g)) for g in padded]
    grouped, many = build(
        train, initial_state(), groups[0][0], extensions=[EMA(0.9)], steps_per_call=per_call
    )
    COMPILATIONS.start()
    for index, (group, count) in enumerate(groups):
        split = index % (count + 1)  # every way of cutting a group in two, the empty ones included
        grouped(many, group, 0, split)
        grouped(many, group, split, count)
    assert COMPILATIONS.since() == 0
    assert many.rows == 37
    assert on_host(many.leaves) == on_host(one.leaves)
    assert on_host(many.ext_leaves) == on_host(one.ext_leaves)
    assert fetched(grouped, many) == fetched(single, one)


def test_a_bfloat16_state_trains_as_in_a_bare_loop() -> None:
    state = initial_state(dtype=jnp.bfloat16) | {"opt_state": OPTIMISER.init(jnp.zeros(()))}

    def train(state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
            return jnp.mean(jnp.square(hidden @ params["w2"] - batch["y"]))

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        params = jax.tree.map(lambda p, g: p - g / 8, state["params"], gradients)
        return state | {"params": params}, {"loss": loss}

    data = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), b) for b in batches(10)]
    step, carry = build(train, state, data[0])
    bare = jax.jit(train)
    losses = []
    for batch in data:
        step(carry, batch)
        state, metrics = bare(state, batch)
        losses.append(float(metrics["loss"]))
    assert fetched(step, carry)["loss"] == losses
    assert on_host(carry.leaves) == on_host(jax.tree.leaves(state))


@pytest.mark.parametrize("per_call", [1, 3])
def test_int64_and_float64_metrics_are_exact_with_x64(per_call: int) -> None:
    def multiply(state: Any, batch: Any) -> Any:
        return {"n": state["n"] * 3 + batch}, {"n": state["n"], "x": state["n"] * 0.1}

    with x64(True):
        five = np.int64(5) if per_call == 1 else (np.int64(5),) * per_call
        step, carry = build(multiply, {"n": jnp.asarray(2**40 + 1, jnp.int64)}, five, steps_per_call=per_call)
        for _ in range(0, 12, per_call):
            step(carry, five, 0, per_call)
        columns = fetched(step, carry)
    expected = [2**40 + 1]
    while len(expected) < 12:
        expected.append(expected[-1] * 3 + 5)
    assert columns["n"] == expected
    assert columns["x"] == [value * 0.1 for value in expected]


def test_watched_hyperparameters_are_recorded_beside_the_metrics() -> None:
    state = initial_state()
    (rate,) = [h for h in find_hyperparams(state) if h.name == "learning_rate"]
    step, carry = build(train, state, batches(1)[0], hyperparams_watched=[rate.leaf_index])
    for i, batch in enumerate(batches(4)):
        carry.leaves[rate.leaf_index] = write(carry.leaves[rate.leaf_index], 2.0**-i)
        step(carry, batch)
    columns = step.take_ring(carry).fetch()
    assert columns.watched[rate.leaf_index].tolist() == [1.0, 0.5, 0.25, 0.125]
    assert "learning_rate" not in columns.metrics


# Donation


def test_every_donated_leaf_is_deleted_after_each_step() -> None:
    step, carry = build(train, initial_state(), batches(1)[0], extensions=[EMA(0.9)])
    for batch in batches(20):
        old = [*carry.leaves, *carry.ext_leaves, carry.ring]
        cursor = carry.cursor
        step(carry, batch)
        assert [leaf.is_deleted() for leaf in old] == [True] * len(old)
        assert not cursor.is_deleted()


def test_a_pass_through_leaf_is_donated_and_survives_a_keeping_step() -> None:
    def ignoring(state: Any, batch: Any) -> Any:
        return state | {"w": state["w"] + batch}, {}

    state = {"w": jnp.zeros(3), "frozen": jnp.arange(4.0), "key": jax.random.key(7)}
    step, carry = build(ignoring, state, np.float32(1))
    step.request_keeping()
    step.close()
    kept, _ = references(carry)
    step(carry, np.float32(1), keep=True)
    before = [np.array(kept[0]), np.array(kept[2])]
    for _ in range(5):
        step(carry, np.float32(1))
    assert [leaf.is_deleted() for leaf in kept] == [False] * 3
    assert before[0].tolist() == [0, 1, 2, 3] == kept[0].tolist() == carry.leaves[0].tolist()
    assert before[1].tolist() == [0, 0, 0] == kept[2].tolist()
    assert carry.leaves[2].tolist() == [6, 6, 6]
    assert jnp.array_equal(jax.random.key_data(carry.leaves[1]), jax.random.key_data(state["key"]))


def test_without_donation_old_states_survive_and_keeping_needs_no_variant(copied: list[int]) -> None:
    step, carry = build(train, initial_state(), batches(1)[0], donate=False)
    old, ring = carry.leaves, carry.ring
    step(carry, batches(1)[0], keep=True)
    assert copied == []
    assert not any(leaf.is_deleted() for leaf in old)
    assert ring.is_deleted()


@pytest.mark.parametrize("compiled", [True, False], ids=["keeping", "copy"])
@pytest.mark.parametrize("per_call", [1, 4])
def test_kept_states_survive_bit_for_bit_while_donating_steps_follow(
    compiled: bool, per_call: int, copied: list[int]
) -> None:
    data = [b if per_call == 1 else (b,) * per_call for b in batches(100)]
    step, carry = build(train, initial_state(), data[0], extensions=[EMA(0.9)], steps_per_call=per_call)
    if compiled:
        step.request_keeping()
        step.close()
    bare, twin = build(train, initial_state(), data[0], extensions=[EMA(0.9)], steps_per_call=per_call)
    survivors = []
    for batch in data:
        expected = on_host([*twin.leaves, *twin.ext_leaves])
        survivors.append((references(carry), expected))
        step(carry, batch, 0, per_call, keep=True)
        step(carry, batch, 0, per_call)
        bare(twin, batch, 0, per_call)
        bare(twin, batch, 0, per_call)
    same = [on_host([*leaves, *ext_leaves]) == expected for (leaves, ext_leaves), expected in survivors]
    assert same == [True] * 100
    assert copied == ([] if compiled else [len(carry.leaves) + len(carry.ext_leaves)] * 100)
    assert on_host(carry.leaves) == on_host(twin.leaves)
    assert step.compilations == 1


def test_the_keeping_variant_is_compiled_once_in_a_thread_of_its_own(copied: list[int]) -> None:
    step, carry = build(train, initial_state(), batches(1)[0])
    COMPILATIONS.start()
    for _ in range(3):
        step.request_keeping()
    step.close()
    assert COMPILATIONS.since() == 1
    step(carry, batches(1)[0], keep=True)
    step(carry, batches(1)[0])
    assert copied == []
    assert COMPILATIONS.since() == 1
    assert not [t for t in threading.enumerate() if t.name == "eventtrain-compile-keeping"]


def test_a_keeping_variant_that_does_not_compile_is_logged_and_replaced_by_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, copied: list[int]
) -> None:
    class Hopeless:
        def compile(self) -> Any:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: while compiling" + "\nbuffer" * 1000)

    step, carry = build(train, initial_state(), batches(1)[0])
    monkeypatch.setattr(step._executables.current, "_lowered", Hopeless())
    step.request_keeping()
    step.close()
    (record,) = caplog.records
    assert "RESOURCE_EXHAUSTED: while compiling" in record.getMessage()
    assert "copy on the device" in record.getMessage()
    assert len(record.getMessage().splitlines()) <= 20
    kept, _ = references(carry)
    expected = on_host(kept)
    step(carry, batches(1)[0], keep=True)
    assert copied == [len(kept)]
    assert on_host(kept) == expected


@pytest.mark.parametrize("compiled", [True, False], ids=["keeping", "copy"])
def test_no_room_for_a_snapshot_is_said_and_leaves_the_state_usable(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, carry = build(train, initial_state(), batches(1)[0])

    def full(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 2 GiB")

    if compiled:
        step.request_keeping()
        step.close()
        monkeypatch.setattr(step._executables.current, "keeping", full)
    else:
        monkeypatch.setattr("eventtrain.device.compiled_step.copy_leaves", full)
    with pytest.raises(SnapshotError, match=r"no memory for a second state of \d+ bytes"):
        step(carry, batches(1)[0], keep=True)
    step(carry, batches(1)[0])
    assert fetched(step, carry)["count"] == [0]


# Compilation


def test_a_thousand_steps_with_hyperparameter_writes_compile_nothing() -> None:
    state = initial_state()
    (rate,) = [h for h in find_hyperparams(state) if h.name == "learning_rate"]
    data = [jax.device_put(b) for b in batches(4)]
    step, carry = build(train, state, data[0], hyperparams_watched=[rate.leaf_index])
    step.request_keeping()
    step.close()
    values = [0.5, 1, np.float64(0.25), np.float32(0.125), jnp.asarray(0.0625), jnp.float32(2), np.int64(3)]
    written = []
    step(carry, data[0])
    step.take_ring(carry)
    COMPILATIONS.start()
    for i in range(1000):
        if i % 50 == 0:
            value = values[i // 50 % len(values)]
            written.append(float(value))
            carry.leaves[rate.leaf_index] = write(carry.leaves[rate.leaf_index], value)
        step(carry, data[i % 4], keep=i % 90 == 0)
    assert COMPILATIONS.since() == 0
    used = step.take_ring(carry).fetch().watched[rate.leaf_index]
    assert used[0::50].tolist() == written
    assert used[49::50].tolist() == written
    jax.jit(lambda x: x + COMPILATIONS.since())(jnp.ones(3))
    assert COMPILATIONS.since() > 0  # the positive control: the counter counts


def test_each_batch_signature_is_compiled_once() -> None:
    short, long = batches(3, size=4), batches(3, size=8)
    step, carry = build(train, initial_state(), long[0])
    assert step.compilations == 1
    for one, other in zip(short, long, strict=True):
        step(carry, one)
        step(carry, other)
    assert step.compilations == 2
    assert fetched(step, carry)["count"] == list(range(6))


def test_lowering_runs_through_the_caller_and_compiling_does_not() -> None:
    calls = []

    def through_caller(function: Callable[[], Any]) -> Any:
        COMPILATIONS.start()
        lowered = function()
        calls.append(COMPILATIONS.since())
        return lowered

    step, carry = build(train, initial_state(), batches(1)[0], lower_on_caller=through_caller)
    step(carry, batches(1, size=3)[0])
    assert len(calls) == 2


def test_a_refused_batch_leaves_the_carry_as_it_was() -> None:
    step, carry = build(train, initial_state(), batches(1)[0])
    step(carry, batches(1)[0])
    before = (carry.leaves, carry.ring, carry.cursor, carry.rows)
    refused = [
        ({"x": "text", "y": batches(1)[0]["y"]}, DataError, r"batch\['x'\] is str"),
        ({"x": np.array(["a"]), "y": batches(1)[0]["y"]}, DataError, r"batch\['x'\] is ndarray of dtype <U1"),
        ({"x": object(), "y": 1.0}, DataError, r"batch\['x'\] is object"),
        ({"x": np.zeros((8, 5), np.float32), "y": batches(1)[0]["y"]}, StepError, "step_fn raised TypeError"),
        ({"z": np.zeros(3)}, StepError, "step_fn raised KeyError: 'x'"),
    ]
    for batch, error, message in refused:
        for keep in (False, True):
            with pytest.raises(error, match=message):
                step(carry, batch, keep=keep)
    assert (carry.leaves, carry.ring, carry.cursor, carry.rows) == before
    assert not any(leaf.is_deleted() for leaf in [*carry.leaves, carry.ring, carry.cursor])
    step(carry, batches(1)[0])
    assert fetched(step, carry)["count"] == [0, 1]


def test_metrics_that_depend_on_the_batch_shape_are_refused() -> None:
    def moody(state: Any, batch: Any) -> Any:
        metrics = {"loss": jnp.sum(batch)} if batch.shape[0] > 2 else {"lost": jnp.int32(1)}
        return state + 1, metrics

    step, carry = build(moody, jnp.zeros(()), np.zeros(3, np.float32))
    with pytest.raises(MetricsError, match="'lost' was added; 'loss' is missing"):
        step(carry, np.zeros(2, np.float32))
    step(carry, np.zeros(3, np.float32))
    assert fetched(step, carry)["loss"] == [0]


def test_an_exhausted_ring_is_refused_before_rows_are_lost() -> None:
    step, carry = build(train, initial_state(), batches(1)[0], capacity=3)
    for batch in batches(3):
        step(carry, batch)
    with pytest.raises(StepError, match="holds 3 rows and 3 are used"):
        step(carry, batches(1)[0])
    assert fetched(step, carry)["count"] == [0, 1, 2]
    step(carry, batches(1)[0])
    assert fetched(step, carry)["count"] == [3]


def test_a_state_without_metrics_still_counts_its_rows() -> None:
    step, carry = build(lambda s, b: (s + b, {}), jnp.zeros(2), np.float32(1))
    for _ in range(5):
        step(carry, np.float32(1))
    taken = step.take_ring(carry, "the caller's")
    assert taken.ring.shape == (1024, 1)
    assert taken.fetch() == MetricColumns({}, 5, "the caller's", {})


# What step_fn must not do

START = {"w": jnp.zeros((2, 3)), "n": 1, "f": jax.nn.relu, "h": jnp.zeros((), jnp.bfloat16)}


@pytest.mark.parametrize(
    ("result", "error", "expected"),
    [
        (lambda s: s, StepError, ["returned dict instead of a pair", "return state, {"]),
        (lambda s: (s, {}, 1), StepError, ["returned tuple of 3 instead"]),
        (lambda s: None, StepError, ["returned NoneType instead"]),
        (lambda s: (s, {"loss": s["w"]}), MetricsError, ["step_fn", "'loss'", "(2, 3)", "jnp.mean"]),
        (lambda s: (s, jnp.float32(1)), MetricsError, ["flat dict"]),
        (
            lambda s: (s | {"w": s["w"][0]}, {}),
            StateError,
            ["state['w'] is float32[3] instead of float32[2,3]", "shapes and dtypes must stay"],
        ),
        (
            lambda s: (s | {"w": s["w"].astype(jnp.bfloat16)}, {}),
            StateError,
            ["state['w'] is bfloat16[2,3] instead of float32[2,3]", ".astype"],
        ),
        (
            lambda s: (s | {"n": s["n"] + 1}, {}),
            StateError,
            ["state['n'] from 1 to 2", "with jnp.asarray"],
        ),
        (
            lambda s: (s | {"n": jnp.asarray(s["n"])}, {}),
            StateError,
            ["state['n'] from 1 to the array int32[]", "with jnp.asarray"],
        ),
        (
            lambda s: (s | {"f": jax.nn.gelu}, {}),
            StateError,
            ["state['f'] from ", "not arrays", "outside the state"],
        ),
        (lambda s: (s | {"w": "x"}, {}), StateError, ["state['w'] is str instead", "jnp.asarray"]),
        (lambda s: (s | {"h": 2**200}, {}), StateError, ["state['h'] is int instead of bfloat16[]"]),
        (lambda s: (s | {"h": 1e300}, {}), StateError, ["state['h'] is float instead of bfloat16[]"]),
        (lambda s: (s | {"new": s["w"]}, {}), StateError, ["another structure", "['new'] was added"]),
        (lambda s: ({"w": s["w"]}, {}), StateError, ["['f'] is missing", "['n'] is missing"]),
        (lambda s: ([s], {}), StateError, ["another structure"]),
        (lambda s: 1 / 0, StepError, ["step_fn raised ZeroDivisionError: division by zero"]),
        (lambda s: (s, {"a": float(s["w"][0, 0])}), StepError, ["step_fn raised ConcretizationTypeError"]),
    ],
)
def test_a_broken_contract_is_named(
    result: Callable[[Any], Any], error: type[Exception], expected: list[str]
) -> None:
    with pytest.raises(error) as caught:
        build(lambda state, batch: result(state), START, np.float32(1))
    for part in expected:
        assert part in str(caught.value)


def test_the_error_of_step_fn_is_chained() -> None:
    def broken(state: Any, batch: Any) -> Any:
        raise ValueError("no such head")

    with pytest.raises(StepError, match="step_fn raised ValueError: no such head") as caught:
        build(broken, jnp.zeros(2), np.float32(1))
    assert isinstance(caught.value.__cause__, ValueError)


def test_python_numbers_and_weak_types_in_place_of_scalars_are_taken() -> None:
    step, carry = build(
        lambda s, b: ({"a": 0.5, "b": jnp.where(b > 0, 1.0, 2.0), "c": 3}, {}),
        {"a": jnp.float32(0), "b": jnp.float32(0), "c": jnp.int32(0)},
        np.float32(1),
    )
    for _ in range(3):
        step(carry, np.float32(1))
    assert [leaf.tolist() for leaf in carry.leaves] == [0.5, 1.0, 3]
    assert step.compilations == 1


def test_a_state_of_other_shapes_is_refused_when_it_is_put_in_place() -> None:
    step, carry = build(lambda s, b: (s, {}), {"w": jnp.zeros(3)}, np.float32(1))
    with pytest.raises(
        StateError, match=r"compiled for .*state\['w'\] is float32\[4\] instead of float32\[3\]"
    ):
        step.initial([jnp.zeros(4)])
    with pytest.raises(StateError, match="1 array leaves, got 2"):
        step.initial([jnp.zeros(3)] * 2)
    carry.leaves = [jnp.zeros(4)]
    for keep in (False, True):
        with pytest.raises(StateError, match=r"state\['w'\] is float32\[4\]"):
            step(carry, np.float32(1), keep=keep)


def test_a_step_that_was_not_prepared_says_so() -> None:
    leaves, structure = split_state(jnp.zeros(2))
    step = CompiledStep(lambda s, b: (s, {}), structure, place(leaves))
    with pytest.raises(StepError, match=r"prepare\(batch\) first"):
        step.initial(place(leaves))
    with pytest.raises(StepError, match=r"prepare\(batch\) first"):
        step.take_ring(Carry(jnp.zeros(0), jnp.zeros(0), leaves=[], ext_leaves=[]))


# Extensions inside the step


def test_an_extension_sees_the_weights_after_every_step_and_their_count() -> None:
    class Last(StepExtension):
        name = "last"

        def init(self, params: Any) -> Any:
            return {"w": params, "step": jnp.asarray(0)}

        def update(self, ext_state: Any, params: Any, step: jax.Array) -> Any:
            return {"w": params, "step": step}

    step, carry = build(
        lambda s, b: ({"w": s["w"] + b, "other": s["other"]}, {}),
        {"w": jnp.zeros(2), "other": jnp.ones(1)},
        np.float32(1),
        extensions=[Last(), EMA(0.5)],
        params=lambda state: state["w"],
    )
    for _ in range(3):
        step(carry, np.float32(1))
    states = step.extension_states(carry.ext_leaves)
    assert states["last"]["w"].tolist() == [3, 3]
    assert states["last"]["step"].tolist() == 3
    assert states["ema"].tolist() == [0.5 * (0.5 * 0.5 + 1) + 1.5] * 2
    resumed = step.initial(carry.leaves, carry.ext_leaves)
    step(resumed, np.float32(1))
    assert step.extension_states(resumed.ext_leaves)["last"]["step"].tolist() == 4
    anew = step.initial(copy_leaves(resumed.leaves), step=10)
    step(anew, np.float32(1))
    assert step.extension_states(anew.ext_leaves)["last"]["step"].tolist() == 11


def test_extensions_that_break_their_contract_are_named() -> None:
    class Growing(EMA):
        def update(self, ext_state: Any, params: Any, step: jax.Array) -> Any:
            return jnp.concatenate([ext_state, ext_state])

    class Raising(EMA):
        def update(self, ext_state: Any, params: Any, step: jax.Array) -> Any:
            raise LookupError("nothing there")

    plus = functools.partial(build, lambda s, b: (s + b, {}), jnp.zeros(2), np.float32(1))
    with pytest.raises(StateError, match=r"step_extensions returned .*'ema'.*is complex64\[4\]"):
        plus(extensions=[Growing(0.5)])
    with pytest.raises(StepError, match=r"EMA\(0.5, name='ema'\).update raised LookupError"):
        plus(extensions=[Raising(0.5)])
    with pytest.raises(StepError, match="params raised KeyError"):
        plus(extensions=[EMA(0.5)], params=lambda state: {}["weights"])
    with pytest.raises(ConfigurationError, match=r"\['ema', 'ema'\]"):
        plus(extensions=[EMA(0.5), EMA(0.9)])


# Several devices


@pytest.mark.slow
def test_sharded_states_and_batches_work_unchanged(run_on_devices: Any) -> None:
    def sharded() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.device.compiled_step import CompiledStep
        from eventtrain.device.fused_step import StepOptions
        from eventtrain.device.state import copy_leaves, place, split_state
        from eventtrain.device.weight_averaging import EMA

        def train(state, batch):
            def loss_of(w):
                return jnp.mean(jnp.square(jnp.tanh(batch @ w["in"]) @ w["out"]))

            loss, grad = jax.value_and_grad(loss_of)(state["w"])
            w = jax.tree.map(lambda w, g: w - 0.1 * g, state["w"], grad)
            return {"w": w, "n": state["n"] + 1}, {"loss": loss, "n": state["n"]}

        random = np.random.default_rng(0)
        weights = {"in": random.normal(size=(8, 16)), "out": random.normal(size=(16, 4))}
        data = [random.normal(size=(16, 8)).astype(np.float32) for _ in range(12)]
        results = {}
        for axes in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes, axes))
            specs = {"in": P(None, "model"), "out": P("model", None)}
            for per_call in (1, 4):
                for with_mesh in (False, True):
                    state = {
                        "w": {
                            k: jax.device_put(jnp.asarray(v, jnp.float32), NamedSharding(mesh, specs[k]))
                            for k, v in weights.items()
                        },
                        "n": np.int32(0),
                    }
                    if axes == AxisType.Explicit:
                        # in explicit mode the contraction over a sharded axis must be spelled out
                        state["w"] = jax.device_put(state["w"], NamedSharding(mesh, P()))
                    leaves, structure = split_state(state)
                    leaves = copy_leaves(place(leaves))
                    shardings = [leaf.sharding for leaf in leaves]
                    spec = P() if axes == AxisType.Explicit else P("data")
                    placed = [jax.device_put(b, NamedSharding(mesh, spec)) for b in data]
                    groups = [
                        tuple(placed[i : i + per_call]) if per_call > 1 else placed[i]
                        for i in range(0, 12, per_call)
                    ]
                    context = jax.set_mesh(mesh) if with_mesh else None
                    step = CompiledStep(
                        train,
                        structure,
                        leaves,
                        options=StepOptions(steps_per_call=per_call),
                        extensions=[EMA(0.9)],
                        params=lambda s: s["w"],
                    )
                    if context is not None:
                        with context:
                            step.prepare(groups[0])
                    else:
                        step.prepare(groups[0])
                    carry = step.initial(leaves)
                    step.request_keeping()
                    step.close()
                    for i, group in enumerate(groups):
                        old = carry.leaves
                        step(carry, group, 0, per_call, keep=i == 1)
                        deleted = [leaf.is_deleted() for leaf in old]
                        assert deleted == [i != 1] * len(old), deleted
                        if i == 1:
                            before = [np.array(leaf) for leaf in old]
                            survivors = old
                    assert [leaf.sharding for leaf in carry.leaves] == shardings
                    for one, other in zip(before, survivors, strict=True):
                        assert np.array_equal(one, np.asarray(other))
                    taken = step.take_ring(carry)
                    assert taken.ring.sharding.is_fully_replicated
                    columns = taken.fetch().metrics
                    assert columns["n"].tolist() == list(range(12))
                    assert step.compilations == 1
                    results[axes, per_call, with_mesh] = columns["loss"]
        expected = results[AxisType.Auto, 1, False]
        for key, losses in results.items():
            np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(key))
        print("8 configurations")

    assert "8 configurations" in run_on_devices(8, sharded)


def test_explicit_mesh_axes_keep_each_leaf_where_it_was(run_on_devices: Any) -> None:
    def explicit() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        from eventtrain.device.compiled_step import CompiledStep
        from eventtrain.device.fused_step import StepOptions
        from eventtrain.device.state import copy_leaves, place, split_state
        from eventtrain.device.weight_averaging import EMA

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

        def spread(state, batch):
            w = state["w"] * 0.5 + batch
            return {"w": w, "n": state["n"] + 1, "lr": state["lr"]}, {"mean": jnp.mean(w), "c": 3}

        def gathered(state, batch):
            state, metrics = spread(state, batch)
            moved = jax.sharding.reshard(state["w"], NamedSharding(mesh, P()))
            return state | {"w": moved, "lr": 0.5}, metrics

        runs = 0
        for step_fn in (spread, gathered):
            for per_call in (1, 3):
                for spec in (P("data"), P(), None):
                    state = {"w": jnp.arange(16.0), "n": np.int32(0), "lr": jnp.float32(0.5)}
                    state["w"] = jax.device_put(state["w"], NamedSharding(mesh, P("data")))
                    batch = np.ones(16, np.float32)
                    if spec is not None:
                        batch = jax.device_put(batch, NamedSharding(mesh, spec))
                    batch = batch if per_call == 1 else (batch,) * per_call
                    leaves, structure = split_state(state)
                    leaves = copy_leaves(place(leaves))
                    step = CompiledStep(
                        step_fn,
                        structure,
                        leaves,
                        options=StepOptions(steps_per_call=per_call),
                        extensions=[EMA(0.5)],
                        params=lambda s: s["w"],
                    )
                    with jax.set_mesh(mesh):
                        step.prepare(batch)
                    carry = step.initial(leaves)
                    for _ in range(0, 6, per_call):
                        step(carry, batch, 0, per_call)
                    columns = step.take_ring(carry).fetch().metrics
                    expected = np.array([2 + 5.5 * 0.5**i for i in range(1, 7)])
                    assert np.allclose(columns["mean"], expected), columns
                    assert columns["c"].tolist() == [3] * 6
                    assert carry.leaves[2].sharding.spec == P("data")
                    assert carry.ext_leaves[1].sharding.spec == P("data")
                    assert step.compilations == 1
                    runs += 1
        print(runs, "runs")

    assert "12 runs" in run_on_devices(8, explicit)
