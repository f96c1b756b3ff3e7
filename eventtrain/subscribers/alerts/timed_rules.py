"""The rules of ``Alerts`` that are judged by the clock, and ``RuleWatcher``, whose threads judge them."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event, LoopStalled, SubscriberDisabled, SubscriberLagged
from eventtrain.subscribers._shared.worker_thread import publish_waiting
from eventtrain.subscribers.alerts.alert_state import RuleAlerts
from eventtrain.subscribers.alerts.delivery import Delivery
from eventtrain.subscribers.alerts.rule import AlertRule, Findings
from eventtrain.subscribers.base import RunContext
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

logger = logging.getLogger("eventtrain")

JOIN_S = 1.0
"""Longest wait at the end for a judgement in progress; one that asks a dead disk may never return."""

Judge = Callable[[float, Iterable[Event]], Findings | None]
"""Takes the time and the rule's events since the last call; returns None if it cannot tell. Called by one thread."""


@dataclass(frozen=True)
class TimedRule(AlertRule, ABC):
    """Base of the rules that are judged every ``interval_s`` seconds.

    Attributes:
        events: classes of events that ``watch`` wants to see as well.
        may_hang: judging may block for long, so it is done in another thread.
    """

    events: ClassVar[tuple[type[Event], ...]] = ()
    may_hang: ClassVar[bool] = False

    @property
    def interval_s(self) -> float:
        """Seconds between two judgements."""
        return 1.0

    @abstractmethod
    def watch(self, run: RunContext, now_s: float, began_s: float) -> Judge | None:
        """Returns what judges ``run``; None, after a warning, if the rule has no effect in it.

        Args:
            run: that starts.
            now_s: time of a clock that never goes back; the ``Judge`` gets later times of it.
            began_s: when the run first began, in seconds since 1970.
        """


