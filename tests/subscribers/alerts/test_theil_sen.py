"""The trend of the last points is the median of all pairwise slopes, exactly."""

from __future__ import annotations

import statistics
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers.alerts.metric_rules import TheilSen

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(values=st.lists(VALUES, min_size=2, max_size=40), window=st.integers(2, 12))
def test_the_slope_is_the_median_of_the_slopes_of_all_pairs_of_the_window(
    values: list[float], window: int
) -> None:
    trend = TheilSen(window)
    for x, value in enumerate(values):
        trend.push(x, value)
    kept = list(enumerate(values))[-window:]
    assert list(trend) == kept
    slopes = [
        (after - before) / (later - earlier) for (earlier, before), (later, after) in combinations(kept, 2)
    ]
    slope, height = trend.line()
    assert slope == statistics.median(slopes)
    newest = kept[-1][0]
    assert height == statistics.median([value - slope * (x - newest) for x, value in kept])


@given(wild=st.lists(st.integers(0, 99), max_size=28, unique=True), by=st.sampled_from([1e9, -1e9]))
def test_almost_three_in_ten_wild_values_do_not_turn_it(wild: list[int], by: float) -> None:
    trend = TheilSen(100)
    for x in range(100):
        trend.push(x, 2.0 * x + (by if x in wild else 0.0))
    slope, height = trend.line()
    assert slope == pytest.approx(2.0)
    assert height == pytest.approx(198.0, abs=60)


def test_it_continues_from_what_was_saved() -> None:
    trend = TheilSen(3)
    trend.push(1, 1.0)
    for x, y in ((2, 3.0), (3, 5.0), (4, 7.0)):
        trend.push(x, y)
    assert trend.full
    assert TheilSen(3, list(trend)).line() == trend.line() == (2.0, 7.0)
