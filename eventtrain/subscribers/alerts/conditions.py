"""What is wrong with a metric's values: one class for each rule about a metric. Pure: no events, no clock.

Each is given one value after the other. To be cheap on every step, ``skip`` first passes over those of a window that
are fine, ``judge`` then says what is wrong with the next one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from eventtrain.events.models import Number
from eventtrain.subscribers._shared.metric_goal import make_goal
from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile
from eventtrain.subscribers.alerts.metric_rules import (
    ForecastRule,
    MetricRule,
    NoImprovementRule,
    Rule,
    SpikeRule,
)
from eventtrain.subscribers.alerts.theil_sen import TheilSen

FINE: Literal[""] = ""


class ConditionState(BaseModel):
    """What a condition remembers; each uses some of it."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    values: list[FiniteFloat] = []
    points: list[tuple[FiniteFloat, FiniteFloat]] = []
    best: float | None = None
    count: int = 0


class Condition(ABC):
    """Whether a metric is as it should be."""

    @abstractmethod
    def judge(self, step: int, value: Number) -> str | None:
        """Take the next value in: what is wrong with it, "" if nothing is, None if that cannot be told from it."""

    @abstractmethod
    def skip(
        self, first_step: int, column: np.ndarray[Any, Any], values: Sequence[Number], begin: int
    ) -> int:
        """Take in values from place ``begin`` on, up to the first one that has to be judged; its place, or how many
        there are.

        Args:
            first_step: of the value in place 0; each next one is a step later.
            column, values: the same numbers, as an array and as a list.
            begin: a place.
        """

    @property
    def state(self) -> ConditionState:
        """What ``load`` takes."""
        return ConditionState()

    def load(self, state: ConditionState) -> None:  # noqa: B027  # what remembers nothing has nothing to load
        """Go on from ``state``."""


class Threshold(Condition):
    """For ``Rule``."""

    def __init__(self, rule: Rule) -> None:
        self._above, self._below, self._non_finite = rule.above, rule.below, rule.non_finite

    def judge(self, step: int, value: Number) -> str | None:
        """Of this value alone."""
        if self._non_finite and not math.isfinite(value):
            return "is not finite"
        if math.isnan(value):
            return None
        if self._above is not None and value > self._above:
            return f"is above {self._above:g}"
        if self._below is not None and value < self._below:
            return f"is below {self._below:g}"
        return FINE

    def skip(
        self, first_step: int, column: np.ndarray[Any, Any], values: Sequence[Number], begin: int
    ) -> int:
        """Up to the first bad one; NaN, of which nothing can be told, is skipped too."""
        rest = column[begin:]
        if rest.dtype.kind == "f":  # or NumPy would round the limit to the column's type
            rest = rest.astype(np.float64, copy=False)
        places = [
            np.flatnonzero(bad)
            for bad in (
                None if self._above is None else rest > self._above,
                None if self._below is None else rest < self._below,
                ~np.isfinite(rest) if self._non_finite else None,
            )
            if bad is not None and bad.any()
        ]
        return begin + int(min(found[0] for found in places)) if places else len(values)


class Spike(Condition):
    """For ``SpikeRule``."""

    def __init__(self, rule: SpikeRule) -> None:
        self._window, self._quantile, self._times = rule.window, rule.quantile, rule.times
        self._warmup = rule.window if rule.warmup is None else rule.warmup
        self._usual = RollingQuantile(rule.window)

    def judge(self, step: int, value: Number) -> str | None:
        """Compare with the quantile of the values before it."""
        if not math.isfinite(value):
            return None
        verdict = None
        if len(self._usual) >= self._warmup:
            usual = self._usual.quantile(self._quantile)
            verdict = FINE
            if value > self._times * usual:
                verdict = (
                    f"is more than {self._times:g} times {usual:.6g}, the {self._quantile:g} quantile of the last "
                    f"{len(self._usual)} values"
                )
        self._usual.push(float(value))
        return verdict

    def skip(
        self, first_step: int, column: np.ndarray[Any, Any], values: Sequence[Number], begin: int
    ) -> int:
        """Up to the first spike."""
        usual, times, quantile, warmup = self._usual, self._times, self._quantile, self._warmup
        for place in range(begin, len(values)):
            value = float(values[place])
            if not math.isfinite(value):
                continue
            if len(usual) >= warmup and value > times * usual.quantile(quantile):
                return place
            usual.push(value)
        return len(values)

    @property
    def state(self) -> ConditionState:
        """The window."""
        return ConditionState(values=list(self._usual))

    def load(self, state: ConditionState) -> None:
        """Of a longer window the newest values count."""
        self._usual = RollingQuantile(self._window, state.values)