@checked
@dataclass(frozen=True)
class StallRule(TimedRule):
    """No step was made for ``after_s`` seconds, for any reason: compiling, evaluating and pauses count too."""

    label_format = "no step for {after_s:g} s"
    after_s: float = 600.0
    type: Literal["stall"] = field(default="stall", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("StallRule", "after_s", self.after_s, above=0)

    @property
    def interval_s(self) -> float:
        """A quarter of ``after_s``, at most a second."""
        return min(1.0, self.after_s / 4)

    def watch(self, run: RunContext, now_s: float, began_s: float) -> Judge:
        """Judges by the time since the number of steps last changed."""
        last_step, changed_s = run.loop_statistics().step, now_s

        def judge(now_s: float, events: Iterable[Event]) -> Findings:
            nonlocal last_step, changed_s
            step = run.loop_statistics().step
            if step != last_step:
                last_step, changed_s = step, now_s
            waited_s = now_s - changed_s
            if waited_s < self.after_s:
                return {}
            return {"": f"no step for {waited_s:.4g} s, since step {step}"}

        return judge


@checked
@dataclass(frozen=True)
class SlowSubscriberRule(TimedRule):
    """A subscriber is behind: training waits for it, it loses events, is disabled, or has a backlog.

    Attributes:
        backlog: number of events waiting for it; None: the number does not matter.
        lag_s: age of the oldest of them in seconds; None: the age does not matter.
        quiet_s: resolved after so many seconds without a sign of it.

    Each subscriber has an alert of its own.
    """

    label_format = "slow subscriber"
    events = (LoopStalled, SubscriberLagged, SubscriberDisabled)
    backlog: int | None = 10_000
    lag_s: float | None = None
    quiet_s: float = 60.0
    type: Literal["slow_subscriber"] = field(default="slow_subscriber", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("SlowSubscriberRule", "backlog", self.backlog, at_least=1, optional=True)
        require_number("SlowSubscriberRule", "lag_s", self.lag_s, above=0, optional=True)
        require_number("SlowSubscriberRule", "quiet_s", self.quiet_s, at_least=0)

    def watch(self, run: RunContext, now_s: float, began_s: float) -> Judge:
        """Judges by the newest sign, from events and statistics, that a subscriber is behind."""
        signs: dict[str, tuple[float, str]] = {}

        def judge(now_s: float, events: Iterable[Event]) -> Findings:
            for event in events:
                if (sign := _sign(event)) is not None:
                    signs[sign[0]] = (now_s, sign[1])
            for name, figures in run.statistics().items():
                if self.backlog is not None and figures.pending >= self.backlog:
                    signs[name] = (now_s, f"{figures.pending} events are waiting")
                elif self.lag_s is not None and figures.lag_s >= self.lag_s:
                    signs[name] = (now_s, f"its oldest event has waited {figures.lag_s:.4g} s")
            for name in [name for name, (seen_s, _) in signs.items() if now_s - seen_s > self.quiet_s]:
                del signs[name]
            return {name: f"{name} is behind: {sign}" for name, (_, sign) in signs.items()}

        return judge


@checked
@dataclass(frozen=True)
class LowDiskRule(TimedRule):
    """The disk of ``run_dir`` has fewer free bytes than ``below_bytes``; checked every ``every_s`` seconds."""

    label_format = "low disk"
    may_hang = True
    below_bytes: int = 10 * 2**30
    every_s: float = 10.0
    type: Literal["low_disk"] = field(default="low_disk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("LowDiskRule", "below_bytes", self.below_bytes, at_least=1)
        require_number("LowDiskRule", "every_s", self.every_s, above=0)

    @property
    def interval_s(self) -> float:
        """``every_s``."""
        return self.every_s

    def watch(self, run: RunContext, now_s: float, began_s: float) -> Judge:
        """Judges by what the file system reports; an error of it tells nothing."""

        def judge(now_s: float, events: Iterable[Event]) -> Findings | None:
            try:
                free = shutil.disk_usage(run.run_dir).free
            except OSError:
                return None
            if free >= self.below_bytes:
                return {}
            return {"": f"{_size(free)} are free on the disk of the run, less than {_size(self.below_bytes)}"}

        return judge


def _moment(given: Any) -> Any:
    """Returns the time that the text of a file gives; invalid text is not quoted, since it may be a secret."""
    if not isinstance(given, str):
        return given
    try:
        return datetime.fromisoformat(given)
    except ValueError:
        raise ValueError("needs a time such as 2030-01-31T08:00:00+01:00") from None


Moment = Annotated[datetime, BeforeValidator(_moment)]


@checked
@dataclass(frozen=True)
class DeadlineRule(TimedRule):
    """At the pace of the last minutes the run will not end in time.

    Attributes:
        at: the deadline, with a time zone; in a file, text such as ``"2030-01-31T08:00:00+01:00"``.
        within_s: instead, seconds after the run first began.
        pace_s: the pace is that of the last so many seconds, since the first step at most.

    Has no effect in a run whose number of steps is not known.
    """

    label_format = "behind schedule"
    at: Moment | None = None
    within_s: float | None = None
    pace_s: float = 300.0
    type: Literal["deadline"] = field(default="deadline", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.at is None) == (self.within_s is None):
            raise ConfigurationError("DeadlineRule: give either at= or within_s=.")
        if self.at is not None and not isinstance(self.at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"DeadlineRule(at={self.at!r}): at must be a datetime, such as "
                'datetime.fromisoformat("2030-01-31T08:00:00+01:00").'
            )
        if self.at is not None and self.at.tzinfo is None:
            raise ConfigurationError(
                f"DeadlineRule(at={self.at.isoformat()!r}): has no time zone. Append one, such as +00:00."
            )
        require_number("DeadlineRule", "within_s", self.within_s, above=0, optional=True)
        require_number("DeadlineRule", "pace_s", self.pace_s, above=0)

    def watch(self, run: RunContext, now_s: float, began_s: float) -> Judge | None:
        """Judges by whether the steps that are left fit into the time that is left, at the pace of the last seconds."""
        if run.total_steps is None:
            logger.warning(
                "Rule %r of Alerts has no effect, because the number of steps is not known. Give fit(steps=...), or "
                "data with a length.",
                self.label,
            )
            return None
        target, began = run.start_step + run.total_steps, run.loop_statistics().step
        until_s = self.at.timestamp() if self.at is not None else began_s + (self.within_s or 0.0)
        deadline_s = now_s + until_s - time.time()
        samples: deque[tuple[float, int]] = deque()

        def judge(now_s: float, events: Iterable[Event]) -> Findings | None:
            step = run.loop_statistics().step
            if step == began:
                samples.clear()  # the time to compile the first step is not part of the pace
            samples.append((now_s, step))
            while len(samples) > 2 and samples[1][0] <= now_s - self.pace_s:
                samples.popleft()
            left = target - step
            if left <= 0:
                return {}
            if now_s >= deadline_s:
                return {"": f"the deadline has passed and {left} steps are left"}
            first_s, first = samples[0]
            if step == first or now_s <= first_s:
                return None
            late_s = left * (now_s - first_s) / (step - first) - (deadline_s - now_s)
            if late_s <= 0:
                return {}
            return {"": f"{left} steps are left; at this pace the run ends {late_s:.0f} s late"}

        return judge


def _sign(event: Event) -> tuple[str, str] | None:
    """Returns a subscriber, and what ``event`` tells of it being behind."""
    match event:
        case LoopStalled():
            return event.subscriber, f"training waited {event.waited_s:.4g} s for it"
        case SubscriberLagged():
            return event.subscriber, f"{event.dropped} events were dropped"
        case SubscriberDisabled():
            return event.subscriber, f"it was disabled: {event.reason}"
        case _:
            return None


def _size(count: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count} B"


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

    The threads are daemons: one that hangs keeps no program alive. Alerts are sent without waiting for the event loop,
    and published after that. ``began_s``: when the run first began, in seconds since 1970.
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
