"""The monitor's state machine, driven as a policy drives it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain.subscribers._shared.metric_goal import Goal
from eventtrain.subscribers.policies.metric_monitor import MetricMonitor, Verdict

SMALLER = Goal("min")

values = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf]), max_size=40)


def watch(
    monitor: MetricMonitor, observed: list[float], *, stride: int = 1, seconds: float = 1.0
) -> list[Verdict]:
    """What the monitor says of each value; one every ``stride`` steps and ``seconds`` seconds."""
    return [
        monitor.observe(value, epoch=i, step=(i + 1) * stride, time_s=100.0 + i * seconds)
        for i, value in enumerate(observed)
    ]


def exhausted(verdicts: list[Verdict]) -> list[int]:
    return [i for i, verdict in enumerate(verdicts) if verdict == "exhausted"]


@given(
    values, st.integers(0, 5), st.sampled_from(["count", "ignore", "stop"]), st.sampled_from(["min", "max"])
)
def test_the_best_value_is_the_extreme_of_what_was_a_number(
    observed: list[float], patience: int, nan: Any, mode: Any
) -> None:
    monitor = MetricMonitor(Goal(mode), patience, nan=nan)
    verdicts = watch(monitor, observed)
    numbers = [value for value in observed if not math.isnan(value)]
    assert monitor.state.best == (None if not numbers else min(numbers) if mode == "min" else max(numbers))
    assert [v == "stop" for v in verdicts] == [math.isnan(value) and nan == "stop" for value in observed]
    if numbers:
        assert monitor.state.best_epoch == observed.index(monitor.state.best)


@given(values, st.integers(0, 5))
def test_patience_in_steps_counts_what_lies_between_observations(
    observed: list[float], patience: int
) -> None:
    # One observation every 10 steps and patience for 10 times as many steps is the same thing in another unit.
    epochs = watch(MetricMonitor(SMALLER, patience), observed)
    steps = watch(MetricMonitor(SMALLER, patience * 10, unit="steps"), observed, stride=10)
    number_first = observed and not math.isnan(observed[0])  # before the first number nothing has elapsed
    if number_first:
        assert steps == epochs


@given(values, st.integers(1, 5))
def test_patience_in_seconds_counts_the_time_between_observations(
    observed: list[float], patience: int
) -> None:
    epochs = watch(MetricMonitor(SMALLER, patience), observed)
    seconds = watch(MetricMonitor(SMALLER, patience * 2.5, unit="seconds"), observed, seconds=2.5)
    if observed and not math.isnan(observed[0]):
        assert seconds == epochs


def test_evaluations_are_counted_whatever_the_epoch() -> None:
    monitor = MetricMonitor(SMALLER, 2, unit="evaluations", start_from=1)
    verdicts = [monitor.observe(v, epoch=0, step=10 * i) for i, v in enumerate([0.0, 5.0, 6.0, 6.0], 1)]
    assert monitor.state.best == 5.0  # the first was not looked at
    assert exhausted(verdicts) == [3]


@pytest.mark.parametrize(
    ("unit", "start_from", "best"), [("epochs", 2, 3.0), ("steps", 20, 2.0), ("seconds", 25.0, 4.0)]
)
def test_what_comes_before_start_from_is_not_looked_at(unit: Any, start_from: float, best: float) -> None:
    monitor = MetricMonitor(SMALLER, 1, unit=unit, start_from=start_from)
    watch(monitor, [1.0, 2.0, 3.0, 4.0], stride=10, seconds=10.0)
    assert monitor.state.best == best


def test_an_ignored_nan_costs_no_patience_and_a_counted_one_does() -> None:
    observed = [1.0, math.nan, math.nan, 2.0]
    assert exhausted(watch(MetricMonitor(SMALLER, 2), observed)) == [2, 3]
    assert exhausted(watch(MetricMonitor(SMALLER, 2, nan="ignore"), observed)) == []


def test_during_a_cooldown_nothing_counts_but_the_observation_that_ends_it() -> None:
    monitor = MetricMonitor(SMALLER, 2, cooldown=2)
    fired: list[int] = []
    for epoch, value in enumerate([1.0] * 12):
        if monitor.observe(value, epoch=epoch, step=epoch) == "exhausted":
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
    def made() -> MetricMonitor:
        return MetricMonitor(SMALLER, 2, unit=unit, nan=nan, cooldown=cooldown, start_from=1, baseline=2.5)

    def go(monitor: MetricMonitor, begin: int, end: int, *, down_s: float = 0.0) -> list[Verdict]:
        said: list[Verdict] = []
        for i, value in list(enumerate(observed))[begin:end]:
            # No time is counted from the last observation before the cut to the first one after it.
            time_s = float(i) if i < cut else i - 1 + down_s
            said.append(monitor.observe(value, epoch=i, step=3 * i, time_s=time_s))
            if said[-1] == "exhausted":
                monitor.begin_cooldown()
        return said

    whole, first, second = made(), made(), made()
    before = go(first, 0, cut)
    second.load(first.state)
    assert before + go(second, cut, len(observed), down_s=down_s) == go(whole, 0, len(observed))
    assert second.state == whole.state
