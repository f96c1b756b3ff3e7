"""``Alerts``: rules on metrics that raise an alert once, say when it is over, and tell a log and a webhook."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError, EventTrainError, SubscriberError
from eventtrain.event_names import by_name
from eventtrain.events import (
    AlertRaised,
    AlertResolved,
    EpochCompleted,
    EvalCompleted,
    Event,
    StepCompleted,
    SubscriberFailed,
)
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.subscribers.saved_state import SavedState
from eventtrain.subscribers.webhook import Webhook

logger = logging.getLogger("eventtrain")

Severity = Literal["info", "warning", "critical"]
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
Watched = Annotated[
    type[EpochCompleted] | type[StepCompleted] | type[EvalCompleted],
    by_name(EpochCompleted, StepCompleted, EvalCompleted),
]


@dataclass(frozen=True)
class Rule:
    """When a metric is not as it should be.

    Attributes:
        metric: its name in the event's ``metrics``; an event without it says nothing.
        above, below: bad is ``value > above``, ``value < below``; with both, outside of the band. NaN is neither.
        non_finite: bad is NaN and infinity.
        name: of the alert; made from the rule if None. Unique among an ``Alerts``' rules.
        severity: "info", "warning" or "critical".
        event: the events to look at: EpochCompleted, StepCompleted or EvalCompleted.
    """

    metric: str
    above: float | None = None
    below: float | None = None
    non_finite: bool = False
    name: str | None = None
    severity: Severity = "warning"
    event: Watched = EpochCompleted

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
        if self.severity not in LEVELS:
            raise ConfigurationError(
                f"Rule({self.metric!r}, severity={self.severity!r}): is none of {', '.join(LEVELS)}."
            )
        if self.event not in (EpochCompleted, StepCompleted, EvalCompleted):
            raise ConfigurationError(
                f"Rule({self.metric!r}, event={self.event!r}): needs EpochCompleted, StepCompleted or EvalCompleted."
            )

    @property
    def label(self) -> str:
        """The alert's name."""
        if self.name is not None:
            return self.name
        conditions = [
            f"{word} {limit:g}"
            for word, limit in (("above", self.above), ("below", self.below))
            if limit is not None
        ]
        return f"{self.metric} {' or '.join([*conditions, *(['not finite'] if self.non_finite else [])])}"

    def judge(self, value: float) -> str | None:
        """What is wrong with ``value``; "" if nothing is; None if the rule cannot tell."""
        if self.non_finite and not math.isfinite(value):
            return "is not finite"
        if math.isnan(value):
            return None
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"is below {self.below:g}"
        return ""


class AlertsState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    active: list[str]


class Alerts(Subscriber):
    """Publishes AlertRaised when a rule is first broken and AlertResolved when it holds again, and tells of both.

    Args:
        rules: what to watch.
        url: where to POST each alert event as JSON; it may hold secrets and is shown nowhere. None: the log only.
        label: what messages call that target.
        timeout_s: for connecting, and for each wait for the answer.
        retries, retry_delay_s: tries after the first, and the seconds before the first of them; doubled each time.

    Delivery runs in a thread of its own, in order, and delays nothing. An alert that cannot be delivered is said by
    SubscriberFailed. ``stop`` waits up to ``timeout_s`` (at least 5) seconds for what is on its way.

    Raises:
        ConfigurationError: no rule, two of one name, or something that is no http(s) URL.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        url: str | SecretStr | None = None,
        *,
        label: str = "webhook",
        timeout_s: float = 5.0,
        retries: int = 3,
        retry_delay_s: float = 0.5,
    ) -> None:
        names = [rule.label for rule in rules]
        if not rules:
            raise ConfigurationError(
                'Alerts(rules=[]) watches nothing. Give at least one, such as Rule("loss", non_finite=True).'
            )
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise ConfigurationError(
                f"Alerts: two rules are named {double!r}. Give one of them another name=."
            )
        self._rules: dict[type[Event], list[Rule]] = {}
        for rule in rules:
            self._rules.setdefault(rule.event, []).append(rule)
        self.events = tuple(self._rules)
        self._active: set[str] = set()
        self._label = label
        self._finish_timeout_s = max(5.0, timeout_s)
        self._run: RunContext | None = None
        self._webhook: Webhook | None = None
        self._make_webhook = None if url is None else partial(
            Webhook, SecretStr(url) if isinstance(url, str) else url,
            label=label, timeout_s=timeout_s, retries=retries, retry_delay_s=retry_delay_s, failed=self._not_delivered,
        )  # fmt: skip
        if self._make_webhook is not None:
            self._make_webhook()  # finds out now whether that is a URL

    async def start(self, run: RunContext) -> None:
        """Start the delivery thread. What was raised and not resolved stays raised."""
        self._run = run
        if self._make_webhook is not None:
            self._webhook = self._make_webhook()
            self._webhook.start()

    async def stop(self) -> None:
        """Wait for what is on its way. Raises SubscriberError where that takes too long."""
        webhook, self._webhook = self._webhook, None
        if webhook is not None:
            left = await anyio.to_thread.run_sync(
                webhook.finish, self._finish_timeout_s, abandon_on_cancel=True
            )
            if left:
                raise SubscriberError(
                    f"{left} alerts did not reach {self._label} within {self._finish_timeout_s:g} s after the run."
                )

    async def handle(self, event: EpochCompleted | StepCompleted | EvalCompleted) -> None:
        """Judge one event by the rules for it."""
        for rule in self._rules[type(event)]:
            value = event.metrics.get(rule.metric)
            verdict = None if value is None else rule.judge(float(value))
            if verdict is None or bool(verdict) == (rule.label in self._active):
                continue
            text = f"{rule.metric} = {value:.6g} at step {event.step}"
            if verdict:
                self._active.add(rule.label)
                message = f"{text} {verdict}"
                alert = AlertRaised(
                    step=event.step,
                    name=rule.label,
                    severity=rule.severity,
                    message=message,
                    metric=rule.metric,
                    value=value,
                )
                logger.log(LEVELS[rule.severity], "Alert %s: %s", rule.label, message)
            else:
                self._active.discard(rule.label)
                alert = AlertResolved(step=event.step, name=rule.label, message=f"{text} is fine again")
                logger.info("Alert %s is over: %s", rule.label, text)
            await self._tell(alert)

    async def _tell(self, alert: Event) -> None:
        assert self._run is not None
        await self._run.publish_async(alert)
        if self._webhook is not None:
            self._webhook.post(alert)

    def _not_delivered(self, event: Event, reason: str) -> None:
        logger.error("The alert of step %d could not be delivered to %s: %s", event.step, self._label, reason)
        assert self._run is not None
        try:
            self._run.publish(
                SubscriberFailed(
                    step=event.step,
                    subscriber=self.name or "Alerts",
                    event_kind=event.kind,
                    error=f"not delivered to {self._label}: {reason}",
                )
            )
        except EventTrainError:
            logger.error("The bus did not take the event that says so.")

    def state_dict(self) -> dict[str, Any]:
        """The alerts that are raised now, as plain JSON data."""
        return AlertsState(active=sorted(self._active)).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over which alerts are raised, so that a resumed run does not raise them anew.

        Raises:
            StateError: another version, or broken.
        """
        self._active = set(AlertsState.parse(self.name or "Alerts", state).active)
