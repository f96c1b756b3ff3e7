"""``Delivery``: logs the alerts of one run, and has a ``Sender``, a thread for each target, send them."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

import anyio

from eventtrain.errors import EventTrainError, SubscriberError
from eventtrain.events import AlertRaised, Event, SubscriberFailed
from eventtrain.subscribers._shared.atomic_files import AppendedFile
from eventtrain.subscribers._shared.retry import attempts
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.alerts.message import AlertEvent, Message, NotDelivered, Transport
from eventtrain.subscribers.base import RunContext

logger = logging.getLogger("eventtrain")

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
GIVE_UP_S = 2.0
"""Longest wait at the end of a run for a disk that does not respond, to record undelivered alerts."""
MOST_WAITING = 1000
"""Alerts that may wait for one target; more are lost, counted and reported."""
LONGEST_DELAY_S = 60.0
HURRIED_DELAY_S = 0.5
"""Longest delay between two attempts after the run has ended."""
STAMPED_WITHIN_S = 1.0
ENDED = "out of time at the end of the run"


@dataclass(frozen=True)
class DeliveryOptions:
    """Targets of alerts, and how they are sent.

    Attributes:
        targets: label and transport of each.
        retries: attempts after the first.
        retry_delay_s: before the second attempt; doubled each time, up to a minute.
        group_s: how long after an alert to wait for others, which are then sent in the same message.
        attach: files, relative to ``run_dir``, that are sent with the alerts about the end of the run.
        dead_letters: file for undelivered alerts, relative to ``run_dir``.
        finish_timeout_s: longest wait at the end of a run.
    """

    targets: Sequence[tuple[str, Transport]] = ()
    retries: int = 3
    retry_delay_s: float = 0.5
    group_s: float = 1.0
    attach: Sequence[Path] = ()
    dead_letters: Path = Path("alerts.dead.jsonl")
    finish_timeout_s: float = 10.0


class UndeliveredAlerts:
    """Records alerts that did not reach a target: in a file, in the log, and by SubscriberFailed.

    The file has one line of JSON for each alert: ``time``, ``label``, ``reason`` and the ``event``; one line without an
    event for alerts that were lost. A line is written completely or not at all: if the disk is full, a partial line is
    removed, and a line that a killed run left incomplete is ended before the next one. Blocking; any thread.
    """

    def __init__(self, path: Path, owner: str, publish: Callable[[Event], None]) -> None:
        self.path, self._owner, self._publish = path, owner, publish
        self._file = AppendedFile(path)
        self._lock = threading.Lock()

    def record(self, label: str, reason: str, events: Sequence[AlertEvent]) -> None:
        """Records ``events``, which the target ``label`` did not get; publishes one SubscriberFailed for all."""
        written = self._write(label, reason, events)
        where = f"; see {self.path.name}" if written else ""
        logger.error("%d alerts were not delivered to %s: %s%s", len(events), label, reason, where)
        self._fail(events[0], f"{len(events)} alerts not delivered to {label}: {reason}")

    def record_lost(self, label: str, reason: str, near: AlertEvent) -> None:
        """Records alerts that no longer exist; ``near`` is the alert whose step SubscriberFailed gets."""
        self._write(label, reason, [None])
        logger.error("%s: %s", label, reason)
        self._fail(near, f"not delivered to {label}: {reason}")

    def _fail(self, event: AlertEvent, error: str) -> None:
        try:
            self._publish(
                SubscriberFailed(step=event.step, subscriber=self._owner, event_kind=event.kind, error=error)
            )
        except EventTrainError as refusal:
            logger.error("%s: SubscriberFailed was not published: %s", self._owner, refusal)

    def _write(self, label: str, reason: str, events: Sequence[AlertEvent | None]) -> bool:
        """Writes a line for each event, without waiting for the disk; returns whether that worked."""
        row = {"time": datetime.now(UTC).isoformat(), "label": label, "reason": reason}
        found = [None if event is None else json.loads(event.model_dump_json()) for event in events]
        try:
            with self._lock:
                self._append("".join(f"{json.dumps({**row, 'event': event})}\n" for event in found).encode())
        except OSError as error:
            logger.error("%s cannot be written: %s", self.path, error.strerror or error)
            return False
        return True

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.repair()
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
        self._file.append(b"\n" + data if torn else data)


class Sender(threading.Thread):
    """Sends alerts to one target, in order, one message at a time. A daemon: it keeps no program alive.

    Of the target only its ``label`` is ever shown.
    """

    def __init__(
        self, label: str, transport: Transport, options: DeliveryOptions, *, undelivered: UndeliveredAlerts
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
        if left:
            self._undelivered.record(self.label, ENDED, left)
            self._report_lost(left[-1])
        return len(left)

    def run(self) -> None:
        """Sends until ``hasten`` was called and nothing is left."""
        while events := self._collect():
            reason = self._deliver(Message(events, self._attached))
            with self._changed:
                left = list(self._in_flight)  # empty if it was given up meanwhile
                self._in_flight.clear()
            if reason is not None and left:
                self._undelivered.record(self.label, reason, left)
            self._report_lost(events[-1])

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

    def _report_lost(self, event: AlertEvent) -> None:
        with self._changed:
            count, self._lost = self._lost, 0
        if count:
            reason = f"{count} alerts were lost, since {MOST_WAITING} were waiting"
            self._undelivered.record_lost(self.label, reason, event)


def _wait_until_stamped(events: deque[AlertEvent]) -> None:
    """Waits until the bus has stamped the events, which it does when it routes them, a moment after ``publish``."""
    deadline_s = monotonic() + STAMPED_WITHIN_S
    pause = threading.Event()
    while any(event.seq < 1 for event in list(events)) and monotonic() < deadline_s:
        pause.wait(0.002)


class Delivery:
    """Logs the alerts of one run and has them sent to every target. Starts a thread for each target.

    Blocks for a moment to read the times of the files to attach. ``owner`` is the name of the subscriber.
    """

    def __init__(self, options: DeliveryOptions, run: RunContext, owner: str) -> None:
        self._options, self._run = options, run
        self._held: list[AlertEvent] = []
        self._older = self._modified_ns()
        path = run.run_dir / options.dead_letters
        undelivered = UndeliveredAlerts(path, owner, run.publish)
        self._senders = [
            Sender(label, transport, options, undelivered=undelivered) for label, transport in options.targets
        ]
        for sender in self._senders:
            sender.start()

    def send(self, alert: AlertEvent, *, at_end: bool = False) -> AlertEvent:
        """Logs ``alert`` and queues it for every target. Any thread.

        Args:
            alert: not published yet.
            at_end: it is about the end of the run: if files are to be attached, it waits for ``finish``.

        Returns:
            ``alert`` with the run and the time, to be published. The bus would stamp both too, but on its event loop,
            which a message must not wait for.
        """
        alert = alert.model_copy(update={"run_id": self._run.run_id, "time": datetime.now(UTC)})
        if isinstance(alert, AlertRaised):
            logger.log(LEVELS[alert.severity], "Alert %s: %s", alert.name, alert.message)
        else:
            logger.info("Alert %s resolved: %s", alert.name, alert.message)
        if at_end and self._options.attach:
            self._held.append(alert)
        else:
            for sender in self._senders:
                sender.post(alert)
        return alert

    async def finish(self) -> None:
        """Waits until everything is delivered, and ends the threads. Records what is left as undelivered.

        Raises:
            SubscriberError: ``finish_timeout_s`` was too short.
        """
        senders, self._senders = self._senders, []
        if not senders:
            return
        timeout_s = self._options.finish_timeout_s
        files = await in_own_thread(self._files) if self._held else []
        for sender in senders:
            sender.attach(files)
            for alert in self._held:
                sender.post(alert)
        left = 0
        try:
            await in_own_thread(partial(_wait, senders, timeout_s))
        finally:  # also if this is cancelled, since the trainer's drain_timeout_s may be shorter
            with anyio.move_on_after(GIVE_UP_S, shield=True):
                left = await in_own_thread(lambda: sum(sender.give_up() for sender in senders))
        if left:
            raise SubscriberError(f"{left} alerts were not delivered within {timeout_s:g} s after the run.")

    def _files(self) -> list[Path]:
        """Returns the files to attach; warns of those that are missing, or that the run has not written."""
        modified_ns = self._modified_ns()
        for path in self._options.attach:
            if path not in modified_ns:
                problem = "is not in run_dir"
            elif modified_ns[path] == self._older.get(path):
                problem = "was not written by this run; the old file is sent"
            else:
                continue
            logger.warning(
                "Alerts(attach=...): %s %s. List Alerts after the subscriber that writes it.", path, problem
            )
        return [self._run.run_dir / path for path in modified_ns]

    def _modified_ns(self) -> Mapping[Path, int]:
        """Returns when each of the files was last written; files that do not exist are left out."""
        files = {path: self._run.run_dir / path for path in self._options.attach}
        return {path: file.stat().st_mtime_ns for path, file in files.items() if file.is_file()}


def _wait(senders: Sequence[Sender], timeout_s: float) -> None:
    deadline_s = monotonic() + timeout_s
    for sender in senders:
        sender.hasten()
    for sender in senders:
        sender.join(max(0.0, deadline_s - monotonic()))
