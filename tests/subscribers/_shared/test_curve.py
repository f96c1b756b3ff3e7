"""Curve: any number of points in bounded memory, with every spike, gap and mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers._shared.curve import BUCKETS, Curve, SavedCurve


def filled(values: np.ndarray, cuts: list[int] | None = None) -> Curve:
    """All of ``values`` at steps 1, 2 ..., in pieces cut at ``cuts``."""
    curve = Curve()
    steps = np.arange(1, len(values) + 1)
    for part in np.split(np.arange(len(values)), sorted(cuts or [])):
        curve.add(steps[part], values[part])
    return curve


def test_up_to_its_number_of_buckets_every_point_is_itself() -> None:
    values = np.random.default_rng(0).normal(size=BUCKETS)
    points = filled(values).points()
    assert points.exact
    assert points.steps.tolist() == list(range(1, BUCKETS + 1))
    assert points.means.tolist() == points.lows.tolist() == points.highs.tolist() == values.tolist()


@pytest.mark.parametrize("count", [BUCKETS + 1, 10_000, 1_000_003])
def test_one_spike_in_any_number_of_points_is_drawn_at_its_place_and_height(count: int) -> None:
    for place in (0, count // 3, count - 1):
        values = np.random.default_rng(1).normal(size=count)
        values[place] = 1000.0
        values[count // 2] = -1000.0
        points = filled(values).points()
        assert 512 <= len(points) <= BUCKETS
        assert points.highs.max() == 1000.0
        assert points.lows.min() == -1000.0
        width = count / 512
        assert abs(points.steps[points.highs.argmax()] - (place + 1)) <= width
        assert np.nansum(points.means) != 0


def test_memory_does_not_grow_with_the_run() -> None:
    curve = filled(np.zeros(200_000))
    assert curve._table.nbytes == 7 * 8 * BUCKETS
    assert len(json.dumps(curve.save().model_dump())) < 80_000


def test_what_is_not_finite_leaves_a_gap_and_is_counted_and_infinities_do_not_hide_the_rest() -> None:
    points = filled(np.array([1.0, np.nan, np.inf, -np.inf, 2.0])).points()
    assert np.isnan(points.means).tolist() == [False, True, True, True, False]
    assert points.not_finite.tolist() == [0, 1, 1, 1, 0]
    values = np.ones(10 * BUCKETS)
    values[5000] = np.nan
    values[6000] = np.inf
    points = filled(values).points()
    assert points.not_finite.sum() == 2
    assert points.highs.max() == 1.0
    values[:] = np.nan
    assert np.isnan(filled(values).points().means).all()


def test_values_near_the_end_of_float64_leave_no_warning() -> None:
    points = filled(np.full(5000, 1.7e308)).points()
    assert points.highs.max() == 1.7e308


@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    repeats=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 8000), max_size=6),
)
def test_windows_do_not_matter_and_neither_does_a_restart_between_them(
    values: list[float], repeats: int, cuts: list[int]
) -> None:
    column = np.tile(np.array(values), repeats)
    cuts = [cut for cut in cuts if cut < len(column)]
    whole, parts = filled(column).points(), filled(column, cuts).points()
    for name in ("steps", "lows", "highs", "not_finite"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_allclose(whole.means, parts.means, rtol=1e-6, atol=1e-6 * np.float64(3.4e38))
    first = filled(column[: len(column) // 2])
    resumed = Curve.load(SavedCurve.model_validate(json.loads(first.save().model_dump_json())))
    resumed.add(np.arange(len(column) // 2 + 1, len(column) + 1), column[len(column) // 2 :])
    np.testing.assert_array_equal(resumed.points().highs, whole.highs)
    assert resumed.points().not_finite.sum() == (~np.isfinite(column)).sum()


@pytest.mark.parametrize("data", ["AAAA", "no base64!", "A" * 4 * 200_000])
def test_what_is_no_curve_is_refused(data: str) -> None:
    with pytest.raises(ValueError, match=r"curve|base64|Non-base64|data|buffer"):
        Curve.load(SavedCurve(width=1, room=0, data=data))
