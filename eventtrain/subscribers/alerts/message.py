"""``Message``: one or more alerts as a target gets them, and ``Transport``, which delivers it. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from eventtrain.events import AlertRaised, AlertResolved
from eventtrain.subscribers.alerts.rule import SEVERITIES, Severity

AlertEvent = AlertRaised | AlertResolved

LONGEST = 1000
"""Characters of an alert's message that are sent as text; its event has all of them."""


class NotDelivered(Exception):
    """A target did not accept a message. The text never quotes a URL, a key or a server's answer.

    ``may_pass``: another attempt may succeed.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Message:
    """Alerts of one run that are sent together, oldest first.

    Attributes:
        events: stamped by the bus.
        attach: files that are sent with it, if the target accepts files.
        id: the same for every attempt.
    """

    events: Sequence[AlertEvent]
    attach: Sequence[Path] = ()
    id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def severity(self) -> Severity | None:
        """The highest severity of the alerts raised; None if alerts were only resolved."""
        raised: list[Severity] = [e.severity for e in self.events if isinstance(e, AlertRaised)]
        return max(raised, key=SEVERITIES.index, default=None)

    @property
    def title(self) -> str:
        """One line."""
        if len(self.events) == 1:
            return _headline(self.events[0])
        raised = sum(isinstance(event, AlertRaised) for event in self.events)
        resolved = len(self.events) - raised
        parts = [f"{raised} {'alert' if raised == 1 else 'alerts'}"] if raised else []
        if resolved:
            parts.append(f"{resolved} resolved")
        return ", ".join(parts) + (f" ({self.severity})" if self.severity else "")

    @property
    def text(self) -> str:
        """A line for each alert, and one for the run. Long messages are cut, since services refuse them."""
        lines = [
            f"{_headline(event)}: {_short(event.message)}" if len(self.events) > 1 else _short(event.message)
            for event in self.events
        ]
        return "\n".join([*lines, f"Run {self.events[0].run_id}" if self.events[0].run_id else ""]).rstrip()

    def to_json(self) -> dict[str, Any]:
        """Returns the body that a webhook is sent."""
        return {
            "version": 1,
            "id": self.id,
            "run_id": self.events[0].run_id,
            "severity": self.severity,
            "title": self.title,
            "text": self.text,
            "events": [json.loads(event.model_dump_json()) for event in self.events],
        }


class Transport(Protocol):
    """Sends messages to one target."""

    def send(self, message: Message) -> None:
        """Delivers ``message`` on the calling thread. Blocks; one thread at a time. Raises NotDelivered."""
        ...


def _headline(event: AlertEvent) -> str:
    return f"[{event.severity if isinstance(event, AlertRaised) else 'resolved'}] {event.name}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"
