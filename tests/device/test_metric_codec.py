from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventtrain.device.metric_codec import MetricLayout
from eventtrain.errors import MetricsError
from tests.support.jax_compilations import x64

INTEGERS = ["int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
FLOATS = [
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e8m0fnu",
    "float4_e2m1fn",
]
WIDE = ["int64", "uint64", "float64"]


def round_trip(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    layout = MetricLayout.of(metrics, "step_fn")
    row = np.asarray(jax.jit(layout.encode)(metrics))
    assert row.dtype == np.uint32
    assert row.shape == (layout.words,)
    return layout.decode(np.stack([row, row, row]))[0]


def same_bits(column: np.ndarray, expected: np.ndarray) -> bool:
    if column.dtype != expected.dtype:
        return False
    return column.tobytes() == np.broadcast_to(expected, column.shape).tobytes()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_integer_of_every_narrow_dtype_comes_back_exactly(data: st.DataObject) -> None:
    values = {}
    for name in INTEGERS:
        limits = ml_dtypes.iinfo(name)
        values[name] = data.draw(st.integers(int(limits.min), int(limits.max)), label=name)
    columns = round_trip({name: jnp.asarray(v, name) for name, v in values.items()})
    for name, value in values.items():
        assert columns[name].tolist() == [value] * 3
        assert columns[name].dtype == np.dtype(name.replace("int4", "int8"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=len(FLOATS), max_size=len(FLOATS)))
def test_every_bit_pattern_of_every_float_dtype_comes_back(patterns: list[int]) -> None:
    metrics, expected = {}, {}
    for name, bits in zip(FLOATS, patterns, strict=True):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        width = ml_dtypes.finfo(dtype).bits
        unsigned = np.dtype(f"uint{max(8, width)}")
        value = np.array(bits % 2**width, unsigned).view(dtype)
        metrics[name] = jnp.asarray(value)
        expected[name] = value.astype(np.float32)
    columns = round_trip(metrics)
    for name in FLOATS:
        value = expected[name]
        if np.isnan(value):
            assert np.isnan(columns[name]).all()
        else:
            assert same_bits(columns[name], value), name


@settings(max_examples=30, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False, width=64),
)
def test_64_bit_values_come_back_exactly_with_x64(signed: int, unsigned: int, real: float) -> None:
    with x64(True):
        columns = round_trip(
            {
                "int64": jnp.asarray(signed, jnp.int64),
                "uint64": jnp.asarray(np.uint64(unsigned)),
                "float64": jnp.asarray(real, jnp.float64),
                "after": jnp.asarray(True),
            }
        )
    assert columns["int64"].tolist() == [signed] * 3
    assert columns["uint64"].tolist() == [unsigned] * 3
    assert columns["float64"].tolist() == [real] * 3
    assert columns["after"].tolist() == [True] * 3
    assert [columns[name].dtype.name for name in WIDE] == WIDE


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_stays_a_bool(value: bool) -> None:
    column = round_trip({"flag": jnp.asarray(value)})["flag"]
    assert column.dtype == np.bool_
    assert column.tolist() == [value] * 3


def test_nan_and_infinities_arrive_as_they_were() -> None:
    columns = round_trip({"a": jnp.float32("nan"), "b": jnp.float32("inf"), "c": -jnp.inf})
    assert np.isnan(columns["a"]).all()
    assert columns["b"].tolist() == [np.inf] * 3
    assert columns["c"].tolist() == [-np.inf] * 3


def test_a_rounded_bfloat16_is_not_replaced_by_its_unrounded_source() -> None:
    layout = MetricLayout.of({"x": jnp.bfloat16(0)}, "step_fn")
    row = jax.jit(lambda x: layout.encode({"x": (x * 1.001).astype(jnp.bfloat16)}))(1.2345678)
    expected = np.float32(ml_dtypes.bfloat16(np.float32(1.2345678) * np.float32(1.001)))
    assert layout.decode(np.asarray(row)[None])[0]["x"].tolist() == [expected]


def test_python_numbers_become_constants() -> None:
    columns = round_trip({"a": 3, "b": 0.5, "c": True, "d": np.float32(0.25)})
    assert {name: column.tolist() for name, column in columns.items()} == {
        "a": [3] * 3,
        "b": [0.5] * 3,
        "c": [True] * 3,
        "d": [0.25] * 3,
    }


def test_columns_hold_the_rows_in_order_and_cannot_be_written() -> None:
    layout = MetricLayout.of({"n": jnp.int32(0)}, "step_fn")
    rows = np.stack([np.asarray(layout.encode({"n": jnp.int32(i - 2)})) for i in range(5)])
    column = layout.decode(rows)[0]["n"]
    assert column.tolist() == [-2, -1, 0, 1, 2]
    rows[:] = 7
    assert column.tolist() == [-2, -1, 0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 1


def test_names_are_sorted_as_jax_sorts_them() -> None:
    layout = MetricLayout.of({"b": jnp.int8(0), "a": jnp.float32(0)}, "step_fn")
    assert layout.names == ("a", "b")
    assert layout.dtypes == (np.dtype(np.float32), np.dtype(np.int8))
    assert layout.words == 2


def test_no_metrics_at_all_take_one_dummy_word() -> None:
    layout = MetricLayout.of({}, "step_fn")
    assert layout.words == 1
    assert layout.encode({}).shape == (1,)
    assert layout.decode(np.zeros((4, 1), np.uint32)) == ({}, {})


def test_watched_leaves_follow_the_metrics() -> None:
    leaf = jnp.float32(0.125)
    layout = MetricLayout.of({"n": jnp.int32(4)}, "step_fn", watched={7: leaf})
    rows = np.asarray(layout.encode({"n": jnp.int32(4)}, [leaf]))[None]
    assert layout.decode(rows)[0]["n"].tolist() == [4]
    assert {k: v.tolist() for k, v in layout.decode(rows)[1].items()} == {7: [0.125]}


def test_layouts_from_arrays_tracers_and_abstract_values_are_equal() -> None:
    array = {"loss": jnp.bfloat16(1)}
    abstract = jax.eval_shape(lambda: array)
    assert MetricLayout.of(array, "a") == MetricLayout.of(abstract, "b")
    assert hash(MetricLayout.of(array, "a")) == hash(MetricLayout.of(abstract, "b"))


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (jnp.float32(1), ["step_fn", "as metrics", "flat dict"]),
        (None, ["NoneType", "flat dict"]),
        ({1: jnp.float32(1)}, ["the key 1", "int", "str"]),
        ({"loss": jnp.ones((3, 2))}, ["'loss'", "(3, 2)", "float32", "jnp.mean"]),
        ({"loss": jnp.ones(1)}, ["'loss'", "(1,)", "jnp.mean"]),
        ({"loss": {"a": jnp.float32(1)}}, ["'loss'", "dict", "Flatten", "loss/"]),
        ({"loss": "low"}, ["'loss'", "str", "not an array"]),
        ({"loss": None}, ["'loss'", "NoneType", "not an array"]),
        ({"z": jnp.complex64(1j)}, ["'z'", "complex64", "jnp.abs"]),
        ({"key": jax.random.key(0)}, ["'key'", "key<fry>"]),
        ({"n": 2**40}, ["'n'", str(2**40), "64-bit"]),
    ],
)
def test_what_cannot_be_a_metric_is_refused_by_name(metrics: Any, expected: list[str]) -> None:
    with pytest.raises(MetricsError) as caught:
        MetricLayout.of(metrics, "step_fn")
    for part in expected:
        assert part in str(caught.value)


def test_a_changed_layout_names_what_was_added_is_missing_or_changed() -> None:
    before = MetricLayout.of({"a": jnp.float32(0), "b": jnp.int32(0)}, "step_fn")
    after = MetricLayout.of({"a": jnp.bfloat16(0), "c": jnp.int32(0)}, "step_fn")
    before.require_same(before, "step_fn")
    with pytest.raises(MetricsError) as caught:
        before.require_same(after, "step_fn")
    text = str(caught.value)
    assert "'a' changed from float32 to bfloat16" in text
    assert "'b' is missing" in text
    assert "'c' was added" in text
