"""The monitor's state machine, driven as a policy drives it."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain.subscribers._shared.metric_goal import Goal, Monitor, Verdict, make_goal
from eventtrain.subscribers._shared.metric_reader import MetricReader

SMALLER = Goal("min")

values = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf]), max_size=40)


def watch(monitor: Monitor, observed: list[float], *, stride: int = 1, seconds: float = 1.0) -> list[Verdict]:
    """What the monitor says of each value; one every ``stride`` steps and ``seconds`` seconds."""
    return [
        monitor.observe(value, epoch=i, step=(i + 1) * stride, time_s=100.0 + i * seconds)
        for i, value in enumerate(observed)
    ]


def exhausted(verdicts: list[Verdict]) -> list[int]:
    return [i for i, verdict in enumerate(verdicts) if verdict.exhausted]


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
    with pytest.raises(et.ConfigurationError, match='mode="min"'):
        make_goal("Policy", metric, "auto", 0)
    assert make_goal("Policy", metric, "max", 0).mode == "max"


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


@given(
    values, st.integers(0, 5), st.sampled_from(["count", "ignore", "stop"]), st.sampled_from(["min", "max"])
)
def test_the_best_value_is_the_extreme_of_what_was_a_number(
    observed: list[float], patience: int, nan: Any, mode: Any
) -> None:
    monitor = Monitor(Goal(mode), patience, nan=nan)
    verdicts = watch(monitor, observed)
    numbers = [value for value in observed if not math.isnan(value)]
    assert monitor.best == (None if not numbers else min(numbers) if mode == "min" else max(numbers))
    assert [v.stop for v in verdicts] == [math.isnan(value) and nan == "stop" for value in observed]
    if numbers:
        assert monitor.best_epoch == observed.index(monitor.best)


@given(values, st.integers(0, 5))
def test_patience_in_steps_counts_what_lies_between_observations(
    observed: list[float], patience: int
) -> None:
    # One observation every 10 steps and patience for 10 times as many steps is the same thing in another unit.
    epochs = watch(Monitor(SMALLER, patience), observed)
    steps = watch(Monitor(SMALLER, patience * 10, unit="steps"), observed, stride=10)
    number_first = observed and not math.isnan(observed[0])  # before the first number nothing has elapsed
    if number_first:
        assert steps == epochs


@given(values, st.integers(1, 5))
def test_patience_in_seconds_counts_the_time_between_observations(
    observed: list[float], patience: int
) -> None:
    epochs = watch(Monitor(SMALLER, patience), observed)
    seconds = watch(Monitor(SMALLER, patience * 2.5, unit="seconds"), observed, seconds=2.5)
    if observed and not math.isnan(observed[0]):
        assert seconds == epochs


def test_evaluations_are_counted_whatever_the_epoch() -> None:
    monitor = Monitor(SMALLER, 2, unit="evaluations", start_from=1)
    verdicts = [monitor.observe(v, epoch=0, step=10 * i) for i, v in enumerate([0.0, 5.0, 6.0, 6.0], 1)]
    assert monitor.best == 5.0  # the first was not looked at
    assert exhausted(verdicts) == [3]


@pytest.mark.parametrize(
    ("unit", "start_from", "best"), [("epochs", 2, 3.0), ("steps", 20, 2.0), ("seconds", 25.0, 4.0)]
)
def test_what_comes_before_start_from_is_not_looked_at(unit: Any, start_from: float, best: float) -> None:
    monitor = Monitor(SMALLER, 1, unit=unit, start_from=start_from)
    watch(monitor, [1.0, 2.0, 3.0, 4.0], stride=10, seconds=10.0)
    assert monitor.best == best


def test_an_ignored_nan_costs_no_patience_and_a_counted_one_does() -> None:
    observed = [1.0, math.nan, math.nan, 2.0]
    assert exhausted(watch(Monitor(SMALLER, 2), observed)) == [2, 3]
    assert exhausted(watch(Monitor(SMALLER, 2, nan="ignore"), observed)) == []


def test_during_a_cooldown_nothing_counts_but_the_observation_that_ends_it() -> None:
    monitor = Monitor(SMALLER, 2, cooldown=2)
    fired: list[int] = []
    for epoch, value in enumerate([1.0] * 12):
        if monitor.observe(value, epoch=epoch, step=epoch).exhausted:
            fired.append(epoch)
            monitor.begin_cooldown()
    assert fired == [2, 5, 8, 11]


@given(
    values,
    st.integers(0, 40),
    st.sampled_from(["epochs", "steps", "evaluations", "seconds"]),
    st.sampled_from(["count", "ignore"]),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e6, -1e6]),
)
def test_a_monitor_cut_anywhere_and_loaded_says_the_same_whatever_the_clock_was_meanwhile(
    observed: list[float], cut: int, unit: Any, nan: Any, cooldown: int, down_s: float
) -> None:
    def made() -> Monitor:
        return Monitor(SMALLER, 2, unit=unit, nan=nan, cooldown=cooldown, start_from=1, baseline=2.5)

    def go(monitor: Monitor, begin: int, end: int, *, down_s: float = 0.0) -> list[Verdict]:
        said: list[Verdict] = []
        for i, value in list(enumerate(observed))[begin:end]:
            # No time is counted from the last observation before the cut to the first one after it.
            time_s = float(i) if i < cut else i - 1 + down_s
            said.append(monitor.observe(value, epoch=i, step=3 * i, time_s=time_s))
            if said[-1].exhausted:
                monitor.begin_cooldown()
        return said

    whole, first, second = made(), made(), made()
    before = go(first, 0, cut)
    second.load(first.state)
    assert before + go(second, cut, len(observed), down_s=down_s) == go(whole, 0, len(observed))
    assert second.state == whole.state


def test_a_missing_metric_is_said_once_with_the_nearest_names_first(caplog: pytest.LogCaptureFixture) -> None:
    reader = MetricReader("Policy", "val_los")
    with caplog.at_level(logging.WARNING, "eventtrain"):
        for _ in range(3):
            assert reader.read({"accuracy": 1.0, "val_loss": 2.0}) is None
    (record,) = caplog.records
    assert "Policy monitors 'val_los'" in record.message
    assert "(val_loss, accuracy)" in record.message
    assert "eval_data" in record.message
    assert "EvaluateEvery" in record.message


def test_a_missing_metric_is_an_error_where_strict() -> None:
    with pytest.raises(et.ConfigurationError, match=r"monitors 'los'.*\(loss, acc\)"):
        MetricReader("Policy", "los", strict=True).read({"acc": 1.0, "loss": 2.0})


def test_an_epoch_without_an_evaluation_says_nothing_of_a_metric_of_evaluations() -> None:
    reader = MetricReader("Policy", "val_loss", strict=True, evaluates=True)
    assert [reader.read(m) for m in ({"loss": 1.0}, {"val_loss": 2.0}, {"loss": 1.0})] == [None, 2.0, None]
    with pytest.raises(et.ConfigurationError, match=r"'val_loss', which is not among .*\(val_los, loss\)"):
        reader.read({"val_los": 1.0, "loss": 2.0})
    with pytest.raises(et.ConfigurationError, match=r"'los', which is not among"):
        MetricReader("Policy", "los", strict=True, evaluates=True).read({"loss": 1.0})


def test_the_prefix_of_an_epochs_evaluation_is_left_off_for_an_evaluations_own_metrics_only() -> None:
    reader = MetricReader("Policy", "val_loss")
    assert reader.read({"loss": 2.0}, unprefixed=True) == 2.0
    assert reader.read({"loss": 2.0}) is None
