"""The rules of ``Alerts`` about the values of a metric. Pure: no clock, no threads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    EpochCompleted,
    EvalCompleted,
    Event,
    MachineMeasured,
    StepCompleted,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.events.names import by_name
from eventtrain.subscribers._shared.metric_goal import Goal, Mode, make_goal
from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile
from eventtrain.subscribers.alerts.rule import AlertRule
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

M = TypeVar("M")

WATCHABLE = (MachineMeasured, EpochCompleted, StepCompleted, EvalCompleted)
Watched = Annotated[
    type[EpochCompleted] | type[StepCompleted] | type[EvalCompleted] | type[MachineMeasured],
    by_name(*WATCHABLE),
]
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

    @classmethod
    def of_one(cls, step: int, metrics: Mapping[str, Number]) -> StepWindow:
        """Returns a window of one step."""
        return cls(step, {name: np.asarray([value]) for name, value in metrics.items()})

    def values(self, metric: str) -> list[Number]:
        """Returns the values of ``metric``, which is among the metrics."""
        if metric not in self._lists:
            self._lists[metric] = self.metrics[metric].tolist()
        return self._lists[metric]


@dataclass(frozen=True)
class MetricRule(AlertRule, ABC, Generic[M]):
    """Base of the rules about a metric.

    What a rule remembers of earlier values is in a memory of type ``M``, which belongs to one run; the rule itself does
    not change.

    Attributes:
        metric: its name in the event's ``metrics``; events without it are ignored.
        event: the events to judge: EpochCompleted, StepCompleted or EvalCompleted; or MachineMeasured, for the
            metrics of DeviceStats, StepTimer and OverheadMeter, such as "gpu0_temperature_c" and "steps_per_s".
    """

    metric: str
    event: Watched = field(default=EpochCompleted, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.event not in WATCHABLE:
            raise ConfigurationError(
                f"{type(self).__name__}({self.metric!r}, event={self.event!r}): event must be EpochCompleted, "
                "StepCompleted, EvalCompleted or MachineMeasured."
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
    def judge(self, memory: M, window: StepWindow) -> Iterator[tuple[int, str]]:
        """Adds the values of a window to ``memory``, one after the other.

        Yields:
            The index of a value, and what is wrong with it; "" if nothing is. Left out are values that do not tell and,
            so that a step is cheap, values that are fine after one that was.
        """


@checked
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

    def judge(self, memory: None, window: StepWindow) -> Iterator[tuple[int, str]]:
        """Judges each value alone; NaN tells nothing unless ``non_finite`` is set."""
        column = window.metrics[self.metric]
        if column.dtype.kind == "f":  # or NumPy would round the limit to the column's type
            column = column.astype(np.float64, copy=False)
        above = math.inf if self.above is None else self.above
        below = -math.inf if self.below is None else self.below
        bad = (column > above) | (column < below)
        if self.non_finite:
            bad |= ~np.isfinite(column)
        values = column[:1].tolist()
        if bad.any() or math.isnan(values[0]):
            values = window.values(self.metric)
        for place, value in enumerate(values):
            if bad[place]:
                yield place, self._problem(value)
            elif not math.isnan(value):
                yield place, FINE

    def _problem(self, value: Number) -> str:
        if self.non_finite and not math.isfinite(value):
            return "is not finite"
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        return f"is below {self.below:g}"


@checked
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

    def judge(self, memory: RollingQuantile, window: StepWindow) -> Iterator[tuple[int, str]]:
        """Compares each value with the quantile of those before it."""
        times, quantile = self.times, self.quantile
        warmup = self.window if self.warmup is None else self.warmup
        was_fine = False
        for place, value in enumerate(map(float, window.values(self.metric))):
            if not math.isfinite(value):
                continue
            if len(memory) >= warmup:
                usual = memory.quantile(quantile)
                if value > times * usual:
                    was_fine = False
                    yield (
                        place,
                        f"is more than {times:g} times {usual:.6g}, the {quantile:g} quantile of the last "
                        f"{len(memory)} values",
                    )
                elif not was_fine:
                    was_fine = True
                    yield place, FINE
            memory.push(value)


@dataclass(slots=True)
class BestSoFar:
    """The best value so far, None before the first, and the number of values since."""

    value: float | None
    since: int


@checked
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

    def judge(self, memory: BestSoFar, window: StepWindow) -> Iterator[tuple[int, str]]:
        """Counts each value, or starts the count again if it is the best so far."""
        goal, patience = self._goal, self.patience
        smaller_is_better = goal.mode == "min"
        was_fine = False
        for place, value in enumerate(map(float, window.values(self.metric))):
            best = memory.value
            # The first comparison is without the margin, and cheap; the goal's takes 1.5 us.
            may_improve = best is None or (value < best if smaller_is_better else value > best)
            if may_improve and goal.improves(value, best):
                memory.value, memory.since = value, 0
            else:
                memory.since += 1
            if memory.since >= patience:
                was_fine = False
                known = "there is no best value yet" if best is None else f"the best is {best:.6g}"
                yield place, f"has not improved for {memory.since} values in a row ({known})"
            elif not was_fine:
                was_fine = True
                yield place, FINE


class TheilSen:
    """The last ``window`` points, and the line through them.

    The slope is the median of the slopes of all pairs (Theil, 1950; Sen, 1968), the height the median of the residuals.
    ``push`` is O(1), ``line`` O(window^2): 0.03 ms for a window of 100, so it is not for every step.
    ``points`` and ``pushed`` continue another instance.
    """

    def __init__(self, window: int, points: Iterable[tuple[float, float]] = (), *, pushed: int = 0) -> None:
        self._points: deque[tuple[float, float]] = deque(points, maxlen=window)
        self.pushed = pushed
        """Number of calls of ``push``, including earlier ones."""

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """Yields the points, oldest first."""
        return iter(self._points)

    @property
    def full(self) -> bool:
        """Whether the window is full."""
        return len(self._points) == self._points.maxlen

    def push(self, x: float, y: float) -> None:
        """Adds a point, with an ``x`` above the previous one; removes the oldest point of a full window."""
        self._points.append((x, y))
        self.pushed += 1

    def line(self) -> tuple[float, float]:
        """Returns the slope of at least two points, and the line's height at the newest; NaN for too large numbers."""
        x, y = np.array(self._points, dtype=np.float64).T.copy()
        x -= x[-1]
        first, second = _pairs(len(self._points))
        with np.errstate(all="ignore"):
            slopes = (y.take(second) - y.take(first)) / (x.take(second) - x.take(first))
            slope = _median(slopes)
            return slope, _median(y - slope * x)


