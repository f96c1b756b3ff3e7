"""Where published events wait for the event loop, and who is told that there is no room."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from anyio.lowlevel import checkpoint

from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.subscription import Subscription
from eventtrain.bus.wakeup import Wakeup
from eventtrain.errors import BusClosed, ConfigurationError, EventReused, QueueFull
from eventtrain.events import Event

CLAIMED = -1
"""``seq`` of an event that was published and waits in the inbox for its number."""
ROUTE_BATCH = 256
"""Events routed before the event loop gets a turn."""


class PublishQueueHost(Protocol):
    """What the inbox asks of its bus."""

    run_id: str
    routing: threading.RLock

    def settle(self) -> None:
        """Have everyone who waits look again."""
        ...


class PublishQueue:
    """Takes events from any thread with one append; the event loop numbers them and hands them out.

    What fits into every Lossless queue is known in advance as ``headroom``, so that publishing looks at one number.
    Only past it a publisher routes what waits itself, under the lock, and looks at the queues that want its event.

    Args:
        join: called, under the lock, when a subscription's turn has come.
        limit: how many entries may wait.
    """

    def __init__(
        self, host: PublishQueueHost, roster: RoutingTable, join: Callable[[Subscription], None], limit: int
    ) -> None:
        self._host = host
        self._roster = roster
        self._join = join
        self._limit = limit
        self._entries: deque[Event | Subscription] = deque()
        self._headroom = limit  # 0: every publisher looks
        self._joining = 0  # subscriptions among the entries; their limits are not in the headroom yet
        self._bell: Wakeup | None = None
        self._is_routing = False
        self._seq = 0
        self.closed = False

    def publish(self, event: Event) -> None:
        """Take one event in. Any thread; never blocks. See ``EventBus.publish``."""
        entries = self._entries
        try:
            fields: Any = event.__dict__  # the frozen model's own dict: the stamp goes past Pydantic
            if fields["seq"] or len(entries) >= self._headroom:
                self._admit(event)
        except (AttributeError, KeyError):
            raise ConfigurationError(
                f"Cannot publish {event!r}: it is no eventtrain.Event. Subclass Event."
            ) from None
        fields["seq"] = CLAIMED
        entries.append(event)
        bell = self._bell
        if bell is not None and bell.armed:
            bell.ring()

    def notify(self, event: Event) -> None:
        """Take in what the bus itself says; never refused while anyone could hear it: no failure stays unsaid."""
        bell = self._bell
        if self.closed and bell is None:
            return
        fields: Any = event.__dict__
        fields["seq"] = CLAIMED
        self._entries.append(event)
        if bell is not None:
            bell.ring()

    def enlist(self, subscription: Subscription) -> None:
        """Let a subscription join behind what was published before it. Under the lock."""
        self._joining += 1
        self._headroom = 0  # its limit may be lower than the others': the next publisher looks
        self._entries.append(subscription)
        assert self._bell is not None
        self._bell.ring()

    def _admit(self, event: Event) -> None:
        """The rare path of publish: route what waits, here and now, then look at the queues that want the event."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AttributeError
        if event.seq:
            raise EventReused(
                f"Cannot publish this {event.kind}: the instance was published before (seq {event.seq}), and "
                "subscribers already share it. Make a new one, for example event.model_copy(update={'seq': 0})."
            )
        if self.closed:
            raise BusClosed(f"Cannot publish {event.kind}: the bus is closed and nobody would receive it.")
        for _ in range(0, len(self._entries), ROUTE_BATCH):
            with self._host.routing:  # in batches, so that the event loop never waits long for the lock
                if self._bell is not None:
                    self._hand_out_waiting()
        full = self.full_for(event)
        if full is not None:
            raise QueueFull(
                f"Cannot publish {event.kind}: {full}. Await publish_async() to wait for room, or give the "
                "subscription a queue that drops (KeepLatest(), DropOldest(n), DropNewest(n))."
            )

    def full_for(self, event: Event) -> str | None:
        """Why ``event`` cannot be published now; None if it can. Any thread."""
        for subscription in self._roster.route(type(event)):
            room = subscription.queue.room()
            if room is not None and room <= 0 and subscription.active:
                return f"the Lossless queue of {subscription.name} is at its limit of {len(subscription.queue)} events"
        if len(self._entries) >= self._limit:
            return f"{len(self._entries)} events wait and the bus is not routing them (was it started?)"
        return None

    # --- the event loop's side ------------------------------------------------------------------------------

    def open(self, bell: Wakeup | None) -> None:
        """An event loop serves the bus from now on, or (None) does no more. Under the lock."""
        self._bell = bell

    def close(self) -> None:
        """Refuse what is published from now on. Under the lock."""
        self.closed = True
        self._headroom = 0

    async def route(self, bell: Wakeup) -> None:
        """Number and hand out what waits, for ever."""
        while True:
            await bell.sleep_unless(lambda: len(self._entries))
            with self._host.routing:
                self._hand_out_waiting()
            self._host.settle()  # an event that nobody wants is handled now
            await checkpoint()

    def _hand_out_waiting(self) -> None:
        """Hand out at most ``ROUTE_BATCH`` entries. Under the lock."""
        if self._is_routing:  # a `where` publishes: what it says comes after the event it looks at
            return
        self._is_routing = True
        try:
            popleft = self._entries.popleft
            seq, now, run_id = self._seq, datetime.now(UTC), self._host.run_id
            kind: type[Event | Subscription] = Event
            alike: list[Event] = []  # neighbours of one class are handed out together
            for _ in range(min(len(self._entries), ROUTE_BATCH)):
                entry = popleft()
                if type(entry) is not kind:
                    self._hand_out(alike)
                    alike, kind = [], type(entry)
                if isinstance(entry, Subscription):
                    self._joining -= 1
                    self._join(entry)
                    continue
                seq += 1
                fields: Any = entry.__dict__
                fields["seq"] = seq
                fields["time"] = now
                if not fields["run_id"]:
                    fields["run_id"] = run_id
                alike.append(entry)
            self._hand_out(alike)
        finally:
            self._is_routing = False
        self._seq = seq
        self.measure_headroom()

    def _hand_out(self, events: list[Event]) -> None:
        if events:
            for subscription in self._roster.route(type(events[0])):
                subscription.offer(events)

    def measure_headroom(self) -> None:
        """How many events may be published before a publisher has to look. Under the lock."""
        if self.closed or self._joining:
            self._headroom = 0
            return
        headroom = self._limit
        for subscription in self._roster.bounded:
            room = subscription.queue.room()
            if room is not None and room < headroom:
                headroom = room
        self._headroom = headroom

    def __len__(self) -> int:
        return len(self._entries)

    def unrouted(self) -> int:
        """How many events wait."""
        return sum(isinstance(entry, Event) for entry in list(self._entries))
