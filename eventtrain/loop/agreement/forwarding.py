"""Events that another process than process 0 publishes by itself, on their way to the bus of process 0.

The training sequence, answers to commands and the events of a checkpoint are on the bus of every process anyway, so
they stay where they are. The others wait in an ``Outbox``, and go to process 0 in batches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from eventtrain.errors import BusClosed, QueueFull
from eventtrain.events import (
    TRAINING_SEQUENCE,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRestored,
    CheckpointSkipped,
    CheckpointStarted,
    CommandConflict,
    CommandRejected,
    Event,
    PeerLost,
    SnapshotTaken,
    SubscriberLagged,
)
from eventtrain.events.models import Frozen

logger = logging.getLogger("eventtrain")

MOST_WAITING = 1000
"""Events that wait to be sent; more are dropped and counted."""
MOST_IN_A_MESSAGE = 200
MOST_CHARACTERS = 256 * 1024
"""Of the events of a message; one that is longer by itself is dropped. The service takes a few MB."""

UNSTAMPED = {"seq": 0, "stream": None, "attempt": 0}
"""Fields that the bus of process 0 sets."""
ON_EVERY_BUS: tuple[type[Event], ...] = (
    *TRAINING_SEQUENCE,
    *(PeerLost, CommandRejected, CommandConflict, SnapshotTaken),
    *(CheckpointStarted, CheckpointCommitted, CheckpointFailed, CheckpointSkipped, CheckpointRestored),
)
"""Events that process 0 publishes itself: never forwarded."""


class ForwardedEvent(Frozen):
    """One event, and the name of its class."""

    type: str
    text: str


class Forwarded(Frozen):
    """A message of another process: events of its bus.

    Attributes:
        process: ``jax.process_index()`` of the sender.
        events: in the order in which they were published.
        dropped: how many were dropped since its last message.
        step: of the last event that was published.
    """

    process: int
    events: tuple[ForwardedEvent, ...]
    dropped: int = 0
    step: int = 0


class Outbox:
    """Events of this process that wait to be sent to process 0, at most ``limit``. Any thread; never blocks.

    Args:
        process: ``jax.process_index()`` of this process.
        wake: called when there is something to send.
        limit: how many may wait.
    """

    def __init__(self, process: int, wake: Callable[[], None], limit: int = MOST_WAITING) -> None:
        self._process = process
        self._wake = wake
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._dropped = self._dropped_in_all = 0
        self._step = 0
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._dropped)

    def offer(self, events: Sequence[Event]) -> None:
        """Takes the events of one class that have just been published; those beyond the limit are dropped."""
        if issubclass(type(events[0]), ON_EVERY_BUS):
            return
        with self._lock:
            room = max(0, self._limit - len(self._waiting))
            self._waiting += events[:room]
            self._drop(len(events) - room)
            self._step = events[-1].step
        self._wake()

    def take(self) -> str | None:
        """Returns the next message; None if nothing waits. For one thread."""
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_IN_A_MESSAGE))]
        texts: list[ForwardedEvent] = []
        characters, lost = 0, 0
        while batch:
            event = batch.pop(0)
            try:
                text = event.model_dump_json()
            except Exception as error:  # of a class of the user's
                logger.warning("A %s cannot be forwarded to process 0: %s", event.kind, error)
                lost += 1
                continue
            if len(text) > MOST_CHARACTERS:
                logger.warning("A %s of %d characters is too long for process 0", event.kind, len(text))
                lost += 1
                continue
            if texts and characters + len(text) > MOST_CHARACTERS:
                with self._lock:
                    self._waiting.extendleft([*reversed(batch), event])
                break
            characters += len(text)
            texts.append(ForwardedEvent(type=_name_of(type(event)), text=text))
        with self._lock:
            self._drop(lost)
            dropped, self._dropped = self._dropped, 0
        if not texts and not dropped:
            return None
        message = Forwarded(process=self._process, events=tuple(texts), dropped=dropped, step=self._step)
        return message.model_dump_json()

    def _drop(self, count: int) -> None:
        if count <= 0:
            return
        if not self._dropped_in_all:
            logger.warning("Events of this process are published faster than they can be sent to process 0")
        self._dropped += count
        self._dropped_in_all += count


def publish_forwarded(message: Forwarded, publish: Callable[[Event], None]) -> None:
    """Publishes the events of a message on the bus of process 0, with ``process`` set. Never blocks.

    Those that a full queue or an unknown class keeps from it are counted and reported by a ``SubscriberLagged``, with
    those that the sender has dropped.
    """
    dropped = message.dropped
    known = {_name_of(event_type): event_type for event_type in _subclasses(Event)}
    for forwarded in message.events:
        event_type = known.get(forwarded.type)
        try:
            if event_type is None:
                raise LookupError(f"process 0 has no event class {forwarded.type}")
            event = event_type.model_validate_json(forwarded.text)
            publish(event.model_copy(update={"process": message.process, **UNSTAMPED}))
        except (QueueFull, BusClosed):
            dropped += 1
        except Exception as error:  # of a class of the user's
            logger.warning("An event of process %d cannot be published here: %s", message.process, error)
            dropped += 1
    if dropped:
        logger.warning("%d events of process %d were dropped on the way here", dropped, message.process)
        lagged = SubscriberLagged(
            step=message.step, subscriber="(forwarding)", dropped=dropped, process=message.process
        )
        with suppress(QueueFull, BusClosed):  # it is in the log
            publish(lagged)


def _name_of(event_type: type[Event]) -> str:
    return f"{event_type.__module__}.{event_type.__qualname__}"


def _subclasses(event_type: type[Event]) -> Iterator[type[Event]]:
    for subclass in event_type.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
