"""Turns what rules find into alerts: raised once, resolved once. Pure: time is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from eventtrain.events import AlertRaised, AlertResolved
from eventtrain.events.models import escape_surrogates
from eventtrain.subscribers.alerts.message import AlertEvent
from eventtrain.subscribers.alerts.metric_rules import MetricRule, SavedMemory, StepWindow
from eventtrain.subscribers.alerts.rule import AlertRule, Findings

R = TypeVar("R", bound=AlertRule)

Change = Literal["raised", "resolved"]

RESOLVED = "back to normal"


class SavedAlert(BaseModel):
    """State of an alert in a checkpoint. Seconds are counted from the moment of saving."""

    model_config = ConfigDict(extra="forbid")

    raised: bool = False
    bad_since_step: int | None = None
    bad_for_s: float = 0.0
    quiet_s: float = 0.0


class SavedRule(BaseModel):
    """State of a rule in a checkpoint: its alerts by subject, and the memory of a metric rule."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    type: str
    alarms: dict[str, SavedAlert] = {}
    condition: SavedMemory | None = None


class AlertState:
    """One alert: raised once, after its condition has held for long enough; resolved once, when it no longer holds.

    Args:
        for_s, for_steps: how long the condition must hold without interruption.
        cooldown_s: seconds after it is resolved in which it is not raised.
    """

    def __init__(self, for_s: float = 0.0, for_steps: int = 0, cooldown_s: float = 0.0) -> None:
        self._for_s, self._for_steps, self._cooldown_s = for_s, for_steps, cooldown_s
        self._raised = False
        self._bad_since: tuple[int, float] | None = None
        self._quiet_until_s = float("-inf")

    def is_as_new(self, now_s: float) -> bool:
        """Whether a new instance with the same options would do the same."""
        return not self._raised and self._bad_since is None and now_s >= self._quiet_until_s

    def judge(self, bad: bool, step: int, now_s: float) -> Change | None:
        """Adds an observation, in the order of time; returns the change that it causes, if any."""
        if not bad:
            was_raised, self._raised, self._bad_since = self._raised, False, None
            if not was_raised:
                return None
            self._quiet_until_s = now_s + self._cooldown_s
            return "resolved"
        if self._raised:
            return None
        if self._bad_since is None:
            self._bad_since = (step, now_s)
        since_step, since_s = self._bad_since
        if (
            now_s - since_s < self._for_s
            or step - since_step < self._for_steps
            or now_s < self._quiet_until_s
        ):
            return None
        self._raised = True
        return "raised"

    def save(self, now_s: float) -> SavedAlert:
        """Returns the state for ``load``."""
        since = self._bad_since
        return SavedAlert(
            raised=self._raised,
            bad_since_step=None if since is None else since[0],
            bad_for_s=0.0 if since is None else max(0.0, now_s - since[1]),
            quiet_s=max(0.0, self._quiet_until_s - now_s),
        )

    def load(self, saved: SavedAlert, now_s: float) -> None:
        """Restores the state from ``save``; the time between the two calls does not count."""
        self._raised = saved.raised
        since = saved.bad_since_step
        self._bad_since = None if since is None else (since, now_s - saved.bad_for_s)
        self._quiet_until_s = now_s + saved.quiet_s


class RuleAlerts(Generic[R]):
    """The alerts of one rule, one for each subject in its findings."""

    def __init__(self, rule: R) -> None:
        self.rule = rule
        self._alerts: dict[str, AlertState] = {}

    def update(self, findings: Findings, step: int, now_s: float) -> list[AlertEvent]:
        """Returns the changes that the newest findings cause; subjects that are not among them are fine."""
        events: list[AlertEvent] = []
        for subject in findings:
            self._alert(subject)
        for subject, alert in list(self._alerts.items()):
            change = alert.judge(subject in findings, step, now_s)
            if change is not None:
                events.append(self._event(change, subject, findings.get(subject, RESOLVED), step))
            elif subject and alert.is_as_new(now_s):
                del self._alerts[subject]
        return events

    def _alert(self, subject: str = "") -> AlertState:
        if subject not in self._alerts:
            rule = self.rule
            self._alerts[subject] = AlertState(rule.for_s, rule.for_steps, rule.cooldown_s)
        return self._alerts[subject]

    def _event(
        self,
        change: Change,
        subject: str,
        message: str,
        step: int,
        **measured: Any,  # metric and value, which only AlertRaised has
    ) -> AlertEvent:
        name = escape_surrogates(f"{self.rule.label}: {subject}" if subject else self.rule.label)
        message = escape_surrogates(message)
        if change == "resolved":
            return AlertResolved(step=step, name=name, message=message)
        return AlertRaised(step=step, name=name, severity=self.rule.severity, message=message, **measured)

    def reset(self) -> None:
        """Forgets all alerts without resolving them."""
        self._alerts.clear()

    def save(self, now_s: float) -> SavedRule:
        """Returns the state for ``load``."""
        alerts = {subject: alert.save(now_s) for subject, alert in list(self._alerts.items())}
        return SavedRule(type=type(self.rule).__name__, alarms=alerts)

    def load(self, saved: SavedRule, now_s: float) -> None:
        """Restores the state from ``save``, unless it is that of another type of rule."""
        if saved.type != type(self.rule).__name__:
            return
        self.reset()
        for subject, alert in saved.alarms.items():
            self._alert(subject).load(alert, now_s)


class MetricRuleAlerts(RuleAlerts[MetricRule[Any]]):
    """The alert of one rule about a metric."""

    def __init__(self, rule: MetricRule[Any]) -> None:
        super().__init__(rule)
        self._memory: Any = rule.recall(SavedMemory())
        self.missing_from: Sequence[str] | None = None
        """Names of the metrics of the last event, if no event has had the rule's metric yet."""
        self._seen = False

    def judge(self, window: StepWindow, now_s: float) -> list[AlertEvent]:
        """Returns the changes that a window of steps causes, each step judged in its turn."""
        metric, alert = self.rule.metric, self._alert()
        events: list[AlertEvent] = []
        if not self._is_in(window.metrics):
            return events
        for place, verdict in self.rule.judge(self._memory, window):
            step = window.first_step + place
            change = alert.judge(bool(verdict), step, now_s)
            if change is not None:
                value = window.values(metric)[place]
                name = escape_surrogates(metric)
                message = f"{name} = {value:.6g} at step {step}" + (
                    f" {verdict}" if verdict else f": {RESOLVED}"
                )
                events.append(self._event(change, "", message, step, metric=name, value=value))
        return events

    def _is_in(self, metrics: Mapping[str, Any]) -> bool:
        if self.rule.metric in metrics:
            self._seen, self.missing_from = True, None
            return True
        if not self._seen:
            self.missing_from = tuple(metrics)
        return False

    def reset(self) -> None:
        """Forgets all alerts without resolving them, and the values seen."""
        super().reset()
        self._memory = self.rule.recall(SavedMemory())
        self._seen, self.missing_from = False, None

    def save(self, now_s: float) -> SavedRule:
        """Returns the state for ``load``, with the memory of the rule."""
        return super().save(now_s).model_copy(update={"condition": self.rule.save(self._memory)})

    def load(self, saved: SavedRule, now_s: float) -> None:
        """Restores the state from ``save``, unless it is that of another type of rule."""
        super().load(saved, now_s)
        if saved.condition is not None and saved.type == type(self.rule).__name__:
            self._memory = self.rule.recall(saved.condition)
