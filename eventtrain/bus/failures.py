"""What one subscription's handler got wrong: counted, logged, said as an event, and kept for a second try."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from eventtrain.bus.handlers import HandlerTimeout
from eventtrain.events import Event, SubscriberFailed, SubscriberLagged

logger = logging.getLogger("eventtrain")

DEAD_LETTERS = 100
"""How many failed events a subscription keeps for inspection."""
NOTICES = (SubscriberFailed, SubscriberLagged)
"""Failures in handling these are counted and logged only; an event about them would beget itself."""


class DeadLetter(NamedTuple):
    """An event whose handling failed for good, and why."""

    event: Event
    error: Exception


class Failures:
    """The failures of one subscription.

    Args:
        notify: publishes on behalf of the bus.
    """

    def __init__(self, notify: Callable[[Event], None]) -> None:
        self._notify = notify
        self.attempts = 0
        """Failed attempts, retried ones too."""
        self.consecutive = 0
        """Events in a row whose handling failed for good."""
        self.timed_out = False
        """An attempt exceeded ``timeout_s``: what the handler decides may depend on timing."""
        self.dead_letters: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS)

    def note_attempt(self, name: str, event: Event, error: Exception, attempt: int) -> None:
        """One attempt of the handler called ``name`` failed."""
        self.attempts += 1
        self.timed_out = self.timed_out or isinstance(error, HandlerTimeout)
        if self.attempts & (self.attempts - 1) == 0:
            # Only the 1st, 2nd, 4th, 8th ... is logged: a handler that fails at every step must not flood the log.
            logger.error(
                "Subscriber %s failed on %s of step %d (attempt %d; failure no. %d): %s: %s",
                name, event.kind, event.step, attempt, self.attempts, type(error).__name__, error,
                exc_info=error if self.attempts == 1 else None,
            )  # fmt: skip
        if not isinstance(event, NOTICES):
            self._notify(
                SubscriberFailed(
                    step=event.step,
                    subscriber=name,
                    event_kind=event.kind,
                    error=f"{type(error).__name__}: {error}",
                    attempt=attempt,
                )
            )

    def give_up(self, event: Event, error: Exception) -> None:
        """No further attempt: ``event`` becomes a dead letter."""
        self.consecutive += 1
        self.dead_letters.append(DeadLetter(event, error))

    def take_letters(self) -> list[DeadLetter]:
        """All dead letters, oldest first; they are the caller's from now on."""
        letters: list[DeadLetter] = []
        while self.dead_letters:
            letters.append(self.dead_letters.popleft())
        return letters