class NoImprovement(Condition):
    """For ``NoImprovementRule``."""

    def __init__(self, rule: NoImprovementRule) -> None:
        self._goal = make_goal("NoImprovementRule", rule.metric, rule.mode, rule.min_delta)
        self._patience = rule.patience
        self._best: float | None = None
        self._count = 0

    def judge(self, step: int, value: Number) -> str | None:
        """Count it, or begin anew where it is the best so far."""
        if self._improves(float(value)):
            self._best, self._count = float(value), 0
            return FINE
        self._count += 1
        if self._count < self._patience:
            return FINE
        best = "there was none" if self._best is None else f"the best is {self._best:.6g}"
        return f"is no better than before, for {self._count} values in a row ({best})"

    def skip(
        self, first_step: int, column: np.ndarray[Any, Any], values: Sequence[Number], begin: int
    ) -> int:
        """Until patience is at its end."""
        for place in range(begin, len(values)):
            value = float(values[place])
            if self._improves(value):
                self._best, self._count = value, 0
            elif self._count + 1 >= self._patience:
                return place
            else:
                self._count += 1
        return len(values)

    def _improves(self, value: float) -> bool:
        best = self._best
        # What is not even without a margin cannot be with one; the goal's own comparison takes 1.5 us.
        if best is not None and not (value < best if self._goal.mode == "min" else value > best):
            return False
        return self._goal.improves(value, best)

    @property
    def state(self) -> ConditionState:
        """The best value and the count since."""
        return ConditionState(best=self._best, count=self._count)

    def load(self, state: ConditionState) -> None:
        """Go on counting."""
        self._best, self._count = state.best, state.count


class Forecast(Condition):
    """For ``ForecastRule``."""

    def __init__(self, rule: ForecastRule) -> None:
        self._rule = rule
        self._every = max(1, rule.window // 4) if rule.every is None else rule.every
        self._trend = TheilSen(rule.window)
        self._count = 0

    def judge(self, step: int, value: Number) -> str | None:
        """At every so many values, where the line will be."""
        if not math.isfinite(value):
            return None
        self._push(step, float(value))
        if not self._trend.full or self._count % self._every:
            return None
        slope, height = self._trend.line()
        return self._verdict(slope, height)

    def _push(self, step: int, value: float) -> None:
        self._trend.push(step, value)
        self._count += 1

    def _verdict(self, slope: float, height: float) -> str | None:
        rule = self._rule
        ahead = height + slope * rule.within
        if math.isnan(ahead):
            return None
        sign, word = (1, "above") if rule.above is not None else (-1, "below")
        if sign * ahead <= sign * rule.limit:
            return FINE
        if sign * height > sign * rule.limit:
            when = f"is {word} {rule.limit:g} by its trend"
        else:
            steps = math.ceil((rule.limit - height) / slope)
            when = (
                f"will be {word} {rule.limit:g} in {steps} {'step' if steps == 1 else 'steps'} by its trend"
            )
        return f"{when} ({slope:+.3g} a step over the last {len(self._trend)} values)"

    def skip(
        self, first_step: int, column: np.ndarray[Any, Any], values: Sequence[Number], begin: int
    ) -> int:
        """Up to the next value at which to look."""
        window = self._rule.window
        for place in range(begin, len(values)):
            value = float(values[place])
            if not math.isfinite(value):
                continue
            if len(self._trend) >= window - 1 and not (self._count + 1) % self._every:
                return place
            self._push(first_step + place, value)
        return len(values)

    @property
    def state(self) -> ConditionState:
        """The points, and the count that says when to look."""
        return ConditionState(points=list(self._trend), count=self._count)

    def load(self, state: ConditionState) -> None:
        """Of a longer window the newest points count."""
        self._trend = TheilSen(self._rule.window, state.points)
        self._count = state.count


def condition_of(rule: MetricRule) -> Condition:
    """What judges by ``rule``."""
    match rule:
        case Rule():
            return Threshold(rule)
        case SpikeRule():
            return Spike(rule)
        case NoImprovementRule():
            return NoImprovement(rule)
        case ForecastRule():
            return Forecast(rule)
        case _:
            raise TypeError(f"{type(rule).__name__} has no condition")
