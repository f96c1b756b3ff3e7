"""The rules of ``Alerts`` about the values of a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, EvalCompleted, StepCompleted
from eventtrain.events.names import by_name
from eventtrain.subscribers._shared.metric_goal import Mode, make_goal
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.alerts.rule import SEVERITIES, CommonRule

WATCHABLE = (EpochCompleted, StepCompleted, EvalCompleted)
MOST_COMPARED = 1000
"""Values in the window of a ForecastRule: half a million pairs."""
Watched = Annotated[type[EpochCompleted] | type[StepCompleted] | type[EvalCompleted], by_name(*WATCHABLE)]


@dataclass(frozen=True)
class MetricRule(CommonRule):
    """What every rule about a metric has.

    Attributes:
        metric: its name in the event's ``metrics``; an event without it says nothing.
        event: the events to look at: EpochCompleted, StepCompleted or EvalCompleted.
    """

    metric: str
    event: Watched = field(default=EpochCompleted, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.event not in WATCHABLE:
            raise ConfigurationError(
                f"{type(self).__name__}({self.metric!r}, event={self.event!r}): needs EpochCompleted, StepCompleted or "
                "EvalCompleted."
            )


@dataclass(frozen=True)
class Rule(MetricRule):
    """A metric is beyond a limit, or no number.

    Attributes:
        above, below: bad is ``value > above``, ``value < below``; with both, outside of the band. NaN is neither.
        non_finite: bad is NaN and infinity.
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
                raise ConfigurationError(f"Rule({self.metric!r}): a limit of NaN can never be passed.")
        if self.above is not None and self.below is not None and self.below > self.above:
            raise ConfigurationError(
                f"Rule({self.metric!r}, above={self.above}, below={self.below}) is always broken: swap them."
            )
        if self.severity not in SEVERITIES:
            raise ConfigurationError(
                f"Rule({self.metric!r}, severity={self.severity!r}): is none of {', '.join(SEVERITIES)}."
            )
        super().__post_init__()

    @property
    def _default_label(self) -> str:
        conditions = [
            f"{word} {limit:g}"
            for word, limit in (("above", self.above), ("below", self.below))
            if limit is not None
        ]
        return f"{self.metric} {' or '.join([*conditions, *(['not finite'] if self.non_finite else [])])}"


@dataclass(frozen=True)
class SpikeRule(MetricRule):
    """A metric is more than ``times`` the exact quantile of the values before it.

    Attributes:
        window: how many values say what is usual. Spikes enter it too, NaN and infinities do not.
        quantile: of them, between 0 and 1.
        times: at least 1. The metric is one that is never negative.
        warmup: so many values have to be there first; a full window if None.
    """

    window: int = 200
    quantile: float = 0.95
    times: float = 2.0
    warmup: int | None = None
    type: Literal["spike"] = field(default="spike", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("SpikeRule", "window", self.window, at_least=1)
        require_number("SpikeRule", "quantile", self.quantile, at_least=0)
        require_number("SpikeRule", "times", self.times, at_least=1)
        if self.quantile > 1:
            raise ConfigurationError(
                f"SpikeRule(quantile={self.quantile!r}): needs a number between 0 and 1, say 0.95."
            )
        if self.warmup is not None:
            require_count("SpikeRule", "warmup", self.warmup, at_least=1)
            if self.warmup > self.window:
                raise ConfigurationError(
                    f"SpikeRule(warmup={self.warmup}, window={self.window}): the window never holds so many values."
                )

    @property
    def _default_label(self) -> str:
        return f"{self.metric} spike"


@dataclass(frozen=True)
class NoImprovementRule(MetricRule):
    """A metric was not better than its best for ``patience`` values in a row (steps, epochs or evaluations).

    Attributes:
        patience: at least 1.
        mode: "min", "max", or "auto": by the metric's name.
        min_delta: by how much it has to be better, as in EarlyStopping.
    """

    patience: int = 10
    mode: Mode = "auto"
    min_delta: float = 0.0
    type: Literal["no_improvement"] = field(default="no_improvement", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("NoImprovementRule", "patience", self.patience, at_least=1)
        make_goal("NoImprovementRule", self.metric, self.mode, self.min_delta)

    @property
    def _default_label(self) -> str:
        return f"{self.metric} no better for {self.patience}"


@dataclass(frozen=True)
class ForecastRule(MetricRule):
    """The trend of the last values crosses a limit within ``within`` steps.

    The trend is the Theil-Sen line (Theil, 1950; Sen, 1968): its slope is the median of the slopes of all pairs, so
    that almost three in ten values may be wild. NaN and infinities do not enter it.

    Attributes:
        above, below: the limit; one of them.
        within: steps.
        window: how many values; 3 to 1,000. The rule is silent until there are as many.
        every: look at every so many values; a quarter of the window if None, since each look compares all pairs.
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
            raise ConfigurationError(f"ForecastRule({self.metric!r}): give above= or below=, one of them.")
        require_number("ForecastRule", "above" if self.below is None else "below", self.limit)
        require_count("ForecastRule", "within", self.within, at_least=1)
        require_count("ForecastRule", "window", self.window, at_least=3)
        if self.window > MOST_COMPARED:
            raise ConfigurationError(
                f"ForecastRule(window={self.window}): all pairs of its values are compared, which takes memory and "
                f"time with the square of it. Use {MOST_COMPARED} at most; for a longer trend watch EpochCompleted."
            )
        if self.every is not None:
            require_count("ForecastRule", "every", self.every, at_least=1)

    @property
    def limit(self) -> float:
        """The one of ``above`` and ``below`` that was given."""
        return self.above if self.above is not None else self.below  # pyright: ignore[reportReturnType]

    @property
    def _default_label(self) -> str:
        word = "above" if self.above is not None else "below"
        return f"{self.metric} {word} {self.limit:g} within {self.within} steps"
