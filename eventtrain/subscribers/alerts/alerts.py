"""``Alerts``: raises an alert once when a rule is met, resolves it once when it no longer is, and notifies targets."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import anyio
import anyio.to_thread
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    EpochCompleted,
    EvalCompleted,
    Event,
    MachineMeasured,
    RunCompleted,
    RunFailed,
    StepsCompleted,
)
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.paths import file_path, require_writable_file
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.alerts.alert_state import MetricRuleAlerts, RuleAlerts, SavedRule
from eventtrain.subscribers.alerts.delivery import Delivery, DeliveryOptions
from eventtrain.subscribers.alerts.event_rules import EventRule, RunEndRule
from eventtrain.subscribers.alerts.message import AlertEvent
from eventtrain.subscribers.alerts.metric_rules import MetricRule, StepWindow
from eventtrain.subscribers.alerts.rules import AnyRule
from eventtrain.subscribers.alerts.target import AlertTarget
from eventtrain.subscribers.alerts.timed_rules import RuleWatcher, TimedRule
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

logger = logging.getLogger("eventtrain")

MOST_NAMES = 20
"""Names of metrics in one message."""


class AlertsState(SavedState):
    """State in a checkpoint; ``began_s``: when the run first began, in seconds since 1970."""

    version: Literal[2] = 2
    rules: dict[str, SavedRule]
    began_s: float | None = None


class Alerts(Subscriber):
    """Publishes AlertRaised when a rule is first met and AlertResolved when it no longer is, and notifies targets.

    Steps are judged by windows, each step in its turn, so no event is built for a step. Timed rules are judged in
    threads of their own, which see a training thread or an event loop that hangs. Each target has a thread of its own
    too, so a slow or dead target delays nothing. SubscriberFailed reports an alert that could not be delivered.

    Args:
        rules: such as ``Rule("loss", non_finite=True)`` and ``StallRule(after_s=600)``.
        url: where alerts are sent: ``https://...`` for a webhook, else a URL of Apprise. It may hold secrets and is
            never shown. None: to the log only.
        label: the name of that target in messages.
        key: signs the requests to a webhook.
        allow_private: a webhook may be in a private network.
        targets: more targets.
        attach: files of ``run_dir``, such as ``"report.html"``, that are sent with the alert about the end of the run,
            except to webhooks. List ``Alerts`` after the subscribers that write them; the log reports a file that is
            missing or older than the run.
        dead_letters: file in ``run_dir`` for alerts that were not delivered, one JSON object a line.
        group_s: how long after an alert to wait for others, which are then sent in the same message.
        timeout_s: for connecting, and for each wait for the answer.
        retries, retry_delay_s: attempts after the first, and the seconds before the first of them; doubled each time.
        finish_timeout_s: how long ``stop`` waits for deliveries, within the trainer's ``drain_timeout_s``.
        clock: returns seconds since some moment, and never goes back.

    Raises:
        ConfigurationError: no rule, two rules of one name, a URL that cannot work, or a missing package.
    """

    @checked
    def __init__(
        self,
        rules: Sequence[AnyRule],
        url: str | SecretStr | None = None,
        *,
        label: str = "target",
        key: str | SecretStr | None = None,
        allow_private: bool = False,
        targets: Sequence[AlertTarget] = (),
        attach: Sequence[str] = (),
        dead_letters: str | Path = "alerts.dead.jsonl",
        group_s: float = 1.0,
        timeout_s: float = 5.0,
        retries: int = 3,
        retry_delay_s: float = 0.5,
        finish_timeout_s: float = 10.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        for name, value in (("group_s", group_s), ("retry_delay_s", retry_delay_s)):
            require_number("Alerts", name, value, at_least=0)
        for name, value in (("timeout_s", timeout_s), ("finish_timeout_s", finish_timeout_s)):
            require_number("Alerts", name, value, above=0)
        require_count("Alerts", "retries", retries)
        if url is not None:
            targets = (*targets, AlertTarget(url, label, key, allow_private))
        _require_unique_names(rules, targets)
        self._delivery_options = DeliveryOptions(
            [(target.label, target.connect(timeout_s)) for target in targets],
            retries=retries,
            retry_delay_s=retry_delay_s,
            group_s=group_s,
            attach=[file_path(name, "Alerts") for name in attach],
            dead_letters=file_path(dead_letters, "Alerts"),
            finish_timeout_s=finish_timeout_s,
        )
        self.output_paths = (self._delivery_options.dead_letters,) if targets else ()
        self._clock = clock
        self._alerts: dict[str, RuleAlerts[Any]] = {
            rule.label: MetricRuleAlerts(rule) if isinstance(rule, MetricRule) else RuleAlerts(rule)
            for rule in rules
        }
        self._by_event: dict[type[Event], list[RuleAlerts[Any]]] = {}
        for alerts in self._alerts.values():
            for kind in alerts.rule.events:
                self._by_event.setdefault(kind, []).append(alerts)
        self.events = tuple(dict.fromkeys([*self._by_event, RunCompleted, RunFailed]))
        self._run: RunContext | None = None
        self._delivery: Delivery | None = None
        self._watcher: RuleWatcher | None = None
        self._began_s: float | None = None
        self._loaded = False

    async def start(self, run: RunContext) -> None:
        """Starts the threads. In a run that resumes, alerts that were raised and not resolved stay raised.

        The run fails before its first step if no event can have the metric of a rule.
        """
        if self.every != 1 or self.every_s is not None:
            raise ConfigurationError(
                f"Alerts(every={self.every!r}, every_s={self.every_s!r}): Alerts must get every event, so as not to "
                "miss an alert. Leave both out; for_steps= and for_s= of a rule set how long a condition must hold."
            )
        if not self._loaded:
            self._began_s = time.time()
            if run.restarts or (self._run is not None and self._run.run_id != run.run_id):
                for alerts in self._alerts.values():
                    alerts.reset()
        self._run, self._loaded = run, False
        for alerts in self._alerts.values():
            if isinstance(alerts.rule, RunEndRule):
                alerts.reset()
        owner = self.name or "Alerts"
        for alerts in self._alerts.values():
            rule = alerts.rule
            if isinstance(rule, MetricRule) and rule.event is not MachineMeasured:
                MetricReader(f"The rule {rule.label!r} of {owner}", rule.metric).look_up_in(run, rule.event)
        for path in self.output_paths:
            await in_own_thread(partial(require_writable_file, run.run_dir / path, owner))
        self._delivery = await anyio.to_thread.run_sync(Delivery, self._delivery_options, run, owner)
        self._watcher = RuleWatcher(
            [one for one in self._alerts.values() if isinstance(one.rule, TimedRule)],
            run,
            self._delivery,
            owner=owner,
            clock=self._clock,
            began_s=self._began_s or time.time(),
        )

    async def handle(self, event: Event) -> None:
        """Judges one event; sends and publishes the alerts that it raises or resolves."""
        run, delivery, watcher = self._run, self._delivery, self._watcher
        if run is None or delivery is None or watcher is None:  # an evaluation before the first run
            return
        at_end = isinstance(event, (RunCompleted, RunFailed))
        if at_end:
            watcher.end()
        watcher.note(event)
        found = sorted(self._judge(event), key=lambda alert: alert.step)
        for alert in [delivery.send(alert, at_end=at_end) for alert in found]:
            await run.publish_async(alert)

    def _judge(self, event: Event) -> list[AlertEvent]:
        now_s, found = self._clock(), list[AlertEvent]()
        window = StepWindow(event.step, {})
        if isinstance(event, StepsCompleted):
            window = StepWindow(event.first_step, event.metrics)
        elif isinstance(event, (EpochCompleted, EvalCompleted, MachineMeasured)):
            window = StepWindow.of_one(event.step, event.metrics)
        for alerts in self._by_event.get(type(event), ()):
            if isinstance(alerts, MetricRuleAlerts):
                found += alerts.judge(window, now_s)
            elif isinstance(alerts.rule, EventRule):
                found += alerts.update(alerts.rule.judge(event), event.step, now_s)
        return found

    async def finish(self) -> None:
        """Ends the threads of timed rules; warns of rules whose metric never appeared."""
        if self._watcher is not None:
            await anyio.to_thread.run_sync(self._watcher.join, limiter=anyio.CapacityLimiter(1))
        for alerts in self._alerts.values():
            if isinstance(alerts, MetricRuleAlerts) and alerts.missing_from is not None:
                rule, names = alerts.rule, sorted(alerts.missing_from)
                more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
                logger.warning(
                    "Rule %r of Alerts had no effect: no event had the metric %r, only %s%s.",
                    rule.label, rule.metric, ", ".join(names[:MOST_NAMES]) or "none", more,
                )  # fmt: skip

    async def stop(self) -> None:
        """Waits for deliveries. Raises SubscriberError if that takes longer than ``finish_timeout_s``."""
        if self._delivery is not None:
            await self._delivery.finish()

    def state_dict(self) -> dict[str, Any]:
        """Returns raised alerts, waiting times, cooldowns and the values that rules compare with, as JSON data."""
        now_s = self._clock()
        rules = {label: alerts.save(now_s) for label, alerts in self._alerts.items()}
        return AlertsState(rules=rules, began_s=self._began_s).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of rules by their names. Raises StateError for another version or invalid data."""
        saved, now_s = AlertsState.parse(self.name or "Alerts", state), self._clock()
        for label, rule in saved.rules.items():
            if label in self._alerts:
                self._alerts[label].load(rule, now_s)
        self._began_s, self._loaded = saved.began_s, True


def _require_unique_names(rules: Sequence[AnyRule], targets: Sequence[AlertTarget]) -> None:
    names = Counter(rule.label for rule in rules)
    if not names:
        raise ConfigurationError(
            'Alerts(rules=[]) watches nothing. Give at least one rule, such as Rule("loss", non_finite=True).'
        )
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ConfigurationError(f"Alerts: two rules are named {name!r}. Give one of them another name=.")
    if len({target.label for target in targets}) < len(targets):
        raise ConfigurationError(
            "Alerts: two targets have the same label, the only thing about them that is shown. Give each its own."
        )
