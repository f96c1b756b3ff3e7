"""What a rule finds, as the events that say so: raised once, resolved once. Pure: time is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from eventtrain.events import AlertRaised, AlertResolved
from eventtrain.events.models import Number
from eventtrain.subscribers.alerts.alarm import Alarm, AlarmState, Change
from eventtrain.subscribers.alerts.conditions import ConditionState, condition_of
from eventtrain.subscribers.alerts.message import AlertEvent
from eventtrain.subscribers.alerts.metric_rules import MetricRule
from eventtrain.subscribers.alerts.rule import CommonRule


class RuleState(BaseModel):
    """What is remembered of one rule."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    type: str
    alarms: dict[str, AlarmState] = {}
    condition: ConditionState | None = None


class Alarms:
    """The alerts of one rule, one for each subject that it finds something wrong with; "" where it has only one."""

    def __init__(self, rule: CommonRule) -> None:
        self.rule = rule
        self._alarms: dict[str, Alarm] = {}

    def update(self, problems: Mapping[str, str], step: int, now_s: float) -> list[AlertEvent]:
        """What is wrong now, by subject; what is not in it is fine."""
        events: list[AlertEvent] = []
        for subject in problems:
            self.alarm(subject)
        for subject, alarm in list(self._alarms.items()):
            change = alarm.judge(subject in problems, step, now_s)
            if change is not None:
                events.append(self._event(change, subject, problems.get(subject, "it is over"), step))
            elif subject and alarm.is_as_new(now_s):
                del self._alarms[subject]
        return events

    def alarm(self, subject: str = "") -> Alarm:
        """That of one subject."""
        rule = self.rule
        return self._alarms.setdefault(subject, Alarm(rule.for_s, rule.for_steps, rule.cooldown_s))

    def _event(
        self,
        change: Change,
        subject: str,
        message: str,
        step: int,
        metric: str | None = None,
        value: Number | None = None,
    ) -> AlertEvent:
        name = _utf8(f"{self.rule.label}: {subject}" if subject else self.rule.label)
        message = _utf8(message)
        if change == "resolved":
            return AlertResolved(step=step, name=name, message=message)
        return AlertRaised(
            step=step,
            name=name,
            severity=self.rule.severity,
            message=message,
            metric=None if metric is None else _utf8(metric),
            value=value,
        )

    def reset(self) -> None:
        """Begin anew: forget what is raised, without a word."""
        self._alarms.clear()

    def save(self, now_s: float) -> RuleState:
        """What ``load`` takes."""
        alarms = {subject: alarm.save(now_s) for subject, alarm in list(self._alarms.items())}
        return RuleState(type=type(self.rule).__name__, alarms=alarms)

    def load(self, state: RuleState, now_s: float) -> None:
        """Go on from ``state``, if it is that of a rule of this type."""
        if state.type != type(self.rule).__name__:
            return
        self.reset()
        for subject, saved in state.alarms.items():
            self.alarm(subject).load(saved, now_s)


class MetricAlarms(Alarms):
    """The alert of one rule about a metric."""

    rule: MetricRule

    def __init__(self, rule: MetricRule) -> None:
        super().__init__(rule)
        self._condition = condition_of(rule)
        self.looked_at: Sequence[str] | None = None
        """The names of the metrics of the last event that lacked this one; None once one had it."""
        self._seen = False

    def look(self, metrics: Mapping[str, Number], step: int, now_s: float) -> list[AlertEvent]:
        """Judge by one event's metrics."""
        value = metrics.get(self.rule.metric)
        if value is None:
            self._note_missing(metrics)
            return []
        self._note_seen()
        return self._judge(step, value, now_s)

    def look_along(
        self,
        columns: Mapping[str, np.ndarray[Any, Any]],
        values: Mapping[str, Sequence[Number]],
        first_step: int,
        now_s: float,
    ) -> list[AlertEvent]:
        """Judge by a window of steps, each in its turn; ``values`` are the same numbers as ``columns``."""
        column = columns.get(self.rule.metric)
        if column is None:
            self._note_missing(columns)
            return []
        self._note_seen()
        numbers, alarm = values[self.rule.metric], self.alarm()
        events: list[AlertEvent] = []
        place = 0
        while place < len(numbers):
            if alarm.idle:
                place = self._condition.skip(first_step, column, numbers, place)
                if place == len(numbers):
                    break
            events += self._judge(first_step + place, numbers[place], now_s)
            place += 1
        return events

    def _judge(self, step: int, value: Number, now_s: float) -> list[AlertEvent]:
        verdict = self._condition.judge(step, value)
        if verdict is None:
            return []
        change = self.alarm().judge(bool(verdict), step, now_s)
        if change is None:
            return []
        metric = self.rule.metric
        message = f"{metric} = {value:.6g} at step {step} {verdict or 'is fine again'}"
        return [self._event(change, "", message, step, metric, value)]

    def _note_seen(self) -> None:
        self._seen, self.looked_at = True, None

    def _note_missing(self, metrics: Mapping[str, Any]) -> None:
        if not self._seen:
            self.looked_at = tuple(metrics)

    def reset(self) -> None:
        """With the values that the condition remembers."""
        super().reset()
        self._condition = condition_of(self.rule)
        self._seen, self.looked_at = False, None

    def save(self, now_s: float) -> RuleState:
        """With the values that the condition remembers."""
        return super().save(now_s).model_copy(update={"condition": self._condition.state})

    def load(self, state: RuleState, now_s: float) -> None:
        """Go on from ``state``."""
        super().load(state, now_s)
        if state.condition is not None and state.type == type(self.rule).__name__:
            self._condition.load(state.condition)


def _utf8(text: str) -> str:
    """``text`` as every target can have it: half a surrogate pair, in the text of an error say, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
