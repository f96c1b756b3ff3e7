"""Queue policies: what happens when a subscriber is slower than the run.

The public classes are settings (frozen, comparable, usable for many subscriptions); ``open()`` makes the queue of one
subscription. One thread at a time puts (it holds the bus' delivery lock); any thread takes or clears, because a stream
may be read on another event loop. Each method is O(1) in the number of waiting events.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from eventtrain.errors import ConfigurationError
from eventtrain.validation.annotations import checked


class EventQueue(ABC):
    """FIFO queue of one subscription."""

    put: Callable[[Iterable[Any]], None]
    """Adds the items, in order, and drops what the policy says."""
    take: Callable[[], Any]
    """Removes and returns the oldest item; raises IndexError if there is none."""
    dropped: int = 0
    """Number of events dropped so far."""

    @abstractmethod
    def oldest(self) -> Any | None:
        """Returns the oldest item, which stays in the queue; None if there is none."""

    @abstractmethod
    def __len__(self) -> int: ...

    def waiting(self) -> list[Any]:
        """Returns the waiting items, oldest first. Only for queues that drop nothing."""
        raise NotImplementedError

    @abstractmethod
    def clear(self) -> int:
        """Removes all items without counting them as dropped; returns their number."""

    def drop_all(self) -> None:
        """Removes all items and counts them as dropped."""
        self.dropped += self.clear()

    def room(self) -> int | None:
        """Returns how many more items fit; None if the queue drops instead."""
        return None

    def choose(self, steps: range) -> range:
        """Returns which of these consecutive droppable events to build and put; counts the others as dropped."""
        return steps


class LosslessQueue(EventQueue):
    """A deque, whose methods are atomic, so that no lock is needed.

    A series is one item that counts as its events. It is put and taken on the event loop's thread.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: deque[Any] = deque()
        self._within_series = 0
        # The deque's own methods, so that a queue without a policy costs no more than the deque.
        self.put = self._items.extend
        self.take = self._items.popleft

    def oldest(self) -> Any | None:  # noqa: D102  inherited
        try:
            return self._items[0]
        except IndexError:
            return None

    def __len__(self) -> int:
        return len(self._items) + self._within_series

    def put_series(self, series: Any, events: int) -> None:
        """Adds a series of so many events."""
        self._within_series += events - 1
        self._items.append(series)

    def series_taken(self, events: int) -> None:
        """Records that ``take`` has returned a series of so many events."""
        self._within_series -= events - 1

    def waiting(self) -> list[Any]:  # noqa: D102  inherited
        return list(self._items)

    def clear(self) -> int:  # noqa: D102  inherited
        # One by one: the worker may take at the same time, and each item must be counted on one side only.
        count = 0
        for _ in range(len(self._items)):
            try:
                self._items.popleft()
            except IndexError:
                break
            count += 1
        count, self._within_series = count + self._within_series, 0
        return count

    def room(self) -> int:  # noqa: D102  inherited
        return self.limit - len(self)


class _DroppingQueue(EventQueue):
    """Keeps at most ``limit`` droppable events, and every lifecycle event, in order of arrival."""

    def __init__(self, limit: int, *, newest: bool) -> None:
        self.limit = limit
        self._drop_newest = newest
        self._lock = threading.RLock()  # put may drop the item that take is about to return
        # An OrderedDict and not a dict: taking the first key of a dict is O(n) after many deletions in front.
        self._items: OrderedDict[int, Any] = OrderedDict()
        self._droppable: deque[int] = deque()
        self._next_key = 0
        self.put = self._put
        self.take = self._take

    def _put(self, items: Iterable[Any]) -> None:
        with self._lock:
            for item in items:
                self._add(item)

    def _add(self, item: Any) -> None:
        if not item.lifecycle:
            if len(self._droppable) >= self.limit:
                self.dropped += 1
                if self._drop_newest:
                    return
                del self._items[self._droppable.popleft()]
            self._droppable.append(self._next_key)
        self._items[self._next_key] = item
        self._next_key += 1

    def _take(self) -> Any:
        with self._lock:
            if not self._items:
                raise IndexError("empty queue")
            key, item = self._items.popitem(last=False)
            if self._droppable and self._droppable[0] == key:
                self._droppable.popleft()
            return item

    def oldest(self) -> Any | None:
        with self._lock:
            return next(iter(self._items.values()), None)

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> int:
        with self._lock:
            count = len(self._items)
            self._items.clear()
            self._droppable.clear()
            return count

    def drop_all(self) -> None:
        with self._lock:  # put counts drops, too
            super().drop_all()

    def choose(self, steps: range) -> range:
        with self._lock:
            newest = self._drop_newest
            chosen = steps[: max(0, self.limit - len(self._droppable))] if newest else steps[-self.limit :]
            self.dropped += len(steps) - len(chosen)
            return chosen


class Queue(ABC):
    """Base class of ``Lossless``, ``KeepLatest``, ``DropOldest`` and ``DropNewest``, for the option ``queue=``."""

    @abstractmethod
    def open(self) -> EventQueue:
        """Makes the queue of one subscription."""


def _check_limit(policy: str, limit: int) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"{policy}(limit={limit!r}): limit must be an integer >= 1.")


@checked
@dataclass(frozen=True)
class Lossless(Queue):
    """Drops nothing (the default).

    At ``limit`` waiting events training runs at this subscriber's pace and publishes ``LoopStalled``; ``publish``
    raises ``QueueFull``. If the subscriber handles nothing for ``stall_timeout_s`` while training waits, it is
    disabled.
    """

    limit: int = 65_536
    stall_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _check_limit("Lossless", self.limit)
        if not self.stall_timeout_s > 0:
            raise ConfigurationError(
                f"Lossless(stall_timeout_s={self.stall_timeout_s!r}): stall_timeout_s must be a number of seconds > 0."
            )

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return LosslessQueue(self.limit)


@checked
@dataclass(frozen=True)
class KeepLatest(Queue):
    """Keeps only the newest waiting event; older ones are dropped and counted."""

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(1, newest=False)


@checked
@dataclass(frozen=True)
class DropOldest(Queue):
    """Drops the oldest waiting event when ``limit`` events wait and another one arrives."""

    limit: int

    def __post_init__(self) -> None:
        _check_limit("DropOldest", self.limit)

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(self.limit, newest=False)


@checked
@dataclass(frozen=True)
class DropNewest(Queue):
    """Drops the arriving event when ``limit`` events wait."""

    limit: int

    def __post_init__(self) -> None:
        _check_limit("DropNewest", self.limit)

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(self.limit, newest=True)
