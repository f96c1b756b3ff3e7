"""``MetricMonitor``: when patience with a metric is exhausted, in any unit; ``MonitorPolicy``: base of its policies."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from time import monotonic
from typing import Literal

from pydantic import ConfigDict

from eventtrain.control.control import Control
from eventtrain.events import TO_BE_CONTINUED, EpochCompleted, EvalCompleted, RunCompleted, StepCompleted
from eventtrain.subscribers._shared.metric_goal import Goal
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import STEP_LAG, Policy
from eventtrain.validation.arguments import require_choice, require_count

Unit = Literal["epochs", "steps", "evaluations", "seconds"]
"""Unit of patience, cooldown and start_from."""
NaNPolicy = Literal["count", "ignore", "stop"]
"""A NaN counts as no improvement, is skipped, or stops the run. It is never the best value."""
Verdict = Literal["", "improved", "exhausted", "stop"]
"""The value is the best so far; it is not, and patience is exhausted; it is NaN, which stops the run."""
Monitored = EpochCompleted | EvalCompleted | StepCompleted

UNITS: dict[Unit, tuple[type[Monitored], int | None]] = {
    "epochs": (EpochCompleted, 0),
    "steps": (StepCompleted, STEP_LAG),
    "evaluations": (EvalCompleted, 0),
    "seconds": (EpochCompleted, None),
}
"""Event with the metric, and lag; None where a decision depends on the clock, so that it is not reproducible anyway."""


@dataclass(slots=True)
class MonitorState:
    """State of a ``MetricMonitor``, and a part of ``MonitorPolicyState``; not a model, since steps change it.

    Attributes:
        best, best_epoch, best_step: the best value so far and where it was observed; None before the first.
        wait: how long there has been no improvement that counts, nor a cooldown.
        cooldown_left: how much of the cooldown is left.
        seen: number of values observed, skipped ones included.
        last_step: of the last observation.
        elapsed_s: for "seconds": time from the first to the last observation, without the time between two runs.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    version: Literal[1] = 1
    best: float | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    wait: float = 0
    cooldown_left: float = 0
    seen: int = 0
    last_step: int | None = None
    elapsed_s: float = 0


@dataclass(eq=False)
class MetricMonitor:
    """State machine of Keras' ``EarlyStopping`` and ``ReduceLROnPlateau`` in one, for any unit of patience. Pure.

    Args:
        goal: what counts as better.
        patience: how long to wait for an improvement, in ``unit``.
        unit: epochs and evaluations are counted, one for each observation; steps and seconds are measured between
            observations.
        baseline: an improvement that does not beat it neither restarts the count nor ends patience.
        cooldown: how long nothing counts after ``begin_cooldown``; the observation that ends it counts.
        start_from: earlier values are skipped: an epoch index, a step, a number of evaluations, or seconds after the
            first observation.
        nan: effect of a NaN.
    """

    goal: Goal
    patience: float = 0
    _: KW_ONLY
    unit: Unit = "epochs"
    baseline: float | None = None
    cooldown: float = 0
    start_from: float = 0
    nan: NaNPolicy = "count"

    def __post_init__(self) -> None:
        self.load(MonitorState())

    def load(self, state: MonitorState) -> None:
        """Continues from a copy of ``state``."""
        self.state = replace(state)
        self._last_s: float | None = None

    @property
    def rule(self) -> str:
        """Patience and margin, for messages: without the margin a lower value could appear beside "no improvement"."""
        goal = self.goal
        share = " of the best" if goal.relative else ""
        margin = f", min_delta {goal.min_delta:g}{share}" if goal.min_delta else ""
        return f"patience {self.patience:g}{margin}"

    def observe(self, value: float, *, epoch: int, step: int, time_s: float = 0.0) -> Verdict:
        """Updates ``state`` with one value, in the order of training.

        Only the unit "seconds" uses ``time_s``, and only its differences: from the first observation, also the first
        after ``load``, no time has passed.
        """
        state = self.state
        passed_s = self._passed_s(time_s)
        place = {"epochs": epoch, "steps": step, "evaluations": state.seen, "seconds": state.elapsed_s}
        state.seen += 1
        if place[self.unit] < self.start_from:
            return ""
        elapsed = self._elapsed(step, passed_s)
        if math.isnan(value) and self.nan != "count":
            return "stop" if self.nan == "stop" else ""
        if state.cooldown_left > 0:
            state.cooldown_left = max(0, state.cooldown_left - elapsed)
            state.wait = 0
        improved = self.goal.improves(value, state.best)
        if improved:
            state.best, state.best_epoch, state.best_step = value, epoch, step
        if improved and (self.baseline is None or self.goal.improves(value, self.baseline)):
            state.wait = 0
        elif state.cooldown_left == 0:
            state.wait += elapsed
        if improved:
            return "improved"
        return "exhausted" if state.cooldown_left == 0 and state.wait >= self.patience else ""

    def begin_cooldown(self) -> None:
        """Restarts the count after a decision took effect, when the cooldown is over."""
        self.state.cooldown_left = self.cooldown
        self.state.wait = 0

    def _elapsed(self, step: int, passed_s: float) -> float:
        last_step, self.state.last_step = self.state.last_step, step
        if self.unit == "seconds":
            return passed_s
        return step - last_step if self.unit == "steps" and last_step is not None else 1

    def _passed_s(self, time_s: float) -> float:
        if self.unit != "seconds":
            return 0.0  # the clock of a rerun differs, and its state must not
        passed_s = 0.0 if self._last_s is None else max(0.0, time_s - self._last_s)
        self._last_s = time_s
        self.state.elapsed_s += passed_s
        return passed_s


