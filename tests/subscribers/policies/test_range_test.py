"""The arithmetic of the learning rate range test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers.policies.range_test import RangeTest


def test_the_rates_are_evenly_spaced_logarithms() -> None:
    test = RangeTest(1e-7, 10.0, 100)
    np.testing.assert_allclose([test.rate(i) for i in range(100)], np.geomspace(1e-7, 10.0, 100), rtol=1e-12)
    assert (test.rate(0), test.rate(99)) == (1e-7, pytest.approx(10.0, rel=1e-15))


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.98]))
def test_the_average_is_the_bias_corrected_one(losses: list[float], smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing, divergence=None)
    for index, loss in enumerate(losses):
        assert test.observe(index, loss) == ""
    average = 0.0
    for count, loss in enumerate(losses, 1):  # as Lightning writes it
        average = smoothing * average + (1 - smoothing) * loss
        assert test.smoothed[count - 1] == pytest.approx(average / (1 - smoothing**count), abs=1e-9)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=60), st.floats(1.1, 5.0))
def test_a_positive_loss_ends_the_test_at_the_first_multiple_of_the_best(
    losses: list[float], divergence: float
) -> None:
    test = RangeTest(1e-7, 10.0, 100, 0.0, divergence)
    first_bad = next(
        (i for i, loss in enumerate(losses) if loss - min(losses[: i + 1]) > (divergence - 1) * min(losses[: i + 1])),
        None,
    )  # fmt: skip
    ends = [index for index, loss in enumerate(losses) if test.observe(index, loss)]
    assert ends[:1] == ([] if first_bad is None else [first_bad])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_ends_the_test_and_is_not_kept(loss: float) -> None:
    test = RangeTest(1e-3, 1e-1, 3)
    assert test.observe(0, 1.0) == ""
    assert test.observe(1, loss) == f"was {loss!r} at 0.01"
    assert (test.learning_rates, test.losses, test.smoothed) == ([1e-3], [1.0], [1.0])


@given(st.lists(st.floats(-4.0, 4.0).map(lambda x: round(x, 1)), max_size=50), st.sampled_from([0.0, 0.9]))
def test_the_suggestion_is_where_the_average_falls_fastest(losses: list[float], smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing, divergence=None)
    for index, loss in enumerate(losses):
        test.observe(index, loss)
    first, last = len(losses) // 10, len(losses) - 1
    curve = test.smoothed[first:last]
    falls = [curve[min(i + 1, len(curve) - 1)] - curve[max(i - 1, 0)] for i in range(len(curve))]
    if len(curve) > 1:
        falls = [f if 0 < i < len(curve) - 1 else 2 * f for i, f in enumerate(falls)]
    if len(curve) < 2 or min(falls) >= 0:
        assert test.suggestion is None
    else:
        assert test.suggestion is not None
        chosen = test.learning_rates.index(test.suggestion) - first
        assert falls[chosen] == pytest.approx(min(falls), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.98])
def test_a_loss_that_stays_the_same_has_no_suggestion(smoothing: float) -> None:
    test = RangeTest(1e-7, 10.0, 100, smoothing)
    for index in range(100):
        over = test.observe(index, 0.3)
    assert over == "was observed for all 100 steps"
    assert test.suggestion is None
