from __future__ import annotations

import math

import pytest

import eventtrain as et
from eventtrain.subscribers.monitor import Monitor, make_monitor


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
        ("accuracy", "max"),
        ("val_acc", "max"),
        ("top_5_accuracy", "max"),
        ("f1", "max"),
    ],
)
def test_auto_mode_reads_the_direction_off_the_name(metric: str, mode: str) -> None:
    assert make_monitor("Policy", metric, "auto", 0).mode == mode


@pytest.mark.parametrize("metric", ["speed", "val_x", "", "accuracy_loss", "lossless"])
def test_a_direction_that_cannot_be_told_is_refused(metric: str) -> None:
    with pytest.raises(et.ConfigurationError, match='mode="min"'):
        make_monitor("Policy", metric, "auto", 0)
    assert make_monitor("Policy", metric, "max", 0).mode == "max"


def test_an_improvement_is_strict_and_exceeds_min_delta() -> None:
    smaller, larger = Monitor("loss", "min", 0.5), Monitor("acc", "max", 0.5)
    assert not smaller.improves(1.5, 2.0)
    assert smaller.improves(1.25, 2.0)
    assert not larger.improves(2.5, 2.0)
    assert larger.improves(2.75, 2.0)


def test_nan_is_never_an_improvement_and_everything_else_improves_on_nothing() -> None:
    monitor = Monitor("loss", "min")
    assert not monitor.improves(math.nan, None)
    assert not monitor.improves(math.nan, math.inf)
    assert monitor.improves(math.inf, None)
    assert monitor.improves(1.0, math.inf)
