"""``EventBuffer``: events on their way to a broker, bounded, and joined to messages whose body never changes."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, replace

from eventtrain.subscribers._shared.step_table import StepTable, json_lines

MOST_EVENTS = 500
"""Events of one message."""


@dataclass(frozen=True, slots=True)
class Message:
    """Some consecutive events as a JSON array. It is sent again, as it is, until the broker has acknowledged it.

    Attributes:
        number: position among the messages of this attempt of the run, from 1.
        events: how many there are.
        weight: their share of the buffer's limit.
    """

    number: int
    body: bytes
    events: int
    weight: int


@dataclass(frozen=True, slots=True)
class _Lines:
    """The JSON of some events, joined by commas and line ends; ``weight`` is their share of the limit."""

    json: bytes
    events: int = 1
    weight: int = 1


@dataclass(frozen=True)
class BrokerStatistics:
    """Counts of events; a StepsCompleted counts as its steps.

    Attributes:
        sent: acknowledged by the broker.
        waiting: not acknowledged yet.
        dropped: not sent and never will be, because of the limit or their size.
        messages: acknowledged by the broker.
        outages: how often the broker failed after it had worked, or at the start.
        commands, refused: carried out, and not carried out.
    """

    sent: int = 0
    waiting: int = 0
    dropped: int = 0
    messages: int = 0
    outages: int = 0
    commands: int = 0
    refused: int = 0


class EventBuffer:
    """Takes events on the event loop, and gives messages to the thread that sends them.

    Threads. ``put`` and ``put_table`` are for the event loop, ``next_message``, ``acknowledge``, ``split`` and ``drop``
    for the sending thread; ``statistics`` is for any.

    Args:
        limit: events that may wait. Of more, those behind are dropped; lifecycle events only at twice the limit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._items: deque[_Lines | StepTable] = deque()
        self._frozen: Message | None = None
        self._number = 0
        self._counts = Counter[str]()
        self.waiting = 0
        """Events that wait, and those of a message that is not acknowledged."""

    @property
    def statistics(self) -> BrokerStatistics:
        """Counts up to now."""
        with self._lock:
            return BrokerStatistics(waiting=self.waiting, **self._counts)

    def count(self, waiting: int = 0, **counts: int) -> None:
        """Adds to the statistics. Any thread."""
        with self._lock:
            self.waiting += waiting
            self._counts.update(counts)

    # --- the event loop ---------------------------------------------------------------------------------------

    def put(self, json: bytes, weight: int = 1, *, lifecycle: bool = False) -> None:
        """Adds one event; drops it if too many wait. Never blocks."""
        limit = 2 * self._limit if lifecycle else self._limit
        # Nothing waits: then an event whose weight is above the limit is sent all the same.
        if self.waiting + weight <= limit or not self.waiting:
            self._items.append(_Lines(json, weight=weight))
            self.count(weight)
        else:
            self.count(dropped=weight)

    def put_table(self, table: StepTable) -> None:
        """Adds the StepCompleted events of ``table``, as many as there is room for; drops the others. Never blocks."""
        rows = len(table.steps)
        room = max(0, min(rows, self._limit - self.waiting))
        if room:
            self._items.append(table if room == rows else _rows(table, slice(room)))
            self.count(room)
        if room < rows:
            self.count(dropped=rows - room)

    # --- the sending thread -----------------------------------------------------------------------------------

    def next_message(self, most_bytes: int) -> Message | None:
        """Returns the next message, or again the one that was not acknowledged; None if nothing waits."""
        if self._frozen is None and (taken := self._take(most_bytes)):
            self._freeze(taken)
        return self._frozen

    @property
    def has_whole_message(self) -> bool:
        """Whether so many events wait that there is nothing to be gained by waiting for more."""
        return self.waiting >= MOST_EVENTS

    def acknowledge(self, message: Message) -> None:
        """The broker has ``message``."""
        self._frozen = None
        self.count(waiting=-message.weight, sent=message.weight, messages=1)

    def split(self, message: Message) -> bool:
        """Makes a message of half of one that is too large for the broker; returns False if it is a single event."""
        if message.events == 1:
            return False
        # The broker has never taken it, so its events may be sent under other numbers.
        first, second = _halves(_Lines(message.body[1:-1], message.events, message.weight))
        self._items.appendleft(second)
        self._freeze([first])
        return True

    def drop(self, message: Message) -> None:
        """Gives up ``message``."""
        self._frozen = None
        self.count(waiting=-message.weight, dropped=message.weight)

    def _take(self, most_bytes: int) -> list[_Lines]:
        items, taken, events, size = self._items, list[_Lines](), 0, 2
        while items and events < MOST_EVENTS:
            item, room = items.popleft(), MOST_EVENTS - events
            if isinstance(item, StepTable):
                if len(item.steps) > room:
                    items.appendleft(_rows(item, slice(room, None)))
                    item = _rows(item, slice(room))
                item = _Lines(json_lines(item).replace(b"\n", b",\n"), len(item.steps), len(item.steps))
            size += len(item.json) + 2
            if item.events > room or (size > most_bytes and (taken or item.events > 1)):
                items.extendleft(reversed([item] if taken else _halves(item)))
                if taken:
                    break
                size = 2
                continue
            taken.append(item)
            events += item.events
        return taken

    def _freeze(self, taken: list[_Lines]) -> None:
        self._number += 1
        body = b"[" + b",\n".join([lines.json for lines in taken]) + b"]"
        events, weight = (
            sum(column) for column in zip(*((one.events, one.weight) for one in taken), strict=True)
        )
        self._frozen = Message(self._number, body, events, weight)


def _rows(table: StepTable, rows: slice) -> StepTable:
    return replace(
        table,
        steps=table.steps[rows],
        batches=table.batches[rows],
        metrics={name: column[rows] for name, column in table.metrics.items()},
        seqs=None if table.seqs is None else table.seqs[rows],
    )


def _halves(lines: _Lines) -> tuple[_Lines, _Lines]:
    """Returns two parts of two or more events. Line ends are between events only: JSON has none inside a text."""
    parts = lines.json.split(b",\n")
    middle, weight = len(parts) // 2, lines.weight // 2
    return (
        _Lines(b",\n".join(parts[:middle]), middle, weight),
        _Lines(b",\n".join(parts[middle:]), len(parts) - middle, lines.weight - weight),
    )
