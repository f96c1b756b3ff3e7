"""Failures of one subscription's handler: counted, logged, published as events, and kept as dead letters."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from eventtrain.events import Event, SubscriberFailed, SubscriberLagged

logger = logging.getLogger("eventtrain")

DEAD_LETTERS = 100
"""Number of failed events that a subscription keeps for inspection."""
NOTICES = (SubscriberFailed, SubscriberLagged)
"""Failures of their handlers are only counted and logged: an event about them would lead to the next failure."""


class HandlerTimeout(TimeoutError):
    """An attempt took longer than the subscription's ``timeout_s``."""


class DeadLetter(NamedTuple):
    """An event whose handling failed for good, and the error of the last attempt."""

    event: Event
    error: Exception


class Failures:
    """The failures of one subscription.

    Args:
        subscriber: name of the subscription.
        notify: publishes an event of the bus itself.
        has_room: whether a notice of that class passes no limit of a queue.
    """

    def __init__(
        self, subscriber: str, notify: Callable[[Event], None], has_room: Callable[[type[Event]], bool]
    ) -> None:
        self._subscriber = subscriber
        self._notify = notify
        self._has_room = has_room
        self._held: dict[str, SubscriberFailed] = {}
        self._lock = threading.Lock()  # of _held: handlers fail on the event loop, a `where` on any thread
        self.attempts = 0
        """Failed attempts, retried ones included."""
        self.consecutive = 0
        """Events in a row whose handling failed for good."""
        self.timed_out = False
        """Whether an attempt exceeded ``timeout_s``, so that the handler's decisions may depend on timing."""
        self.dead_letters: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS)

    def add_attempt(self, event: Event, error: Exception, attempt: int) -> None:
        """Counts, logs and publishes one failed attempt."""
        self.attempts += 1
        self.timed_out = self.timed_out or isinstance(error, HandlerTimeout)
        if self.attempts & (self.attempts - 1) == 0:
            # Only the 1st, 2nd, 4th, 8th ... is logged: a handler that fails at every step must not flood the log.
            logger.error(
                "Subscriber %s failed on %s of step %d (attempt %d; failure no. %d): %s: %s",
                self._subscriber, event.kind, event.step, attempt, self.attempts, type(error).__name__, error,
                exc_info=error if self.attempts == 1 else None,
            )  # fmt: skip
        if not isinstance(event, NOTICES):
            with self._lock:
                held = self._held.get(event.kind)
                self._held[event.kind] = SubscriberFailed(
                    step=event.step,
                    subscriber=self._subscriber,
                    event_kind=event.kind,
                    error=f"{type(error).__name__}: {error}",
                    attempt=attempt,
                    count=1 if held is None else held.count + 1,
                )
            self.publish_held()

    def publish_held(self, *, at_once: bool = False) -> None:
        """Publishes the notices that wait, one for each kind of event, where there is room or ``at_once``."""
        while self._held and (at_once or self._has_room(SubscriberFailed)):
            with self._lock:
                notice = self._held.pop(next(iter(self._held))) if self._held else None
            if notice is not None:
                self._notify(notice)

    def add_dead_letter(self, event: Event, error: Exception) -> None:
        """Keeps ``event``, for which no further attempt is made."""
        self.consecutive += 1
        self.dead_letters.append(DeadLetter(event, error))

    def take_dead_letters(self) -> list[DeadLetter]:
        """Removes and returns all dead letters, oldest first. Any thread."""
        letters: list[DeadLetter] = []
        while self.dead_letters:
            letters.append(self.dead_letters.popleft())
        return letters
