"""The four queues between the bus and one subscriber: what happens when the subscriber is slower than the run.

The public classes are choices (frozen, comparable, reusable for many subscriptions); ``open()`` makes the queue
of one subscription. One thread at a time puts (it holds the bus' routing lock), any thread takes or clears: a reader
may live on another event loop. Each method is O(1) in what waits.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from eventtrain.errors import ConfigurationError


class EventQueue(ABC):
    """First in, first out, for one subscription."""

    put: Callable[[Any], None]
    """Take one item in, dropping what the policy says."""
    put_many: Callable[[Iterable[Any]], None]
    """``put`` for each item, in order."""
    take: Callable[[], Any]
    """The oldest item; IndexError when empty."""
    dropped: int = 0
    """Every event it ever let go."""

    @abstractmethod
    def oldest(self) -> Any | None:
        """The oldest item without taking it; None when empty."""

    @abstractmethod
    def __len__(self) -> int: ...

    def waiting(self) -> list[Any]:
        """What waits, oldest first. Only of queues that drop nothing."""
        raise NotImplementedError

    @abstractmethod
    def clear(self) -> int:
        """Forget everything, without counting it as dropped; returns how many items that were."""

    @abstractmethod
    def drop_all(self) -> None:
        """Let everything go and count it."""

    def room(self) -> int | None:
        """How many more items fit; None where there is always room, because the queue drops."""
        return None

    def choose(self, steps: range) -> range:
        """Which of these consecutive droppable events to build and put; the others are counted as dropped."""
        return steps


class _LosslessQueue(EventQueue):
    """A deque: its methods are atomic, so it needs no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: deque[Any] = deque()
        # The deque's own methods: a queue without a policy costs what the deque costs.
        self.put = self._items.append
        self.put_many = self._items.extend
        self.take = self._items.popleft

    def oldest(self) -> Any | None:
        try:
            return self._items[0]
        except IndexError:
            return None

    def __len__(self) -> int:
        return len(self._items)

    def waiting(self) -> list[Any]:
        return list(self._items)

    def clear(self) -> int:
        # One by one: the worker may take at the same time, and each item is counted on one side only.
        count = 0
        for _ in range(len(self._items)):
            try:
                self._items.popleft()
            except IndexError:
                break
            count += 1
        return count

    def drop_all(self) -> None:
        self.dropped += self.clear()

    def room(self) -> int:
        return self.limit - len(self._items)


class _DroppingQueue(EventQueue):
    """Holds at most ``limit`` droppable events, and every lifecycle event, in order of arrival."""

    def __init__(self, limit: int, *, newest: bool) -> None:
        self.limit = limit
        self._drop_newest = newest
        self._lock = threading.Lock()  # putting drops what taking may be about to take
        # An OrderedDict and not a dict: taking the first key of a dict is O(n) after many deletions in front.
        self._items: OrderedDict[int, Any] = OrderedDict()
        self._droppable: deque[int] = deque()
        self._next_key = 0
        self.put = self._put
        self.put_many = self._put_many
        self.take = self._take

    def _put(self, item: Any) -> None:
        with self._lock:
            self._take_in(item)

    def _put_many(self, items: Iterable[Any]) -> None:
        with self._lock:
            for item in items:
                self._take_in(item)

    def _take_in(self, item: Any) -> None:
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
            return self._clear()

    def drop_all(self) -> None:
        with self._lock:
            self.dropped += self._clear()

    def _clear(self) -> int:
        count = len(self._items)
        self._items.clear()
        self._droppable.clear()
        return count

    def choose(self, steps: range) -> range:
        with self._lock:
            newest = self._drop_newest
            chosen = steps[: max(0, self.limit - len(self._droppable))] if newest else steps[-self.limit :]
            self.dropped += len(steps) - len(chosen)
            return chosen


class Queue(ABC):
    """What ``queue=`` takes: ``Lossless``, ``KeepLatest``, ``DropOldest`` or ``DropNewest``."""

    @abstractmethod
    def open(self) -> EventQueue:
        """The queue of one subscription."""


def _check_limit(policy: str, limit: int) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"{policy}(limit={limit!r}): a queue holds a whole number of events, at least 1."
        )


@dataclass(frozen=True)
class Lossless(Queue):
    """Nothing is dropped (the default).

    At ``limit`` waiting events training runs at this subscriber's pace, which ``LoopStalled`` says, and ``publish``
    raises ``QueueFull``. If the subscriber handles nothing for ``stall_timeout_s`` while training waits, that counts as
    its failure and it is disabled.
    """

    limit: int = 65_536
    stall_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _check_limit("Lossless", self.limit)
        if not self.stall_timeout_s > 0:
            raise ConfigurationError(
                f"Lossless(stall_timeout_s={self.stall_timeout_s!r}): needs a positive number of seconds."
            )

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _LosslessQueue(self.limit)


@dataclass(frozen=True)
class KeepLatest(Queue):
    """Only the newest event waits; every older one that was not yet handled is dropped and counted."""

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(1, newest=False)


@dataclass(frozen=True)
class DropOldest(Queue):
    """At ``limit`` waiting events the oldest goes."""

    limit: int

    def __post_init__(self) -> None:
        _check_limit("DropOldest", self.limit)

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(self.limit, newest=False)


@dataclass(frozen=True)
class DropNewest(Queue):
    """At ``limit`` waiting events what arrives is not taken."""

    limit: int

    def __post_init__(self) -> None:
        _check_limit("DropNewest", self.limit)

    def open(self) -> EventQueue:  # noqa: D102  inherited
        return _DroppingQueue(self.limit, newest=True)
