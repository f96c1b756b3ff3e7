"""Rows of steps by columns: byte for byte what the events would have said."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain.subscribers._shared.step_table import StepTable, json_lines

WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
NAMES = ["loss", "a,b", 'say "x"', "line\nbreak", "größe 损失", "back\\slash", "%s {0}", "", "step", "\t"]
EXTREMES = {
    "float32": [0.0, -0.0, 1 / 3, 1e-45, 3.4028235e38, math.nan, math.inf, -math.inf],
    "float64": [0.1, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf, 1e16, 123456789.123],
    "int64": [0, -1, 2**63 - 1, -(2**63), 2**53 + 1, 7, 8, 9],
    "uint64": [0, 1, 2**64 - 1, 2**63, 2**53 + 1, 7, 8, 9],
    "int8": [0, -128, 127, 1, 2, 3, 4, 5],
    "bool": [True, False, True, True, False, False, True, False],
}


def make_window(metrics: dict[str, Any], rows: int, *, first_step: int = 1, first_batch: int = 0) -> Any:
    return et.StepsCompleted(
        run_id='a "run"',
        seq=99,
        time=WHEN,
        step=first_step + rows - 1,
        first_step=first_step,
        last_step=first_step + rows - 1,
        first_batch=first_batch,
        epoch=3,
        metrics=metrics,
    )


def events_of(window: et.StepsCompleted) -> list[et.StepCompleted]:
    return [
        et.StepCompleted(
            run_id=window.run_id,
            time=window.time,
            step=step,
            epoch=window.epoch,
            batch=window.first_batch + row,
            metrics={name: column[row].item() for name, column in window.metrics.items()},
        )
        for row, step in enumerate(range(window.first_step, window.last_step + 1))
    ]


def check(window: et.StepsCompleted) -> None:
    lines = json_lines(StepTable.of(window)).split(b"\n")
    expected = events_of(window)
    assert lines == [event.model_dump_json().encode() for event in expected]
    assert [et.parse_event(line) for line in lines] == expected


@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_events_json_byte_for_byte(name: str, dtype: str) -> None:
    check(make_window({name: np.array(EXTREMES[dtype], dtype)}, 8))


def test_a_window_without_metrics_and_one_with_many_are_written_alike() -> None:
    check(make_window({}, 3, first_step=2**40, first_batch=17))
    columns = {f"m{n}": np.arange(5, dtype=np.float32) / (n + 1) for n in range(40)}
    check(make_window(columns | {name: np.ones(5, bool) for name in NAMES}, 5))


def test_half_a_surrogate_pair_is_written_as_events_write_it() -> None:
    window = make_window({"a\udc80": np.ones(2)}, 2)
    lines = json_lines(StepTable.of(window)).split(b"\n")
    assert lines == [event.model_dump_json().encode() for event in events_of(window)]


@settings(max_examples=50)
@given(
    name=st.text(max_size=8),
    values=st.lists(st.floats(width=32), min_size=1, max_size=20),
    first_step=st.integers(1, 2**53),
)
def test_any_name_and_any_value_come_back(name: str, values: list[float], first_step: int) -> None:
    check(make_window({name: np.array(values, np.float32)}, len(values), first_step=first_step))


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_every_chooses_the_steps_that_a_subscription_to_each_would_get(every: int) -> None:
    for first_step in range(1, 30):
        for rows in range(1, 12):
            batch = first_step + 4
            column = np.arange(first_step, first_step + rows)
            window = make_window({"n": column}, rows, first_step=first_step, first_batch=batch)
            wanted = [event for event in events_of(window) if event.is_multiple_of(every)]
            table = StepTable.of(window, every)
            assert list(table.steps) == [event.step for event in wanted]
            assert list(table.batches) == [event.batch for event in wanted]
            assert table.metrics["n"].tolist() == list(table.steps)
            assert bool(wanted) == window.is_multiple_of(every)
            if wanted:
                assert [et.parse_event(line) for line in json_lines(table).split(b"\n")] == wanted
