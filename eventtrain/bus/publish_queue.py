"""Publish queue: events from any thread, waiting for the event loop to number and route them.

Threads. ``publish`` and ``notify`` run on any thread. They append to a deque, whose methods are atomic, and read
``_headroom`` without a lock: the number of events that may wait before some Lossless queue could overflow. So the
common publish costs an append and a few attribute reads. At ``_headroom`` a publisher routes the waiting events
itself, under the delivery lock, and then looks at the queues that want its event. All other fields are written under
that lock.

``_headroom`` is computed at the end of a batch, so publishers that run while a batch is routed see the old number. A
queue can exceed its limit by the few events that they publish. It never loses one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from weakref import WeakSet

from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.runner import BusRunner
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopCondition, Wakeup
from eventtrain.errors import BusClosed, ConfigurationError, EventReused, QueueFull
from eventtrain.events import Event
from eventtrain.validation.annotations import shown

CLAIMED = -1
"""``seq`` of an event that was published and waits for its number."""
ROUTE_BATCH = 256
"""Events routed before the event loop gets a turn."""


_served: WeakSet[PublishQueue] = WeakSet()
"""The queues that an event loop of this process serves."""


class PublishQueue:
    """Accepts published events, and subscriptions that join behind the events published before them.

    Args:
        table: finds the subscriptions to an event.
        progress: notified when events were routed.
        limit: how many entries may wait.
    """

    def __init__(self, table: RoutingTable, progress: CrossLoopCondition, limit: int) -> None:
        self.run_id = ""
        """Stamped on events that carry none."""
        self.attempt = 0
        """Stamped likewise: of the run in progress, or of the last one."""
        self.closed = False
        self.close_reason = ""
        """Why it is closed, as a whole clause."""
        self.forward: Callable[[Sequence[Event]], None] | None = None
        """Gets the events that were numbered, in groups of one class. Must not block."""
        self.forked = False
        """Whether this process was forked from the one whose event loop served the bus."""
        self._table = table
        self._progress = progress
        self._limit = limit
        self._entries: deque[Event | SubscriptionCore] = deque()
        self._headroom = limit
        self._joining = 0  # subscriptions among the entries, whose limits the headroom does not know yet
        self._wakeup: Wakeup | None = None
        self._runner: BusRunner | None = None
        self._is_routing = False
        self._seq = 0

    # --- any thread -------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """See ``EventBus.publish``."""
        entries = self._entries
        try:
            fields: Any = event.__dict__  # of the frozen model itself: Pydantic would refuse the stamp
            if fields["seq"] or len(entries) >= self._headroom:
                self._make_room(event)
        except (AttributeError, KeyError):
            raise ConfigurationError(
                f"Cannot publish {shown(event)}: it is not an eventtrain.Event. Subclass Event."
            ) from None
        fields["seq"] = CLAIMED
        entries.append(event)
        wakeup = self._wakeup  # read after the append, as wakeup.py requires
        if wakeup is not None and wakeup.armed:
            wakeup.wake()

    def notify(self, event: Event) -> None:
        """Accepts an event of the bus itself: never refused while the bus is served, so that no failure is lost."""
        wakeup = self._wakeup
        if self.closed and wakeup is None:
            return
        fields: Any = event.__dict__
        fields["seq"] = CLAIMED
        self._entries.append(event)
        if wakeup is not None:
            wakeup.wake()

    def _make_room(self, event: Event) -> None:
        """Routes the waiting events on this thread and raises if ``event`` still cannot be published."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AttributeError
        if event.seq:
            raise EventReused(
                f"Cannot publish this {event.kind}: the instance was published before (seq {event.seq}), and "
                "subscribers already share it. Make a new one, for example event.model_copy(update={'seq': 0})."
            )
        if self.closed:
            raise BusClosed(
                f"Cannot publish {event.kind}: {self.close_reason}, so nothing more is delivered."
            )
        for _ in range(0, len(self._entries), ROUTE_BATCH):
            with (
                self._table.delivery_lock
            ):  # in batches, so that the event loop never waits long for the lock
                if self._wakeup is not None:
                    self._route_batch()
        full = self.full_for(event)
        if full is not None:
            raise QueueFull(
                f"Cannot publish {event.kind}: {full}. Await publish_async() to wait for room, or give the "
                "subscription a queue that drops (KeepLatest(), DropOldest(n), DropNewest(n))."
            )

    def full_for(self, event: Event) -> str | None:
        """Returns why ``event`` cannot be published now; None if it can."""
        for subscription in self._table.route(type(event)):
            room = subscription.queue.room()
            if room is not None and room <= 0 and subscription.active:
                return f"the Lossless queue of {subscription.name} is at its limit of {len(subscription.queue)} events"
        if len(self._entries) >= self._limit:
            return f"{len(self._entries)} events wait and the bus is not routing them (was it started?)"
        return None

    def has_room_for_notice(self, event_type: type[Event], ahead: int = 0) -> bool:
        """Returns whether a notice fits below every limit, with all that waits unrouted counted as if it came first.

        ``ahead``: how many more events of its class are on their way to the queues.
        """
        waiting = len(self._entries) + ahead
        rooms = (subscription.queue.room() for subscription in self._table.bounded_route(event_type))
        return waiting < self._limit and all(room is None or room > waiting for room in rooms)

    def unrouted(self) -> int:
        """Returns the number of waiting events."""
        return sum(isinstance(entry, Event) for entry in list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    # --- under the delivery lock ------------------------------------------------------------------------------

    def join(self, subscription: SubscriptionCore) -> None:
        """Adds a subscription: behind the waiting events while the bus is served, else at once."""
        if self._wakeup is None:
            self._table.join(subscription)
            return
        self._joining += 1
        self._headroom = 0  # its limit may be lower than the others': the next publisher looks
        self._entries.append(subscription)
        self._wakeup.wake()

    def open(self, runner: BusRunner | None) -> None:
        """An event loop serves the bus from now on; None: no longer."""
        self._runner = runner
        self._wakeup = runner.publish_wakeup if runner is not None else None
        (_served.discard if runner is None else _served.add)(self)

    def close(self, reason: str) -> None:
        """Refuses events from now on. The first ``reason`` is kept."""
        if not self.closed:
            self.close_reason = reason
            self.closed = True
        self._headroom = 0

    def forget_the_loop(self) -> None:
        """This process is a fork of the one whose event loop serves the bus: nothing would be routed here."""
        self.open(None)
        self.forked = True
        self.close(
            "this process was forked from the one that serves the bus (publish there, or start processes with the "
            "method 'spawn')"
        )

    def _route_batch(self) -> None:
        """Numbers and routes at most ``ROUTE_BATCH`` entries."""
        if (
            self._is_routing
        ):  # called from a `where` that publishes: its event comes behind the one it looks at
            return
        self._is_routing = True
        try:
            popleft = self._entries.popleft
            seq, now, run_id, attempt = self._seq, datetime.now(UTC), self.run_id, self.attempt
            batch_type: type[Event | SubscriptionCore] = Event
            batch: list[Event] = []  # consecutive events of one class are delivered together
            for _ in range(min(len(self._entries), ROUTE_BATCH)):
                entry = popleft()
                if type(entry) is not batch_type:
                    self._deliver(batch)
                    batch, batch_type = [], type(entry)
                if isinstance(entry, SubscriptionCore):
                    self._complete_join(entry)
                    continue
                seq += 1
                fields: Any = entry.__dict__
                fields["seq"] = seq
                fields["time"] = now
                fields["stream"] = "published"
                if not fields["run_id"]:
                    fields["run_id"] = run_id
                if not fields["attempt"]:
                    fields["attempt"] = attempt
                batch.append(entry)
            self._deliver(batch)
        finally:
            self._is_routing = False
        self._seq = seq
        self.measure_headroom()

    def _complete_join(self, subscription: SubscriptionCore) -> None:
        self._joining -= 1
        self._table.join(subscription)
        if self._runner is not None and subscription.handler is not None:
            self._runner.start_worker(subscription.worker, subscription.name)

    def _deliver(self, events: list[Event]) -> None:
        if events:
            for subscription in self._table.route(type(events[0])):
                subscription.offer(events)
            if self.forward is not None:
                self.forward(events)

    def measure_headroom(self) -> None:
        """Computes how many events may be published before a publisher has to look at the queues."""
        if self.closed or self._joining:
            self._headroom = 0
            return
        headroom = self._limit
        for subscription in self._table.bounded:
            room = subscription.queue.room()
            if room is not None and room < headroom:
                headroom = room
        self._headroom = headroom

    # --- the event loop's thread ------------------------------------------------------------------------------

    async def route(self, wakeup: Wakeup) -> None:
        """Numbers and routes the waiting entries, forever."""
        while True:
            await wakeup.sleep_until(lambda: len(self._entries))
            with self._table.delivery_lock:
                self._route_batch()
            self._progress.notify_all()  # an event without subscriptions is handled now
            await wakeup.let_others_run()


def _forget_the_loops() -> None:
    for queue in list(_served):
        queue.forget_the_loop()


if hasattr(os, "register_at_fork"):  # not on Windows. At the fork, so that publishing need not look
    os.register_at_fork(after_in_child=_forget_the_loops)
