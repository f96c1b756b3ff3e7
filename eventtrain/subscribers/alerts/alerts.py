"""``Alerts``: rules that raise an alert once, say when it is over, and tell people wherever they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import anyio
import anyio.to_thread
from pydantic import SecretStr

from eventtrain.errors import BusClosed, ConfigurationError, EventTrainError, QueueFull, SubscriberError
from eventtrain.events import (
    AlertRaised,
    CheckpointCommitted,
    CheckpointFailed,
    EpochCompleted,
    EvalCompleted,
    Event,
    LoopStalled,
    RunCompleted,
    RunFailed,
    StepCompleted,
    StepsCompleted,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
)
from eventtrain.subscribers._shared.paths import file_path, inside_run_dir
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.alerts.alert_state import Alarms, MetricAlarms, RuleState
from eventtrain.subscribers.alerts.attachments import Attachments
from eventtrain.subscribers.alerts.message import AlertEvent
from eventtrain.subscribers.alerts.metric_rules import MetricRule
from eventtrain.subscribers.alerts.rule_types import AnyRule
from eventtrain.subscribers.alerts.run_rules import (
    CheckpointFailedRule,
    DeadlineRule,
    RunCompletedRule,
    RunFailedRule,
    SlowSubscriberRule,
    StallRule,
)
from eventtrain.subscribers.alerts.sender import Sender, SendOptions, finish, give_up
from eventtrain.subscribers.alerts.target import AlertTarget
from eventtrain.subscribers.alerts.timed_rules import ClockAlarms
from eventtrain.subscribers.alerts.transports import connect
from eventtrain.subscribers.alerts.undelivered import DeadLetters
from eventtrain.subscribers.alerts.watchers import ALL
from eventtrain.subscribers.base import RunContext, Subscriber

logger = logging.getLogger("eventtrain")

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
BEHIND = (LoopStalled, SubscriberLagged, SubscriberDisabled)
QUEUE_FULL_S = 0.01
GIVING_UP_S = 2.0
"""How long the end waits for a disk that takes no dead letters."""


class AlertsState(SavedState):
    """What survives a restart; ``began_s``: when the run first began, in seconds since 1970."""

    version: Literal[2] = 2
    rules: dict[str, RuleState]
    began_s: float | None = None


class Alerts(Subscriber):
    """Publishes AlertRaised when a rule is first met and AlertResolved when it no longer is, and tells targets of both.

    Args:
        rules: what to watch, such as ``Rule("loss", non_finite=True)`` and ``StallRule(after_s=600)``.
        url: where alerts are sent: ``https://...`` for a webhook, else a URL of Apprise. It may hold secrets and is
            shown nowhere. None: the log only.
        label: what that target is called in messages.
        key: a webhook is signed with it.
        allow_private: a webhook may lead into the own network.
        targets: more of them.
        attach: files of ``run_dir``, such as ``"report.html"``, that go with the message about the end of the run. A
            webhook takes none. List ``Alerts`` behind who writes them; what is not there, or older than the run, is
            said.
        dead_letters: a file in ``run_dir`` for alerts that reached nobody, one JSON object a line.
        group_s: so long after an alert is waited for others, which then go in the same message.
        timeout_s: for connecting, and for each wait for the answer.
        retries, retry_delay_s: tries after the first, and the seconds before the first of them; doubled each time.
        finish_timeout_s: how long ``stop`` waits for what is on its way, within the trainer's ``drain_timeout_s``.
        clock: gives seconds since some moment, and never goes back.

    Steps are judged by windows, each step in its turn, so no event is built for a step. What goes by the clock is
    watched in a thread of its own, which sees a training thread or an event loop that hangs. Each target has a thread
    of its own too; a slow or dead one delays nothing. An alert that could not be delivered is said by
    SubscriberFailed.

    Raises:
        ConfigurationError: no rule, two of one name, a URL that cannot work, or a package that is missing.
    """

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
        _require_names(rules)
        for name, value in (("group_s", group_s), ("retry_delay_s", retry_delay_s)):
            require_number("Alerts", name, value, at_least=0)
        for name, value in (("timeout_s", timeout_s), ("finish_timeout_s", finish_timeout_s)):
            require_number("Alerts", name, value, above=0)
        require_count("Alerts", "retries", retries)
        targets = (*targets, *([] if url is None else [AlertTarget(url, label, key, allow_private)]))
        _require_labels(targets)
        self._targets = [(target.label, connect(target, timeout_s)) for target in targets]
        self._options = SendOptions(retries, retry_delay_s, group_s)
        self._attached = Attachments([file_path(name, "Alerts") for name in attach])
        self._dead_letters = file_path(dead_letters, "Alerts")
        self._finish_timeout_s = finish_timeout_s
        self._clock = clock
        self._alarms = {
            rule.label: MetricAlarms(rule) if isinstance(rule, MetricRule) else Alarms(rule) for rule in rules
        }
        self._by_event: dict[type[Event], list[MetricAlarms]] = {}
        for alarms in self._alarms.values():
            if isinstance(alarms, MetricAlarms):
                kind = StepsCompleted if alarms.rule.event is StepCompleted else alarms.rule.event
                self._by_event.setdefault(kind, []).append(alarms)
        self.events = _events_for(rules, self._by_event)
        self._run: RunContext | None = None
        self._senders: list[Sender] = []
        self._by_clock: ClockAlarms | None = None
        self._held: list[AlertEvent] = []
        self._step = 0
        self._began_s: float | None = None
        self._loaded = False

    # --- the life of a run ----------------------------------------------------------------------------------

    async def start(self, run: RunContext) -> None:
        """Start the threads. In a run that goes on, what was raised and not resolved stays raised."""
        if self.every != 1 or self.every_s is not None:
            raise ConfigurationError(
                f"Alerts(every={self.every!r}, every_s={self.every_s!r}): looks at everything, or an alert could be "
                "missed. Leave both out; for_steps= and for_s= of a rule say how long something has to last."
            )
        if not self._loaded:
            self._began_s = time.time()
            if run.restarts or (self._run is not None and self._run.run_id != run.run_id):
                for alarms in self._alarms.values():
                    alarms.reset()
        self._run, self._loaded, self._held = run, False, []
        self._step = run.start_step
        for rule in (RunFailedRule, RunCompletedRule):
            for alarms in self._of(rule):
                alarms.reset()
        await anyio.to_thread.run_sync(self._attached.begin, run.run_dir)
        letters = DeadLetters(inside_run_dir(run.run_dir, self._dead_letters, "Alerts"))
        self._senders = [
            Sender(label, target, self._options, letters, self._not_delivered)
            for label, target in self._targets
        ]
        for sender in self._senders:
            sender.start()
        self._by_clock = ClockAlarms(
            self.name or "Alerts",
            tuple(self._alarms.values()),
            run,
            clock=self._clock,
            began_s=self._began_s or time.time(),
            steps=self._steps_made,
            tell=self._tell_from_thread,
        )
        self._by_clock.start()

    async def handle(self, event: Event) -> None:
        """Judge one event."""
        if isinstance(event, StepsCompleted):
            self._step = event.last_step
        found = sorted(self._judge(event), key=lambda alert: alert.step)
        if found:
            found = [self._with_run(alert) for alert in found]
            for alert in found:
                self._tell(alert, hold=isinstance(event, (RunCompleted, RunFailed)) and bool(self._attached))
            assert self._run is not None
            for alert in found:
                await self._run.publish_async(alert)

    async def finish(self) -> None:
        """No rule is judged by the clock any more."""
        if self._by_clock is not None:
            await anyio.to_thread.run_sync(self._by_clock.stop, limiter=anyio.CapacityLimiter(1))
        for alarms in self._alarms.values():
            if isinstance(alarms, MetricAlarms) and alarms.looked_at is not None:
                logger.warning(
                    "The rule %r of Alerts never saw its metric %r; there are %s.",
                    alarms.rule.label, alarms.rule.metric, ", ".join(sorted(alarms.looked_at)) or "none",
                )  # fmt: skip

    async def stop(self) -> None:
        """Wait for what is on its way. Raises SubscriberError where that takes too long."""
        run, senders, self._senders = self._run, self._senders, []
        if run is None or not senders:
            return
        files = await in_own_thread(self._attached.files) if self._held else []
        for sender in senders:
            sender.attach(files)
            for alert in self._held:
                sender.post(alert)
        left = 0
        try:
            await in_own_thread(partial(finish, senders, self._finish_timeout_s))
        finally:  # also where the trainer's drain_timeout_s was shorter, and this is cancelled
            with anyio.move_on_after(GIVING_UP_S, shield=True):
                left = await in_own_thread(partial(give_up, senders))
        if left:
            raise SubscriberError(
                f"{left} alerts did not arrive within {self._finish_timeout_s:g} s after the run."
            )

    # --- by events ------------------------------------------------------------------------------------------

    def _judge(self, event: Event) -> Iterable[AlertEvent]:
        now_s = self._clock()
        if isinstance(event, StepsCompleted):
            values: dict[str, Any] = {}
            for alarms in self._by_event.get(StepsCompleted, ()):
                name = alarms.rule.metric
                if name not in values and name in event.metrics:
                    values[name] = event.metrics[name].tolist()
                yield from alarms.look_along(event.metrics, values, event.first_step, now_s)
        elif isinstance(event, (EpochCompleted, EvalCompleted)):
            for alarms in self._by_event.get(type(event), ()):
                yield from alarms.look(event.metrics, event.step, now_s)
        elif isinstance(event, BEHIND):
            if self._by_clock is not None:
                self._by_clock.note(event)
        else:
            yield from self._judge_run(event, now_s)

    def _judge_run(self, event: Event, now_s: float) -> Iterable[AlertEvent]:
        if isinstance(event, (CheckpointFailed, CheckpointCommitted)):
            bad = {ALL: event.error} if isinstance(event, CheckpointFailed) else {}
            for alarms in self._of(CheckpointFailedRule):
                yield from alarms.update(bad, event.step, now_s)
        elif isinstance(event, RunFailed):
            self._end()
            for alarms in self._of(RunFailedRule):
                yield from alarms.update({ALL: f"after step {event.step}: {event.error}"}, event.step, now_s)
        elif isinstance(event, RunCompleted):
            self._end()
            for alarms in self._of(RunCompletedRule):
                yield from alarms.update({ALL: f"after step {event.step}: {event.reason}"}, event.step, now_s)

    def _end(self) -> None:
        if self._by_clock is not None:
            self._by_clock.ended.set()

    def _of(self, rule: type[Any]) -> list[Alarms]:
        return [alarms for alarms in self._alarms.values() if isinstance(alarms.rule, rule)]

    # --- telling --------------------------------------------------------------------------------------------

    def _steps_made(self) -> int:
        """Any thread."""
        assert self._run is not None
        return max(self._step, self._run.loop_statistics().step)

    def _tell_from_thread(self, alert: AlertEvent) -> None:
        """Not on the event loop: it may hang, and then the alert goes out all the same."""
        alert = self._with_run(alert)
        self._tell(alert)
        assert self._run is not None
        assert self._by_clock is not None
        while True:
            try:
                return self._run.publish(alert)
            except QueueFull:
                if self._by_clock.ended.wait(QUEUE_FULL_S):
                    return None
            except BusClosed:
                return None

    def _with_run(self, alert: AlertEvent) -> AlertEvent:
        """Saying whose it is and when: the bus does so on its event loop, for which a message may not wait."""
        assert self._run is not None
        return alert.model_copy(update={"run_id": self._run.run_id, "time": datetime.now(UTC)})

    def _tell(self, alert: AlertEvent, *, hold: bool = False) -> None:
        """Log it and have it sent. Any thread."""
        if isinstance(alert, AlertRaised):
            logger.log(LEVELS[alert.severity], "Alert %s: %s", alert.name, alert.message)
        else:
            logger.info("Alert %s is over: %s", alert.name, alert.message)
        if hold:
            self._held.append(alert)
        else:
            for sender in self._senders:
                sender.post(alert)

    def _not_delivered(self, event: AlertEvent, reason: str) -> None:
        assert self._run is not None
        failure = SubscriberFailed(
            step=event.step, subscriber=self.name or "Alerts", event_kind=event.kind, error=reason
        )
        try:
            self._run.publish(failure)
        except EventTrainError:
            logger.error("The bus did not take the event that says so.")

    # --- what survives --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is raised, what waits for its time, and the values that rules compare with, as plain JSON data."""
        now_s = self._clock()
        rules = {label: alarms.save(now_s) for label, alarms in self._alarms.items()}
        return AlertsState(rules=rules, began_s=self._began_s).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over, rule by rule of the same name, so that a resumed run does not raise what is raised.

        Raises:
            StateError: another version, or broken.
        """
        saved, now_s = AlertsState.parse(self.name or "Alerts", state), self._clock()
        for label, found in saved.rules.items():
            if label in self._alarms:
                self._alarms[label].load(found, now_s)
        self._began_s, self._loaded = saved.began_s, True


def _require_names(rules: Sequence[AnyRule]) -> None:
    names = [rule.label for rule in rules]
    if not rules:
        raise ConfigurationError(
            'Alerts(rules=[]) watches nothing. Give at least one, such as Rule("loss", non_finite=True).'
        )
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"Alerts: two rules are named {double!r}. Give one of them another name=.")


def _require_labels(targets: Sequence[AlertTarget]) -> None:
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(
            "Alerts: two targets have the same label, and nothing else of them is shown. Give each its own."
        )


def _events_for(
    rules: Sequence[AnyRule], by_event: dict[type[Event], list[MetricAlarms]]
) -> tuple[type[Event], ...]:
    kinds = [*by_event]
    for rule in rules:
        if isinstance(rule, (StallRule, DeadlineRule)):
            kinds.append(StepsCompleted)
        elif isinstance(rule, CheckpointFailedRule):
            kinds += [CheckpointFailed, CheckpointCommitted]
        elif isinstance(rule, SlowSubscriberRule):
            kinds += BEHIND
    return tuple(dict.fromkeys([*kinds, RunCompleted, RunFailed]))
