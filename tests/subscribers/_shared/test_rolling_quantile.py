"""The quantile of the last values, against NumPy."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile

VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1.0, 5e-324, -2.5]),
)


@given(st.lists(VALUES, min_size=1, max_size=60), st.integers(1, 20), st.floats(0, 1))
def test_it_equals_numpys_quantile_of_the_last_values_at_every_point(
    values: list[float], window: int, q: float
) -> None:
    rolling, last = RollingQuantile(window), deque[float](maxlen=window)
    for value in values:
        rolling.push(value)
        last.append(value)
        assert len(rolling) == len(last)
        assert rolling.quantile(q) == np.quantile(np.array(last, np.float64), q)


@given(st.lists(VALUES, max_size=30), st.integers(1, 10), st.lists(VALUES, min_size=1, max_size=30))
def test_what_list_gives_makes_an_equal_one(before: list[float], window: int, after: list[float]) -> None:
    first = RollingQuantile(window, before)
    second = RollingQuantile(window, list(first))
    for value in after:
        first.push(value)
        second.push(value)
        assert first.quantile(0.3) == second.quantile(0.3)
    assert list(first) == list(second) == (before + after)[-window:]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused_and_leaves_the_window_alone(value: float) -> None:
    rolling = RollingQuantile(2, [1.0, 3.0])
    with pytest.raises(ValueError, match="must be a finite number, got"):
        rolling.push(value)
    assert (list(rolling), rolling.quantile(0.5)) == ([1.0, 3.0], 2.0)


def test_there_is_no_quantile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no value yet"):
        RollingQuantile(3).quantile(0.5)
