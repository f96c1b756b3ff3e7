"""``Sender``: alerts on their way to one target, in a thread of its own: grouped, tried again, never lost unsaid."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

from eventtrain.subscribers.alerts.message import AlertEvent, Message, NotDelivered
from eventtrain.subscribers.alerts.undelivered import DeadLetters

logger = logging.getLogger("eventtrain")

MOST_WAITING = 1000
"""Alerts that may wait for one target; what comes on top is lost, counted and said."""
LONGEST_DELAY_S = 60.0
HURRIED_DELAY_S = 0.5
"""The longest between two tries when the run has ended."""
STAMPED_WITHIN_S = 1.0
ENDED = "the time for the end of the run was over"


class Target(Protocol):
    """Where alerts go."""

    def send(self, message: Message) -> None:
        """Deliver it, on the thread that calls. Blocks.

        Raises:
            NotDelivered: why not.
        """
        ...


@dataclass(frozen=True)
class SendOptions:
    """How hard to try.

    Attributes:
        retries: tries after the first.
        retry_delay_s: before the first of them; doubled each time, up to a minute.
        group_s: so long after an alert is waited for others, which then go in the same message.
    """

    retries: int = 3
    retry_delay_s: float = 0.5
    group_s: float = 1.0


class Sender(threading.Thread):
    """Delivers alerts to one target, in order, one message at a time. A daemon: a target that hangs ends no program.

    Args:
        label: what the target is called; nothing else of it is ever shown.
        target: where they go.
        options: how hard to try.
        dead_letters: where what was given up is written.
        failed: called with (event, reason) for the first alert of each message given up, on any thread.
    """

    def __init__(
        self,
        label: str,
        target: Target,
        options: SendOptions,
        dead_letters: DeadLetters,
        failed: Callable[[AlertEvent, str], None],
    ) -> None:
        super().__init__(name=f"eventtrain alerts to {label}", daemon=True)
        self.label = label
        self._target, self._options = target, options
        self._dead_letters, self._failed = dead_letters, failed
        self._waiting: deque[AlertEvent] = deque()
        self._attached: Sequence[Path] = ()
        self._under_way: list[AlertEvent] = []
        self._lost = 0
        self._moved = threading.Condition()
        self._hurry, self._given_up = threading.Event(), threading.Event()

    def post(self, event: AlertEvent) -> None:
        """Have ``event`` delivered. Any thread; returns at once."""
        with self._moved:
            if len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(event)
            self._moved.notify_all()

    def attach(self, files: Sequence[Path]) -> None:
        """What is posted from now on goes with these files. Any thread."""
        self._attached = files

    def hasten(self) -> None:
        """The run has ended: send what waits at once, try again without long pauses, then end. Any thread."""
        with self._moved:
            self._hurry.set()
            self._moved.notify_all()

    def give_up(self) -> int:
        """Write what was not delivered until now to the dead letters; returns how much that was. Blocks; any thread."""
        self._given_up.set()
        self.hasten()
        with self._moved:
            left = [*self._under_way, *self._waiting]
            self._under_way.clear()
            self._waiting.clear()
            lost, self._lost = self._lost, 0
        if left:
            self._bury(left, ENDED)
        if left and lost:
            self._say_lost(left[-1], lost)
        return len(left)

    def run(self) -> None:
        """Deliver until hastened and nothing is left."""
        while events := self._collect():
            reason = self._deliver(Message(events, self._attached))
            with self._moved:
                left = list(self._under_way)  # nothing, where it was given up meanwhile
                self._under_way.clear()
                lost, self._lost = self._lost, 0
            if reason is not None and left:
                self._bury(left, reason)
            if lost:
                self._say_lost(events[-1], lost)

    def _collect(self) -> tuple[AlertEvent, ...]:
        """Wait for what is to go out next; nothing where there will be no more."""
        with self._moved:
            self._moved.wait_for(lambda: self._waiting or self._hurry.is_set())
            if not self._waiting:
                return ()
        self._hurry.wait(self._options.group_s)
        _wait_until_stamped(self._waiting)
        with self._moved:
            self._under_way.extend(self._waiting)
            self._waiting.clear()
            return tuple(self._under_way)

    def _deliver(self, message: Message) -> str | None:
        """Try; returns why it was given up, None if it arrived."""
        options, delay_s = self._options, self._options.retry_delay_s
        reason = ENDED
        for attempt in range(1, options.retries + 2):
            if self._given_up.is_set():
                break
            try:
                self._target.send(message)
            except NotDelivered as error:
                reason, may_pass = f"{error}, at attempt {attempt}", error.may_pass
            except Exception as error:  # its text may quote the URL
                reason, may_pass = f"{type(error).__name__}, at attempt {attempt}", True
            else:
                return None
            if not may_pass or attempt > options.retries:
                break
            logger.debug("%s: %s; trying again", self.label, reason)
            if self._hurry.wait(delay_s):
                self._given_up.wait(min(delay_s, HURRIED_DELAY_S))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        return reason

    def _bury(self, events: Sequence[AlertEvent], reason: str) -> None:
        kept = self._dead_letters.write(self.label, reason, events)
        where = f"; they are kept in {self._dead_letters.path.name}" if kept else ""
        logger.error("%d alerts were not delivered to %s: %s%s", len(events), self.label, reason, where)
        self._failed(events[0], f"{len(events)} alerts not delivered to {self.label}: {reason}")

    def _say_lost(self, event: AlertEvent, count: int) -> None:
        reason = f"{count} alerts were lost, since {MOST_WAITING} were waiting"
        self._dead_letters.write(self.label, reason, ())
        logger.error("%s: %s", self.label, reason)
        self._failed(event, f"not delivered to {self.label}: {reason}")


def finish(senders: Sequence[Sender], timeout_s: float) -> None:
    """Wait for all of them, ``timeout_s`` seconds at most. Blocks."""
    deadline_s = monotonic() + timeout_s
    for sender in senders:
        sender.hasten()
    for sender in senders:
        sender.join(max(0.0, deadline_s - monotonic()))


def give_up(senders: Sequence[Sender]) -> int:
    """Give up what they did not deliver; returns how much that was. Blocks."""
    return sum(sender.give_up() for sender in senders)


def _wait_until_stamped(events: deque[AlertEvent]) -> None:
    """The bus stamps an event when it routes it, a moment after it was published."""
    deadline_s = monotonic() + STAMPED_WITHIN_S
    pause = threading.Event()
    while any(event.seq < 1 for event in list(events)) and monotonic() < deadline_s:
        pause.wait(0.002)
