"""The rules of ``Alerts`` about the values of a metric. Pure: no clock, no threads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, EvalCompleted, Event, StepCompleted, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.events.names import by_name
from eventtrain.subscribers._shared.metric_goal import Goal, Mode, make_goal
from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.alerts.rule import AlertRule
from eventtrain.subscribers.alerts.theil_sen import TheilSen

M = TypeVar("M")

WATCHABLE = (EpochCompleted, StepCompleted, EvalCompleted)
Watched = Annotated[type[EpochCompleted] | type[StepCompleted] | type[EvalCompleted], by_name(*WATCHABLE)]
MOST_COMPARED = 1000
"""Values in the window of a ForecastRule: half a million pairs."""
FINE: Literal[""] = ""


class SavedMemory(BaseModel):
    """Memory of a metric rule in a checkpoint; each rule uses some of the fields."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    values: list[FiniteFloat] = []
    points: list[tuple[FiniteFloat, FiniteFloat]] = []
    best: float | None = None
    count: int = 0


@dataclass(frozen=True)
class StepWindow:
    """The metrics of consecutive steps: an array for each metric and, built once for all rules, the same as a list."""

    first_step: int
    metrics: Mapping[str, np.ndarray[Any, Any]]
    _lists: dict[str, list[Number]] = field(default_factory=dict[str, list[Number]])

    def values(self, metric: str) -> list[Number]:
        """Returns the values of ``metric``, which is among the metrics."""
        if metric not in self._lists:
            self._lists[metric] = self.metrics[metric].tolist()
        return self._lists[metric]


