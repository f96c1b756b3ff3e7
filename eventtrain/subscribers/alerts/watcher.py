"""``RuleWatcher``: judges the timed rules of one run, in threads that see a hanging training thread or event loop."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from eventtrain.events import Event
from eventtrain.subscribers._shared.worker_thread import publish_waiting
from eventtrain.subscribers.alerts.alert_state import RuleAlerts
from eventtrain.subscribers.alerts.delivery import Delivery
from eventtrain.subscribers.alerts.timed_rules import Judge, TimedRule
from eventtrain.subscribers.base import RunContext

logger = logging.getLogger("eventtrain")

JOIN_S = 1.0
"""Longest wait at the end for a judgement in progress; one that asks a dead disk may never return."""


@dataclass
class WatchedRule:
    """A timed rule in one run: its alerts, its judge, and the events that the judge has not seen yet."""

    alerts: RuleAlerts[TimedRule]
    judge: Judge
    events: deque[Event] = field(default_factory=deque[Event])
    waited_s: float = 0.0

    def new_events(self) -> Iterator[Event]:
        """Yields and removes the events, also those that arrive meanwhile."""
        while self.events:
            yield self.events.popleft()


class RuleWatcher:
    """Judges timed rules in two threads: one for those that only compute, one for those that may hang.

    The threads are daemons: one that hangs keeps no program alive.

    Args:
        alerts: of each timed rule.
        run: the run to watch.
        delivery: sends alerts without waiting for the event loop; they are published after that.
        owner: name of the subscriber.
        clock: returns seconds, and never goes back.
        began_s: when the run first began, in seconds since 1970.
    """

    def __init__(
        self,
        alerts: Sequence[RuleAlerts[TimedRule]],
        run: RunContext,
        delivery: Delivery,
        *,
        owner: str,
        clock: Callable[[], float],
        began_s: float,
    ) -> None:
        self._run, self._delivery, self._clock = run, delivery, clock
        self._ended = threading.Event()
        judges = [(one, one.rule.watch(run, clock(), began_s)) for one in alerts]
        self._rules = [WatchedRule(one, judge) for one, judge in judges if judge is not None]
        self._threads: list[threading.Thread] = []
        for may_hang in (False, True):
            rules = [rule for rule in self._rules if rule.alerts.rule.may_hang == may_hang]
            if rules:
                name = f"eventtrain {owner} watch" + (" (may hang)" if may_hang else "")
                self._threads.append(
                    threading.Thread(target=partial(self._watch, rules), name=name, daemon=True)
                )
                self._threads[-1].start()

    def note(self, event: Event) -> None:
        """Passes ``event`` to the rules that want it. Any thread."""
        for rule in self._rules:
            if isinstance(event, rule.alerts.rule.events):
                rule.events.append(event)

    def end(self) -> None:
        """Ends the threads: nothing is raised or resolved after the end of a run. Never blocks."""
        self._ended.set()

    def join(self) -> None:
        """Waits a moment until the threads have ended."""
        self.end()
        for thread in self._threads:
            thread.join(JOIN_S)

    def _watch(self, rules: Sequence[WatchedRule]) -> None:
        interval_s = min(rule.alerts.rule.interval_s for rule in rules)
        while not self._ended.wait(interval_s):
            for rule in rules:
                rule.waited_s += interval_s
                if rule.waited_s < rule.alerts.rule.interval_s:
                    continue
                rule.waited_s = 0.0
                try:
                    self._judge(rule)
                except Exception as error:
                    label = rule.alerts.rule.label
                    logger.error("Rule %r of Alerts raised %s: %s", label, type(error).__name__, error)

    def _judge(self, rule: WatchedRule) -> None:
        findings = rule.judge(self._clock(), rule.new_events())
        if findings is None or self._ended.is_set():
            return
        for alert in rule.alerts.update(findings, self._run.loop_statistics().step, self._clock()):
            alert = self._delivery.send(alert)
            publish_waiting(self._run.publish, alert, self._ended)
