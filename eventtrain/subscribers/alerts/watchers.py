"""What ``Alerts`` watches by the clock, in threads of its own: they see a training thread or an event loop that hangs.

The judges are pure but for what they are given to ask; each is asked by one thread.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from eventtrain.subscribers.alerts.run_rules import DeadlineRule, LowDiskRule, SlowSubscriberRule, StallRule

logger = logging.getLogger("eventtrain")

ALL = ""
"""The subject of a rule that has only one."""


class Backlog(Protocol):
    """What is asked of a subscription's statistics."""

    @property
    def pending(self) -> int:
        """Events waiting or being handled."""
        ...

    @property
    def lag_s(self) -> float:
        """Age of the oldest waiting event."""
        ...


class Judge(ABC):
    """What is wrong at a moment."""

    interval_s: float = 0.25
    """How often it wants to be asked."""

    @abstractmethod
    def judge(self, now_s: float) -> Mapping[str, str] | None:
        """What is wrong, by subject; empty if nothing is; None if that cannot be told."""


class Stall(Judge):
    """For ``StallRule``; ``steps`` gives the steps made so far."""

    def __init__(self, rule: StallRule, steps: Callable[[], int], now_s: float) -> None:
        self._after_s, self._steps = rule.after_s, steps
        self.interval_s = min(1.0, rule.after_s / 4)
        self._seen = steps()
        self._moved_s = now_s

    def judge(self, now_s: float) -> Mapping[str, str]:
        """Whether a step was made lately."""
        steps = self._steps()
        if steps != self._seen:
            self._seen, self._moved_s = steps, now_s
        waited_s = now_s - self._moved_s
        if waited_s < self._after_s:
            return {}
        return {ALL: f"no step for {waited_s:.4g} s, since step {steps}"}


class Deadline(Judge):
    """For ``DeadlineRule``.

    Args:
        rule: whose pace it goes by.
        steps: gives the steps made so far.
        target: how many there are to be.
        deadline_s: when, in the time that ``judge`` is given.
    """

    interval_s = 1.0

    def __init__(self, rule: DeadlineRule, steps: Callable[[], int], target: int, deadline_s: float) -> None:
        self._pace_s, self._steps, self._target, self._deadline_s = rule.pace_s, steps, target, deadline_s
        self._samples: deque[tuple[float, int]] = deque()
        self._began = steps()

    def judge(self, now_s: float) -> Mapping[str, str] | None:
        """Whether what is left takes longer than there is time, at the pace of the last seconds."""
        steps, samples = self._steps(), self._samples
        if steps == self._began:
            samples.clear()  # compiling is no pace
        samples.append((now_s, steps))
        while len(samples) > 2 and samples[1][0] <= now_s - self._pace_s:
            samples.popleft()
        left = self._target - steps
        if left <= 0:
            return {}
        if now_s >= self._deadline_s:
            return {ALL: f"the deadline has passed and {left} steps are left"}
        began_s, first = samples[0]
        if steps == first or now_s <= began_s:
            return None
        late_s = left * (now_s - began_s) / (steps - first) - (self._deadline_s - now_s)
        if late_s <= 0:
            return {}
        return {ALL: f"{left} steps are left, and the last of them will be {late_s:.0f} s late at this pace"}


class SlowSubscriber(Judge):
    """For ``SlowSubscriberRule``; ``statistics`` gives what is known of every subscription."""

    interval_s = 1.0

    def __init__(self, rule: SlowSubscriberRule, statistics: Callable[[], Mapping[str, Backlog]]) -> None:
        self._rule, self._statistics = rule, statistics
        self._told: deque[tuple[str, str]] = deque()
        self._signs: dict[str, tuple[float, str]] = {}

    def tell(self, subscriber: str, what: str) -> None:
        """An event said that ``subscriber`` is behind. Any thread."""
        self._told.append((subscriber, what))

    def judge(self, now_s: float) -> Mapping[str, str]:
        """Of each subscriber, the last sign that it is behind."""
        rule, signs = self._rule, self._signs
        while self._told:
            subscriber, what = self._told.popleft()
            signs[subscriber] = (now_s, what)
        for name, found in self._statistics().items():
            if rule.backlog is not None and found.pending >= rule.backlog:
                signs[name] = (now_s, f"{found.pending} events wait for it")
            elif rule.lag_s is not None and found.lag_s >= rule.lag_s:
                signs[name] = (now_s, f"an event waits for it for {found.lag_s:.4g} s")
        for name in [name for name, (seen_s, _) in signs.items() if now_s - seen_s > rule.quiet_s]:
            del signs[name]
        return {name: f"{name} is behind: {what}" for name, (_, what) in signs.items()}


class LowDisk(Judge):
    """For ``LowDiskRule``; ``free_bytes`` asks the disk, and raises OSError where it cannot."""

    def __init__(self, rule: LowDiskRule, free_bytes: Callable[[], int]) -> None:
        self._rule, self._free_bytes = rule, free_bytes
        self.interval_s = rule.every_s

    def judge(self, now_s: float) -> Mapping[str, str] | None:
        """Whether there is little room left."""
        try:
            free = self._free_bytes()
        except OSError:
            return None
        if free >= self._rule.below_bytes:
            return {}
        return {
            ALL: f"{_size(free)} are free on the disk of the run, less than {_size(self._rule.below_bytes)}"
        }


class Watch(threading.Thread):
    """Calls functions again and again until it is stopped.

    A daemon: one that hangs, in a dead file system say, does not keep the program from ending.

    Args:
        name: of the thread.
        looks: seconds between two calls -> what is called; what it raises is only logged.
    """

    def __init__(self, name: str, looks: Sequence[tuple[float, Callable[[], None]]]) -> None:
        super().__init__(name=f"eventtrain {name}", daemon=True)
        self._looks = looks
        self.stopping = threading.Event()

    def run(self) -> None:
        """Until ``stopping`` is set."""
        interval_s = min(interval_s for interval_s, _ in self._looks)
        waited_s = [0.0] * len(self._looks)
        while not self.stopping.wait(interval_s):
            for place, (due_s, look) in enumerate(self._looks):
                waited_s[place] += interval_s
                if waited_s[place] >= due_s:
                    waited_s[place] = 0.0
                    try:
                        look()
                    except Exception as error:
                        logger.error("%s: a look raised %s: %s", self.name, type(error).__name__, error)


def _size(count: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count} B"
