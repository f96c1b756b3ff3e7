"""When a metric has improved."""

from __future__ import annotations

import math

import numpy as np
import pytest

import eventtrain as et
from eventtrain.subscribers._shared.metric_goal import Goal, make_goal

SMALLER = Goal("min")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("aux_loss", "min"),
        ("val_mse", "min"),
        ("perplexity", "min"),
        ("sparse_categorical_crossentropy", "min"),
        ("cross-entropy", "min"),
        ("val_cosine_similarity", "max"),
        ("mean_io_u", "max"),
        ("accuracy", "max"),
        ("val_acc", "max"),
        ("top_5_accuracy", "max"),
        ("f1", "max"),
    ],
)
def test_auto_mode_reads_the_direction_off_the_name(metric: str, mode: str) -> None:
    assert make_goal("Policy", metric, "auto", 0).mode == mode


@pytest.mark.parametrize("metric", ["speed", "val_x", "", "accuracy_loss", "lossless"])
def test_a_direction_that_cannot_be_told_is_refused(metric: str) -> None:
    with pytest.raises(
        et.ConfigurationError, match=r'is better\. (Did you mean .losses.. If not, p|P)ass mode="min"'
    ):
        make_goal("Policy", metric, "auto", 0)
    assert make_goal("Policy", metric, "max", 0).mode == "max"


@pytest.mark.parametrize(
    ("metric", "meant"), [("val_los", "val_loss"), ("Val_Acuracy", "val_accuracy"), ("lss", "loss")]
)
def test_a_name_that_is_close_to_a_known_one_is_asked_for(metric: str, meant: str) -> None:
    with pytest.raises(et.ConfigurationError, match=rf"Did you mean '{meant}'\? If not, pass mode="):
        make_goal("Policy", metric, "auto", 0)


def test_an_improvement_is_strict_and_exceeds_min_delta() -> None:
    smaller, larger = Goal("min", 0.5), Goal("max", 0.5)
    assert not smaller.improves(1.5, 2.0)
    assert smaller.improves(1.25, 2.0)
    assert not larger.improves(2.5, 2.0)
    assert larger.improves(2.75, 2.0)


def test_values_are_compared_in_float32_as_keras_compares_them() -> None:
    smaller, larger = Goal("min", 0.1), Goal("max", 0.1)
    assert not smaller.improves(0.7, 0.8)  # 0.7 + 0.1 is 0.7999999999999999 in float64
    assert not smaller.improves(float(np.float32(0.9)), 1.0)
    assert not larger.improves(0.8, 0.7)
    assert not SMALLER.improves(1.0 - 1e-9, 1.0)
    assert SMALLER.improves(1.0, 1e300)


def test_a_relative_min_delta_is_a_share_of_the_value_to_be_beaten() -> None:
    smaller, larger = Goal("min", 0.25, relative=True), Goal("max", 0.25, relative=True)
    assert not smaller.improves(3.0, 4.0)
    assert smaller.improves(2.99, 4.0)
    assert not smaller.improves(-4.5, -4.0)
    assert smaller.improves(-5.01, -4.0)
    assert not larger.improves(5.0, 4.0)
    assert larger.improves(5.01, 4.0)
    assert smaller.improves(4.0, math.inf)


def test_nan_is_never_an_improvement_and_everything_else_improves_on_nothing() -> None:
    assert not SMALLER.improves(math.nan, None)
    assert not SMALLER.improves(math.nan, math.inf)
    assert SMALLER.improves(math.inf, None)
    assert SMALLER.improves(1.0, math.inf)