class MonitorPolicyState(SavedState):
    """State of a ``MonitorPolicy``."""

    version: Literal[1] = 1
    monitor: MonitorState


class MonitorPolicy(Policy[MonitorPolicyState]):
    """Decides when a metric no longer improves.

    The arguments of ``monitor`` that all these policies have are checked here; each raises ConfigurationError.
    """

    _initial = MonitorPolicyState(monitor=MonitorState())

    def __init__(self, metric: str, monitor: MetricMonitor, *, strict: bool) -> None:
        owner = type(self).__name__
        require_count(owner, "patience", monitor.patience)
        require_choice(owner, "patience_unit", monitor.unit, tuple(UNITS))
        require_choice(owner, "nan", monitor.nan, ("count", "ignore", "stop"))
        event, self.lag = UNITS[monitor.unit]
        self.events = (event, RunCompleted)
        self.on_error = "fail" if strict else "isolate"
        self.state_about = {"monitor": metric, "mode": monitor.goal.mode, "unit": monitor.unit}
        self._metric = metric
        self._monitor = monitor
        self._reader = MetricReader(owner, metric, strict=strict)

    @property
    def best(self) -> float | None:
        """The best value so far; None before the first."""
        return self._monitor.state.best

    @property
    def wait(self) -> float:
        """How long there has been no improvement that counts, in ``patience_unit``."""
        return self._monitor.state.wait

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded."""
        await super().start(run)
        self._reader = self._reader.for_run(self._name, evaluates=self._evaluates(run))
        event = UNITS[self._monitor.unit][0]
        self._reader.look_up_in(run, event, unprefixed=event is EvalCompleted)

    def _evaluates(self, run: RunContext) -> bool:
        """Whether the metrics are those of epochs of a run that evaluates."""
        return run.can_evaluate and self._monitor.unit in ("epochs", "seconds")

    async def handle(self, event: Monitored | RunCompleted, control: Control) -> None:
        """Counts, and decides when patience is exhausted."""
        if isinstance(event, RunCompleted):
            if event.reason not in TO_BE_CONTINUED:
                self._end()
            return
        value = self._reader.read(event.metrics, unprefixed=isinstance(event, EvalCompleted))
        if value is not None:
            verdict = self._monitor.observe(value, epoch=event.epoch, step=event.step, time_s=monotonic())
            self._decide(event, value, verdict, control)

    @abstractmethod
    def _decide(self, event: Monitored, value: float, verdict: Verdict, control: Control) -> None:
        """Sends the commands that follow from one observation."""

    def _end(self) -> None:
        """Reports a metric that was never observed, when the run has ended by itself."""
        if self._monitor.state.seen == 0:
            self._reader.end()

    def _get_state(self) -> MonitorPolicyState:
        return MonitorPolicyState(monitor=self._monitor.state)

    def _set_state(self, state: MonitorPolicyState) -> None:
        self._monitor.load(state.monitor)