def _median(values: np.ndarray[Any, Any]) -> float:
    """Returns what ``np.median`` returns, in a third of its time, and reorders ``values``."""
    last, half = len(values) - 1, len(values) // 2
    values.partition((last // 2, half, last))  # NaN is sorted to the end
    return math.nan if math.isnan(values[last]) else float((values[last // 2] + values[half]) / 2)


@lru_cache(maxsize=4)
def _pairs(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns the indices of all pairs of ``count`` points: 8 MB for a window of 1,000."""
    return np.triu_indices(count, 1)


@checked
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

    def recall(self, saved: SavedMemory) -> TheilSen:
        """Returns the points; of a saved longer window the newest count."""
        return TheilSen(self.window, saved.points, pushed=saved.count)

    def save(self, memory: TheilSen) -> SavedMemory:
        """Returns the points, and the count that determines when the next forecast is due."""
        return SavedMemory(points=list(memory), count=memory.pushed)

    def judge(self, memory: TheilSen, window: StepWindow) -> Iterator[tuple[int, str]]:
        """Extends the line by ``within`` steps, whenever a forecast is due."""
        every = max(1, self.window // 4) if self.every is None else self.every
        for place, value in enumerate(map(float, window.values(self.metric))):
            if not math.isfinite(value):
                continue
            memory.push(window.first_step + place, value)
            if not memory.pushed % every and memory.full:
                verdict = self._verdict(*memory.line(), len(memory))
                if verdict is not None:
                    yield place, verdict

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
