"""``UndeliveredAlerts``: records alerts that did not reach a target. Blocking; any thread."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from eventtrain.errors import EventTrainError
from eventtrain.events import Event, SubscriberFailed
from eventtrain.subscribers._shared.atomic_files import AppendedFile
from eventtrain.subscribers.alerts.message import AlertEvent

logger = logging.getLogger("eventtrain")


class UndeliveredAlerts:
    """Records alerts that did not reach a target: in a file, in the log, and by SubscriberFailed.

    The file has one line of JSON for each alert: ``time``, ``label``, ``reason`` and the ``event``; one line without an
    event for alerts that were lost. A line is written completely or not at all: if the disk is full, a partial line is
    removed, and a line that a killed run left incomplete is ended before the next one.

    Args:
        path: of the file; created with the first line.
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
    """

    def __init__(self, path: Path, owner: str, publish: Callable[[Event], None]) -> None:
        self.path = path
        self._owner = owner
        self._publish = publish
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
        rows = [
            json.dumps(
                {
                    "time": datetime.now(UTC).isoformat(),
                    "label": label,
                    "reason": reason,
                    "event": None if event is None else json.loads(event.model_dump_json()),
                }
            )
            for event in events
        ]
        try:
            with self._lock:
                self._append("".join(f"{row}\n" for row in rows).encode())
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
