"""``Delivery``: logs the alerts of one run and has them sent to every target."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

import anyio

from eventtrain.errors import SubscriberError
from eventtrain.events import AlertRaised
from eventtrain.subscribers._shared.paths import inside_run_dir
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.alerts.message import AlertEvent, Transport
from eventtrain.subscribers.alerts.sender import Sender, SendOptions
from eventtrain.subscribers.alerts.undelivered import UndeliveredAlerts
from eventtrain.subscribers.base import RunContext

logger = logging.getLogger("eventtrain")

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
GIVE_UP_S = 2.0
"""Longest wait at the end of a run for a disk that does not respond, to record undelivered alerts."""


@dataclass(frozen=True)
class DeliveryOptions:
    """Where alerts are sent, and how.

    Attributes:
        targets: label and transport of each.
        send: attempts and groups.
        attach: files, relative to ``run_dir``, that are sent with the alerts about the end of the run.
        dead_letters: file for undelivered alerts, relative to ``run_dir``.
        finish_timeout_s: longest wait at the end of a run.
    """

    targets: Sequence[tuple[str, Transport]]
    send: SendOptions
    attach: Sequence[Path]
    dead_letters: Path
    finish_timeout_s: float


class Delivery:
    """Logs the alerts of one run and has them sent to every target. Starts a thread for each target.

    Blocks for a moment to read the times of the files to attach.

    Args:
        options: targets and files.
        run: whose alerts they are.
        owner: name of the subscriber.
    """

    def __init__(self, options: DeliveryOptions, run: RunContext, owner: str) -> None:
        self._options, self._run = options, run
        self._held: list[AlertEvent] = []
        self._older = self._modified_ns()
        path = inside_run_dir(run.run_dir, options.dead_letters, "Alerts")
        undelivered = UndeliveredAlerts(path, owner, run.publish)
        self._senders = [
            Sender(label, transport, options.send, undelivered=undelivered)
            for label, transport in options.targets
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
