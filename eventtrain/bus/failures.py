"""Failures of one subscription's handler: counted, logged, published as events, and kept as dead letters.

``Notices`` publishes such events: while a queue that wants them is at its limit, they wait and are added up.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple
from weakref import ref

from eventtrain.errors import is_logged
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


class Notices:
    """Publishes notices, at most one for each key beyond the limit of a queue. Any thread; never blocks.

    Args:
        notify: publishes an event of the bus itself.
        has_room: whether a notice of that class, behind that many others, passes no limit of a queue.
    """

    def __init__(self, notify: Callable[[Event], None], has_room: Callable[[type[Event], int], bool]) -> None:
        self._notify = notify
        self._has_room = has_room
        self._held: dict[Hashable, Event] = {}
        # On their way through the training stream, oldest first. Weak, because the end of a run may drop them.
        self._ahead: deque[ref[Event]] = deque()
        self._lock = threading.Lock()

    def add(
        self,
        key: Hashable,
        notice: Event,
        *,
        total: str = "count",
        emit: Callable[[Event], None] | None = None,
    ) -> None:
        """Publishes ``notice`` where there is room. Otherwise the newest notice of ``key`` waits.

        Args:
            key: notices of one class that have it in common may share one.
            notice: the event.
            total: the field that is added up over the notices that share one.
            emit: publishes it in the training stream; None: it has no place there. A notice that waited has none.
        """
        with self._lock:
            held = self._held.get(key)
            if emit is not None and held is None and self._fits(notice):
                self._ahead.append(ref(notice))
            else:
                emit = None
                if held is not None:
                    amount = getattr(held, total) + getattr(notice, total)
                    notice = notice.model_copy(update={total: amount})
                self._held[key] = notice
        if emit is None:
            self.publish()
        else:
            emit(notice)

    def _fits(self, notice: Event) -> bool:
        ahead = self._ahead
        while ahead and ((first := ahead[0]()) is None or first.seq):  # numbered: the queues have it
            ahead.popleft()
        return self._has_room(type(notice), len(ahead))

    def publish(self, *, at_once: bool = False) -> None:
        """Publishes the notices that wait, where there is room or ``at_once``."""
        while self._held:
            with self._lock:
                key = next(iter(self._held), None)
                if key is None or not (at_once or self._fits(self._held[key])):
                    return
                notice = self._held.pop(key)
            self._notify(notice)


class Failures:
    """The failures of one subscription.

    Args:
        subscriber: name of the subscription.
        notify: publishes an event of the bus itself.
        has_room: whether a notice of that class, behind that many others, passes no limit of a queue.
        has_subscribers: whether anything receives events of that class. Without it none is made: 4 us a failure.
    """

    def __init__(
        self,
        subscriber: str,
        notify: Callable[[Event], None],
        has_room: Callable[[type[Event], int], bool],
        has_subscribers: Callable[[type[Event]], bool],
    ) -> None:
        self._subscriber = subscriber
        self._has_subscribers = has_subscribers
        self.notices = Notices(notify, has_room)
        """Those that were not published yet, one for each kind of event."""
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
        if is_logged(self.attempts):
            logger.error(
                "Subscriber %s failed on %s of step %d (attempt %d; failure no. %d): %s: %s",
                self._subscriber, event.kind, event.step, attempt, self.attempts, type(error).__name__, error,
                exc_info=error if self.attempts == 1 else None,
            )  # fmt: skip
        if not isinstance(event, NOTICES) and self._has_subscribers(SubscriberFailed):
            failed = SubscriberFailed(
                step=event.step,
                subscriber=self._subscriber,
                event_kind=event.kind,
                error=f"{type(error).__name__}: {error}",
                handler_attempt=attempt,
            )
            self.notices.add(event.kind, failed)

    def add_dead_letters(self, events: Iterable[Event], error: Exception) -> None:
        """Keeps ``events``, on which the handler failed at once and for which no further attempt is made."""
        self.consecutive += 1
        self.dead_letters.extend(DeadLetter(event, error) for event in events)

    def take_dead_letters(self) -> list[DeadLetter]:
        """Removes and returns all dead letters, oldest first. Any thread."""
        letters: list[DeadLetter] = []
        while self.dead_letters:
            letters.append(self.dead_letters.popleft())
        return letters
