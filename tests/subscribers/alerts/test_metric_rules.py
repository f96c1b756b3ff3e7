"""Verdicts of metric rules against definitions written out; and windows against one value at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.alerts.alert_state import MetricRuleAlerts, SavedRule
from eventtrain.subscribers.alerts.metric_rules import MetricRule, SavedMemory, StepWindow

VALUES = st.lists(
    st.one_of(st.floats(-9, 9, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])),
    max_size=60,
)
RULES: list[MetricRule[Any]] = [
    subs.Rule("x", above=1.0),
    subs.Rule("x", below=-2.0, above=5.0, for_steps=2),
    subs.Rule("x", non_finite=True),
    subs.Rule("x", above=3.0, non_finite=True, cooldown_s=3.0),
    subs.SpikeRule("x", window=5, quantile=0.5, times=1.5),
    subs.SpikeRule("x", window=7, warmup=2, for_steps=1),
    subs.NoImprovementRule("x", patience=3, mode="min"),
    subs.NoImprovementRule("x", patience=2, mode="max", min_delta=0.5),
    subs.ForecastRule("x", above=3.0, within=4, window=4),
    subs.ForecastRule("x", below=-3.0, within=2, window=5, every=3),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}-{rule.label}")


def verdicts(rule: MetricRule[Any], values: list[float]) -> list[str | None]:
    memory = rule.recall(SavedMemory())
    windows = (StepWindow.of_one(step, {rule.metric: value}) for step, value in enumerate(values, start=1))
    return [dict(rule.judge(memory, window)).get(0) for window in windows]


@rules
@settings(max_examples=40)
@given(values=VALUES, cuts=st.lists(st.integers(1, 15), min_size=1, max_size=8))
def test_a_run_judged_by_windows_says_what_one_judged_by_steps_says(
    rule: MetricRule[Any], values: list[float], cuts: list[int]
) -> None:
    by_step, by_window = MetricRuleAlerts(rule), MetricRuleAlerts(rule)
    expected = [
        event
        for step, value in enumerate(values, start=1)
        for event in by_step.judge(StepWindow.of_one(step, {"x": value}), 0.0)
    ]
    found: list[et.Event] = []
    begin = 0
    while begin < len(values):
        rows = values[begin : begin + cuts[begin % len(cuts)]]
        found += by_window.judge(StepWindow(begin + 1, {"x": np.array(rows)}), 0.0)
        begin += len(rows)
    assert found == expected
    assert by_window.save(0.0).condition == by_step.save(0.0).condition


@rules
@settings(max_examples=40)
@given(values=VALUES, cut=st.integers(0, 60))
def test_saved_and_loaded_in_between_it_says_the_same(
    rule: MetricRule[Any], values: list[float], cut: int
) -> None:
    whole, first, second = MetricRuleAlerts(rule), MetricRuleAlerts(rule), MetricRuleAlerts(rule)
    expected = [
        whole.judge(StepWindow.of_one(step, {"x": value}), 0.0) for step, value in enumerate(values, start=1)
    ]
    found = [
        first.judge(StepWindow.of_one(step, {"x": value}), 0.0)
        for step, value in enumerate(values[:cut], start=1)
    ]
    second.load(SavedRule.model_validate_json(first.save(0.0).model_dump_json()), 0.0)
    found += [
        second.judge(StepWindow.of_one(step, {"x": value}), 0.0)
        for step, value in enumerate(values[cut:], start=min(cut, len(values)) + 1)
    ]
    assert found == expected


@given(values=VALUES, window=st.integers(1, 8), q=st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]))
def test_a_spike_is_a_value_above_so_many_times_numpys_quantile_of_those_before(
    values: list[float], window: int, q: float
) -> None:
    said = verdicts(subs.SpikeRule("x", window=window, quantile=q, times=2.0), values)
    before: list[float] = []
    for value, verdict in zip(values, said, strict=True):
        if not math.isfinite(value):
            assert verdict is None
            continue
        if len(before) < window:
            assert verdict is None
        else:
            assert bool(verdict) == (value > 2.0 * np.quantile(before[-window:], q))
        before.append(value)


@given(values=VALUES, patience=st.integers(1, 5))
def test_no_improvement_counts_the_values_since_the_best(values: list[float], patience: int) -> None:
    said = verdicts(subs.NoImprovementRule("x", patience=patience, mode="min"), values)
    best, since = math.inf, 0
    seen = False
    for value, verdict in zip(values, said, strict=True):
        if not math.isnan(value) and (not seen or value < best):
            best, since, seen = value, 0, True
        else:
            since += 1
        assert bool(verdict) == (since >= patience)


def test_a_forecast_names_the_step_and_is_over_when_the_trend_turns() -> None:
    rule = subs.ForecastRule("loss", above=10.0, within=20, window=5, every=1, event=et.StepCompleted)
    said = verdicts(rule, [1.0, 1.5, 2.0, 2.5, 3.0, 2.5, 2.0, 1.5, 1.0])
    assert said[:4] == [None] * 4
    assert said[4] == "will be above 10 in 14 steps by its trend (+0.5 a step over the last 5 values)"
    assert said[-1] == ""


def test_the_best_and_the_streak_are_named() -> None:
    said = verdicts(subs.NoImprovementRule("loss", patience=2), [3.0, 2.0, 2.5, 2.5])
    assert said == ["", "", "", "has not improved for 2 values in a row (the best is 2)"]


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]
)
def test_columns_of_any_kind_are_judged_and_values_keep_their_type(dtype: Any) -> None:
    column = np.array([0, 1, 0], dtype)
    alerts = MetricRuleAlerts(subs.Rule("x", above=0.5, event=et.StepCompleted))
    raised, resolved = alerts.judge(StepWindow(4, {"x": column}), 0.0)
    assert (raised.step, resolved.step) == (5, 6)
    assert isinstance(raised, et.AlertRaised)
    assert type(raised.value) is type(column.tolist()[1])
    finite = MetricRuleAlerts(subs.Rule("x", non_finite=True, event=et.StepCompleted))
    assert finite.judge(StepWindow(1, {"x": column}), 0.0) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("limit", [0.1, 1e39, 70_000])
def test_a_limit_is_not_rounded_to_the_type_of_a_column(dtype: Any, limit: float) -> None:
    column = np.array([0.1, 0.1], dtype)
    by_step, by_window = (
        MetricRuleAlerts(subs.Rule("x", above=limit, event=et.StepCompleted)) for _ in range(2)
    )
    expected = by_step.judge(StepWindow.of_one(1, {"x": column.tolist()[0]}), 0.0)
    assert by_window.judge(StepWindow(1, {"x": column}), 0.0) == expected
