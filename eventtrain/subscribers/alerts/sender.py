"""``Sender``: sends alerts to one target in a thread of its own: grouped, tried again, and never lost silently."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from eventtrain.subscribers._shared.retry import attempts
from eventtrain.subscribers.alerts.message import AlertEvent, Message, NotDelivered, Transport
from eventtrain.subscribers.alerts.undelivered import UndeliveredAlerts

logger = logging.getLogger("eventtrain")

MOST_WAITING = 1000
"""Alerts that may wait for one target; more are lost, counted and reported."""
LONGEST_DELAY_S = 60.0
HURRIED_DELAY_S = 0.5
"""Longest delay between two attempts after the run has ended."""
STAMPED_WITHIN_S = 1.0
ENDED = "out of time at the end of the run"


@dataclass(frozen=True)
class SendOptions:
    """How often to try, and how long to wait.

    Attributes:
        retries: attempts after the first.
        retry_delay_s: before the second attempt; doubled each time, up to a minute.
        group_s: how long after an alert to wait for others, which are then sent in the same message.
    """

    retries: int = 3
    retry_delay_s: float = 0.5
    group_s: float = 1.0


class Sender(threading.Thread):
    """Sends alerts to one target, in order, one message at a time. A daemon: it keeps no program alive.

    Args:
        label: name of the target; nothing else of the target is ever shown.
        transport: to the target.
        options: for attempts and groups.
        undelivered: records the alerts that are given up.
    """

    def __init__(
        self, label: str, transport: Transport, options: SendOptions, *, undelivered: UndeliveredAlerts
    ) -> None:
        super().__init__(name=f"eventtrain alerts to {label}", daemon=True)
        self.label = label
        self._transport, self._options, self._undelivered = transport, options, undelivered
        self._waiting: deque[AlertEvent] = deque()
        self._attached: Sequence[Path] = ()
        self._in_flight: list[AlertEvent] = []
        self._lost = 0
        self._changed = threading.Condition()
        self._hurry, self._given_up = threading.Event(), threading.Event()

    def post(self, event: AlertEvent) -> None:
        """Queues ``event``. Any thread; never blocks."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(event)
            self._changed.notify_all()

    def attach(self, files: Sequence[Path]) -> None:
        """Attaches ``files`` to the messages that are built from now on. Any thread."""
        self._attached = files

    def hasten(self) -> None:
        """Sends what waits at once, tries again without long delays, then ends. For the end of the run; any thread."""
        with self._changed:
            self._hurry.set()
            self._changed.notify_all()

    def give_up(self) -> int:
        """Records what was not delivered until now as undelivered; returns how many alerts. Blocks; any thread."""
        self._given_up.set()
        self.hasten()
        with self._changed:
            left = [*self._in_flight, *self._waiting]
            self._in_flight.clear()
            self._waiting.clear()
            lost, self._lost = self._lost, 0
        if left:
            self._undelivered.record(self.label, ENDED, left)
            self._report_lost(lost, left[-1])
        return len(left)

    def run(self) -> None:
        """Sends until ``hasten`` was called and nothing is left."""
        while events := self._collect():
            reason = self._deliver(Message(events, self._attached))
            with self._changed:
                left = list(self._in_flight)  # empty if it was given up meanwhile
                self._in_flight.clear()
                lost, self._lost = self._lost, 0
            if reason is not None and left:
                self._undelivered.record(self.label, reason, left)
            self._report_lost(lost, events[-1])

    def _collect(self) -> tuple[AlertEvent, ...]:
        """Waits for the alerts of the next message; returns none if there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._hurry.is_set())
            if not self._waiting:
                return ()
        self._hurry.wait(self._options.group_s)
        _wait_until_stamped(self._waiting)
        with self._changed:
            self._in_flight.extend(self._waiting)
            self._waiting.clear()
            return tuple(self._in_flight)

    def _deliver(self, message: Message) -> str | None:
        """Tries to send ``message``; returns why it was given up, None if it was delivered."""
        options, reason = self._options, ENDED
        if self._given_up.is_set():
            return reason
        for attempt in attempts(
            options.retries, options.retry_delay_s, self._pause, max_delay_s=LONGEST_DELAY_S
        ):
            try:
                self._transport.send(message)
            except NotDelivered as error:
                reason, may_pass = f"{error}, at attempt {attempt}", error.may_pass
            except Exception as error:  # its text may quote the URL
                reason, may_pass = f"{type(error).__name__}, at attempt {attempt}", True
            else:
                return None
            logger.debug("Alerts not delivered to %s: %s", self.label, reason)
            if not may_pass:
                break
        return reason

    def _pause(self, delay_s: float) -> bool:
        """Waits before the next attempt; returns whether there must not be one."""
        if self._hurry.wait(delay_s):
            self._given_up.wait(min(delay_s, HURRIED_DELAY_S))
        return self._given_up.is_set()

    def _report_lost(self, count: int, event: AlertEvent) -> None:
        if count:
            reason = f"{count} alerts were lost, since {MOST_WAITING} were waiting"
            self._undelivered.record_lost(self.label, reason, event)


def _wait_until_stamped(events: deque[AlertEvent]) -> None:
    """Waits until the bus has stamped the events, which it does when it routes them, a moment after ``publish``."""
    deadline_s = monotonic() + STAMPED_WITHIN_S
    pause = threading.Event()
    while any(event.seq < 1 for event in list(events)) and monotonic() < deadline_s:
        pause.wait(0.002)
