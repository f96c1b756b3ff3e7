"""``Message``: what a target is told, several alerts at once; and how one says that it was not taken. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from eventtrain.events import AlertRaised, AlertResolved
from eventtrain.subscribers.alerts.rule import SEVERITIES, Severity

AlertEvent = AlertRaised | AlertResolved

LONGEST = 1000
"""So many characters of what one alert says are told; its event has all of them."""


class NotDelivered(Exception):
    """A target did not take a message. Its text never quotes a URL, a key or what a server said.

    ``may_pass``: another try may succeed.
    """

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Message:
    """Alerts of one run that go out together, oldest first.

    Attributes:
        events: stamped by the bus.
        attach: files that go with it, where a target takes files.
        id: the same for every try.
    """

    events: Sequence[AlertEvent]
    attach: Sequence[Path] = ()
    id: str = field(default_factory=lambda: uuid4().hex)

    @property
    def severity(self) -> Severity | None:
        """The worst of what was raised; None where something was only resolved."""
        raised: list[Severity] = [e.severity for e in self.events if isinstance(e, AlertRaised)]
        return max(raised, key=SEVERITIES.index, default=None)

    @property
    def title(self) -> str:
        """One line."""
        if len(self.events) == 1:
            return _headline(self.events[0])
        raised = sum(isinstance(event, AlertRaised) for event in self.events)
        parts = [
            f"{count} {'alert' if count == 1 else 'alerts'}{what}"
            for count, what in ((raised, ""), (len(self.events) - raised, " over"))
            if count
        ]
        return f"{', '.join(parts)}" + (f" ({self.severity})" if self.severity else "")

    @property
    def text(self) -> str:
        """A line for each alert, and one for the run. What an error says at length is cut: services refuse that."""
        lines = [
            f"{_headline(event)}: {_short(event.message)}" if len(self.events) > 1 else _short(event.message)
            for event in self.events
        ]
        return "\n".join([*lines, f"Run {self.events[0].run_id}" if self.events[0].run_id else ""]).rstrip()

    def to_json(self) -> dict[str, Any]:
        """What a webhook is sent."""
        return {
            "version": 1,
            "id": self.id,
            "run_id": self.events[0].run_id,
            "severity": self.severity,
            "title": self.title,
            "text": self.text,
            "events": [json.loads(event.model_dump_json()) for event in self.events],
        }


def _headline(event: AlertEvent) -> str:
    return f"[{event.severity}] {event.name}" if isinstance(event, AlertRaised) else f"[over] {event.name}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"
