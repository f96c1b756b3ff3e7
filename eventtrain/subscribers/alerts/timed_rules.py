"""``ClockAlarms``: the rules of one run that go by the clock, each asked again and again in a thread off the loop."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from eventtrain.events import LoopStalled, SubscriberDisabled, SubscriberLagged
from eventtrain.subscribers.alerts.alert_state import Alarms
from eventtrain.subscribers.alerts.message import AlertEvent
from eventtrain.subscribers.alerts.run_rules import DeadlineRule, LowDiskRule, SlowSubscriberRule, StallRule
from eventtrain.subscribers.alerts.watchers import Deadline, Judge, LowDisk, SlowSubscriber, Stall, Watch
from eventtrain.subscribers.base import RunContext

logger = logging.getLogger("eventtrain")

Behind = LoopStalled | SubscriberLagged | SubscriberDisabled
JOIN_S = 1.0
"""How long the end waits for a look; one at a dead disk may take for ever."""


class ClockAlarms:
    """Two threads: one for what only computes, one for disks, which may hang.

    Args:
        owner: the subscriber's name.
        alarms: those of every rule; the others are left out.
        run: what is watched.
        clock: gives seconds, and never goes back.
        began_s: when the run first began, in seconds since 1970.
        steps: gives the steps completed so far, on any thread.
        tell: called with each alert, on one of the threads.
    """

    def __init__(
        self,
        owner: str,
        alarms: Sequence[Alarms],
        run: RunContext,
        *,
        clock: Callable[[], float],
        began_s: float,
        steps: Callable[[], int],
        tell: Callable[[AlertEvent], None],
    ) -> None:
        self._run, self._clock, self._began_s = run, clock, began_s
        self._steps, self._tell = steps, tell
        self._slow: list[SlowSubscriber] = []
        self.ended = threading.Event()
        """The run is over: nothing is raised or resolved any more."""
        looks: dict[str, list[tuple[float, Callable[[], None]]]] = {}
        for found in alarms:
            judge = self._make_judge(found)
            if judge is not None:
                place = "disk watch" if isinstance(judge, LowDisk) else "watch"
                looks.setdefault(place, []).append((judge.interval_s, partial(self._look, found, judge)))
        self._threads = [Watch(f"{owner} {place}", several) for place, several in looks.items()]

    def start(self) -> None:
        """Begin to look."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; blocks for a moment."""
        self.ended.set()
        for thread in self._threads:
            thread.stopping.set()
        for thread in self._threads:
            thread.join(JOIN_S)

    def note(self, event: Behind) -> None:
        """An event said that a subscriber is behind. Any thread."""
        for judge in self._slow:
            judge.tell(event.subscriber, _how(event))

    def _make_judge(self, alarms: Alarms) -> Judge | None:
        now_s, run = self._clock(), self._run
        match alarms.rule:
            case StallRule() as rule:
                return Stall(rule, self._steps, now_s)
            case LowDiskRule() as rule:
                return LowDisk(rule, lambda: shutil.disk_usage(run.run_dir).free)
            case SlowSubscriberRule() as rule:
                self._slow.append(SlowSubscriber(rule, run.statistics))
                return self._slow[-1]
            case DeadlineRule() as rule:
                if run.total_steps is None:
                    logger.warning(
                        "The rule %r of Alerts says nothing: how many steps there will be is not known. Give "
                        "fit(steps=...), or data with a length.", rule.label,
                    )  # fmt: skip
                    return None
                until_s = (
                    rule.at.timestamp() if rule.at is not None else self._began_s + (rule.within_s or 0.0)
                )
                return Deadline(
                    rule, self._steps, run.start_step + run.total_steps, now_s + until_s - time.time()
                )
            case _:
                return None

    def _look(self, alarms: Alarms, judge: Judge) -> None:
        problems = judge.judge(self._clock())
        if problems is None or self.ended.is_set():
            return
        for alert in alarms.update(problems, self._steps(), self._clock()):
            self._tell(alert)


def _how(event: Behind) -> str:
    match event:
        case LoopStalled():
            return f"training waited {event.waited_s:.4g} s for it"
        case SubscriberLagged():
            return f"{event.dropped} events were dropped"
        case SubscriberDisabled():
            return f"it was switched off: {event.reason}"