@dataclass(frozen=True)
class MetricRule(AlertRule, ABC, Generic[M]):
    """Base of the rules about a metric.

    The values arrive one after the other. So that a step is cheap, ``skip`` passes over the values of a window that
    are fine, and ``judge`` is called for the next one only. What a rule remembers of earlier values is in a memory of
    type ``M``, which belongs to one run; the rule itself does not change.

    Attributes:
        metric: its name in the event's ``metrics``; events without it are ignored.
        event: the events to judge: EpochCompleted, StepCompleted or EvalCompleted.
    """

    metric: str
    event: Watched = field(default=EpochCompleted, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.event not in WATCHABLE:
            raise ConfigurationError(
                f"{type(self).__name__}({self.metric!r}, event={self.event!r}): event must be EpochCompleted, "
                "StepCompleted or EvalCompleted."
            )

    @property
    def events(self) -> tuple[type[Event], ...]:
        """The events to subscribe to; for steps, their windows."""
        return (StepsCompleted,) if self.event is StepCompleted else (self.event,)

    @abstractmethod
    def recall(self, saved: SavedMemory) -> M:
        """Returns the memory from which ``save`` made ``saved``; an empty one from ``SavedMemory()``."""

    def save(self, memory: M) -> SavedMemory:
        """Returns ``memory`` for a checkpoint."""
        return SavedMemory()

    @abstractmethod
    def judge(self, memory: M, step: int, value: Number) -> str | None:
        """Adds the next value to ``memory``.

        Returns:
            What is wrong with the value, "" if nothing is, None if the value does not tell.
        """

    @abstractmethod
    def skip(self, memory: M, steps: StepWindow, begin: int) -> int:
        """Adds values to ``memory``, from index ``begin`` of ``steps`` up to the first one that ``judge`` has to see.

        Returns:
            The index of the value to judge, or the number of values if there is none.
        """


@dataclass(frozen=True)
class Rule(MetricRule[None]):
    """A metric is beyond a limit, or is not finite.

    Attributes:
        above, below: met by ``value > above``, ``value < below``; with both, by a value outside the band. NaN is
            neither.
        non_finite: met by NaN and infinities.
    """

    above: float | None = None
    below: float | None = None
    non_finite: bool = False
    type: Literal["threshold"] = field(default="threshold", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.above is None and self.below is None and not self.non_finite:
            raise ConfigurationError(
                f"Rule({self.metric!r}) can never be broken: give above=, below= or non_finite=True."
            )
        for limit in (self.above, self.below):
            if limit is not None and math.isnan(limit):
                raise ConfigurationError(f"Rule({self.metric!r}): above and below must be numbers, got NaN.")
        if self.above is not None and self.below is not None and self.below > self.above:
            raise ConfigurationError(
                f"Rule({self.metric!r}, above={self.above}, below={self.below}) is always broken: swap them."
            )
        super().__post_init__()

    def _default_label(self) -> str:
        limits = (("above", self.above), ("below", self.below))
        conditions = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
        if self.non_finite:
            conditions.append("not finite")
        return f"{self.metric} {' or '.join(conditions)}"

    def recall(self, saved: SavedMemory) -> None:
        """Returns None: a threshold remembers nothing."""

    def judge(self, memory: None, step: int, value: Number) -> str | None:
        """Judges this value alone; NaN tells nothing unless ``non_finite`` is set."""
        if self.non_finite and not math.isfinite(value):
            return "is not finite"
        if math.isnan(value):
            return None
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"is below {self.below:g}"
        return FINE

    def skip(self, memory: None, steps: StepWindow, begin: int) -> int:
        """Skips to the first value that meets the rule."""
        rest = steps.metrics[self.metric][begin:]
        if rest.dtype.kind == "f":  # or NumPy would round the limit to the column's type
            rest = rest.astype(np.float64, copy=False)
        places = [
            np.flatnonzero(bad)
            for bad in (
                None if self.above is None else rest > self.above,
                None if self.below is None else rest < self.below,
                ~np.isfinite(rest) if self.non_finite else None,
            )
            if bad is not None and bad.any()
        ]
        return begin + int(min(found[0] for found in places)) if places else begin + len(rest)


@dataclass(frozen=True)
class SpikeRule(MetricRule[RollingQuantile]):
    """A metric is more than ``times`` the exact quantile of the values before it.

    Attributes:
        window: number of values that the quantile is computed from. Spikes enter it too, NaN and infinities do not.
        quantile: between 0 and 1.
        times: at least 1. The metric must not be negative.
        warmup: number of values before the first judgement; a full window if None.
    """

    label_format = "{metric} spike"
    window: int = 200
    quantile: float = 0.95
    times: float = 2.0
    warmup: int | None = None
    type: Literal["spike"] = field(default="spike", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("SpikeRule", "window", self.window, at_least=1)
        require_number("SpikeRule", "quantile", self.quantile, at_least=0, at_most=1)
        require_number("SpikeRule", "times", self.times, at_least=1)
        require_count("SpikeRule", "warmup", self.warmup, at_least=1, optional=True)
        if self.warmup is not None and self.warmup > self.window:
            raise ConfigurationError(
                f"SpikeRule(warmup={self.warmup}, window={self.window}): warmup must not exceed window, which never "
                "holds that many values."
            )

    def recall(self, saved: SavedMemory) -> RollingQuantile:
        """Returns the window; of a saved longer one the newest values count."""
        return RollingQuantile(self.window, saved.values)

    def save(self, memory: RollingQuantile) -> SavedMemory:
        """Returns the values of the window."""
        return SavedMemory(values=list(memory))

    def judge(self, memory: RollingQuantile, step: int, value: Number) -> str | None:
        """Compares the value with the quantile of those before it."""
        if not math.isfinite(value):
            return None
        verdict = None
        if len(memory) >= self._warmup:
            usual = memory.quantile(self.quantile)
            verdict = FINE
            if value > self.times * usual:
                verdict = (
                    f"is more than {self.times:g} times {usual:.6g}, the {self.quantile:g} quantile of the last "
                    f"{len(memory)} values"
                )
        memory.push(float(value))
        return verdict

    def skip(self, memory: RollingQuantile, steps: StepWindow, begin: int) -> int:
        """Skips to the first spike."""
        values = steps.values(self.metric)
        times, quantile, warmup = self.times, self.quantile, self._warmup
        for place in range(begin, len(values)):
            value = float(values[place])
            if not math.isfinite(value):
                continue
            if len(memory) >= warmup and value > times * memory.quantile(quantile):
                return place
            memory.push(value)
        return len(values)

    @property
    def _warmup(self) -> int:
        return self.window if self.warmup is None else self.warmup


@dataclass(slots=True)
class BestSoFar:
    """The best value so far, None before the first, and the number of values since."""

    value: float | None
    since: int


@dataclass(frozen=True)
class NoImprovementRule(MetricRule[BestSoFar]):
    """A metric has not beaten its best value for ``patience`` values in a row (steps, epochs or evaluations).

    Attributes:
        patience: at least 1.
        mode: "min", "max", or "auto": by the metric's name.
        min_delta: smallest difference that counts as an improvement, as in EarlyStopping.
    """

    label_format = "{metric} no better for {patience}"
    patience: int = 10
    mode: Mode = "auto"
    min_delta: float = 0.0
    type: Literal["no_improvement"] = field(default="no_improvement", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("NoImprovementRule", "patience", self.patience, at_least=1)
        assert self._goal is not None  # raises if the direction is unknown

    @cached_property
    def _goal(self) -> Goal:
        return make_goal("NoImprovementRule", self.metric, self.mode, self.min_delta)

    def recall(self, saved: SavedMemory) -> BestSoFar:
        """Returns the best value and the count since."""
        return BestSoFar(saved.best, saved.count)

    def save(self, memory: BestSoFar) -> SavedMemory:
        """Returns the best value and the count since."""
        return SavedMemory(best=memory.value, count=memory.since)

    def judge(self, memory: BestSoFar, step: int, value: Number) -> str | None:
        """Counts the value, or starts the count again if it is the best so far."""
        if self._goal.improves(float(value), memory.value):
            memory.value, memory.since = float(value), 0
            return FINE
        memory.since += 1
        if memory.since < self.patience:
            return FINE
        best = "there is no best value yet" if memory.value is None else f"the best is {memory.value:.6g}"
        return f"has not improved for {memory.since} values in a row ({best})"

    def skip(self, memory: BestSoFar, steps: StepWindow, begin: int) -> int:
        """Skips to the value that exhausts the patience."""
        values, goal = steps.values(self.metric), self._goal
        smaller_is_better = goal.mode == "min"
        for place in range(begin, len(values)):
            value, best = float(values[place]), memory.value
            # The first comparison is without the margin, and cheap; the goal's takes 1.5 us.
            if (best is None or (value < best if smaller_is_better else value > best)) and goal.improves(
                value, best
            ):
                memory.value, memory.since = value, 0
            elif memory.since + 1 >= self.patience:
                return place
            else:
                memory.since += 1
        return len(values)


@dataclass(frozen=True)
class ForecastRule(MetricRule[TheilSen]):
    """The trend of the last values crosses a limit within ``within`` steps.

    The trend is the Theil-Sen line (Theil, 1950; Sen, 1968): its slope is the median of the slopes of all pairs, so
    that it tolerates almost three outliers in ten values. NaN and infinities do not enter it.

    Attributes:
        above, below: the limit; one of them.
        within: steps.
        window: number of values, 3 to 1,000. The rule is silent until there are as many.
        every: number of values between two forecasts; a quarter of the window if None, since each forecast compares
            all pairs.
    """

    above: float | None = None
    below: float | None = None
    within: int = 1000
    window: int = 100
    every: int | None = None
    type: Literal["forecast"] = field(default="forecast", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.above is None) == (self.below is None):
            raise ConfigurationError(f"ForecastRule({self.metric!r}): give either above= or below=.")
        require_number("ForecastRule", "above" if self.below is None else "below", self._limit)
        require_count("ForecastRule", "within", self.within, at_least=1)
        require_count("ForecastRule", "window", self.window, at_least=3)
        if self.window > MOST_COMPARED:
            raise ConfigurationError(
                f"ForecastRule(window={self.window}): window must be at most {MOST_COMPARED}, since all pairs of its "
                "values are compared: time and memory grow with its square. For a longer trend use "
                "event=EpochCompleted."
            )
        require_count("ForecastRule", "every", self.every, at_least=1, optional=True)

    @property
    def _limit(self) -> float:
        return self.above if self.above is not None else self.below  # pyright: ignore[reportReturnType]

    @property
    def _side(self) -> str:
        return "above" if self.above is not None else "below"

    def _default_label(self) -> str:
        return f"{self.metric} {self._side} {self._limit:g} within {self.within} steps"

    @property
    def _every(self) -> int:
        return max(1, self.window // 4) if self.every is None else self.every

    def recall(self, saved: SavedMemory) -> TheilSen:
        """Returns the points; of a saved longer window the newest count."""
        return TheilSen(self.window, saved.points, pushed=saved.count)

    def save(self, memory: TheilSen) -> SavedMemory:
        """Returns the points, and the count that determines when the next forecast is due."""
        return SavedMemory(points=list(memory), count=memory.pushed)

    def judge(self, memory: TheilSen, step: int, value: Number) -> str | None:
        """Extends the line by ``within`` steps, if a forecast is due."""
        if not math.isfinite(value):
            return None
        memory.push(step, float(value))
        if not memory.full or memory.pushed % self._every:
            return None
        slope, height = memory.line()
        return self._verdict(slope, height, len(memory))

    def _verdict(self, slope: float, height: float, count: int) -> str | None:
        limit, side = self._limit, self._side
        ahead = height + slope * self.within
        if math.isnan(ahead):
            return None
        sign = 1 if side == "above" else -1
        if sign * ahead <= sign * limit:
            return FINE
        if sign * height > sign * limit:
            when = f"is {side} {limit:g} by its trend"
        else:
            steps = math.ceil((limit - height) / slope)
            when = f"will be {side} {limit:g} in {steps} {'step' if steps == 1 else 'steps'} by its trend"
        return f"{when} ({slope:+.3g} a step over the last {count} values)"

    def skip(self, memory: TheilSen, steps: StepWindow, begin: int) -> int:
        """Skips to the next value at which a forecast is due."""
        values = steps.values(self.metric)
        window, every = self.window, self._every
        for place in range(begin, len(values)):
            value = float(values[place])
            if not math.isfinite(value):
                continue
            if len(memory) >= window - 1 and not (memory.pushed + 1) % every:
                return place
            memory.push(steps.first_step + place, value)
        return len(values)
