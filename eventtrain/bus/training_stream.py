"""What the training loop says, in its order.

Ready events, and series of them that are built only if someone wants them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from anyio.lowlevel import checkpoint

from eventtrain.bus.barrier import Marker, Redelivery, SubscriptionState
from eventtrain.bus.clock import Clock
from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.subscription import Subscription
from eventtrain.bus.wakeup import Signal, Wakeup
from eventtrain.events import Event

BUILD_BATCH = 64
"""Events of a series built before the event loop gets a turn: about 0.1 ms."""


@dataclass(frozen=True, slots=True)
class EventSeries:
    """Consecutive events of one type, one per step, built on demand in step order."""

    event_type: type[Event]
    steps: range
    build: Callable[[Iterable[int]], Sequence[Event]]


@dataclass(frozen=True, slots=True)
class Activation:
    """From here in the stream on, the training loop counts the events of this subscription."""

    subscription: Subscription


StreamItem = Event | EventSeries | Activation | Marker | Redelivery
"""What may be fed."""


class StreamHost(Protocol):
    """What the stream asks of its bus."""

    run_id: str
    clock: Clock
    routing: threading.RLock
    settled: Signal

    def settle(self) -> None:
        """Have everyone who waits look again."""
        ...

    def measure_headroom(self) -> None:
        """Queues were filled: how much may be published now?"""
        ...


class TrainingStream:
    """Numbers and delivers what is fed, at the pace of the slowest Lossless queue that wants it."""

    def __init__(self, host: StreamHost, roster: RoutingTable, most_rows: int) -> None:
        self._host = host
        self._roster = roster
        self._most_rows = most_rows
        self._items: deque[StreamItem] = deque()
        self._seq = 0
        self.rows_routed = 0
        """How many events of series, wanted or not, have been routed."""

    # --- the training loop's side: any thread, never blocks -------------------------------------------------

    def append(self, items: Iterable[StreamItem]) -> None:
        """Take items in, in their order. One caller at a time."""
        self._items.extend(items)

    def rows_allowed(self, kinds: Iterable[type[Event]]) -> int:
        """Up to which count (as in ``rows_routed``) rows that become events of ``kinds`` may be produced."""
        tightest = self.tightest(kinds)
        return self.rows_routed + (self._most_rows if tightest is None else self._rows_free(tightest))

    def tightest(self, kinds: Iterable[type[Event]]) -> Subscription | None:
        """The subscription to any of ``kinds`` whose Lossless queue has room for the fewest rows, if there is one."""
        kinds = tuple(kinds)
        bounded = [s for s in self._roster.bounded if any(s in self._roster.route(kind) for kind in kinds)]
        return min(bounded, key=self._rows_free, default=None)

    @staticmethod
    def _rows_free(subscription: Subscription) -> int:
        return max(0, subscription.queue.room() or 0) * subscription.options.every

    def waiting(self) -> int:
        """How many events have been fed and not yet routed."""
        return sum(len(i.steps) if isinstance(i, EventSeries) else 1 for i in list(self._items))

    def clear(self) -> None:
        """Forget what was not routed."""
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)

    # --- the event loop's side ------------------------------------------------------------------------------

    async def route(self, bell: Wakeup) -> None:
        """Deliver what is fed, for ever."""
        items = self._items
        while True:
            await bell.sleep_unless(lambda: len(items))
            item = items[0]  # it leaves only when it is delivered, so that nobody takes the stream for empty
            if isinstance(item, Activation):
                item.subscription.activate()
            elif isinstance(item, Marker):
                self._mark(item)
            elif isinstance(item, Redelivery):
                self._redeliver(item)
            elif isinstance(item, EventSeries):
                await self._deliver_series(item)
            else:
                await self._wait_for_room(type(item))
                self._deliver([item])
            items.popleft()
            self._host.settle()

    def _mark(self, marker: Marker) -> None:
        cut, roster = marker.cut, self._roster
        with self._host.routing:
            taking_part = [s for s in roster.active if s.takes_part]
            for name in roster.finished - {s.name for s in taking_part}:
                cut.give(name, SubscriptionState(spent=True))
            for subscription in roster.disabled:
                cut.give(subscription.name, SubscriptionState(disabled=True))
            for subscription in taking_part:
                subscription.mark(cut)
        cut.expect((s.name for s in taking_part), self._seq)

    def continue_from(self, seq: int) -> None:
        """Number what follows from ``seq + 1`` on, as the run did from whose cut this one resumes."""
        self._seq = max(self._seq, seq)

    def _redeliver(self, redelivery: Redelivery) -> None:
        with self._host.routing:
            for subscription in self._roster.active:
                if subscription.name == redelivery.name:
                    subscription.take_over(redelivery.share)
            self._host.measure_headroom()

    async def _deliver_series(self, series: EventSeries) -> None:
        steps = series.steps
        while steps:
            room = await self._wait_for_room(series.event_type)
            chunk, steps = steps[: min(room, BUILD_BATCH)], steps[min(room, BUILD_BATCH) :]
            with self._host.routing:
                wanted = [(s, s.choose(chunk)) for s in self._roster.route(series.event_type)]
                wanted = [(s, chosen) for s, chosen in wanted if chosen]
                if wanted:
                    self._deliver_chosen(series, chunk, wanted)
                    self._host.measure_headroom()
            self.rows_routed += len(chunk)
            if wanted:
                await checkpoint()

    def _deliver_chosen(
        self, series: EventSeries, chunk: range, wanted: list[tuple[Subscription, range]]
    ) -> None:
        needed: Iterable[int] = chunk
        if all(len(chosen) < len(chunk) for _, chosen in wanted):
            needed = sorted({step for _, chosen in wanted for step in chosen})
        events = series.build(needed)
        self._stamp(events)
        by_step = None
        for subscription, chosen in wanted:
            if len(chosen) == len(events):
                subscription.offer_from_loop(events)
            else:
                by_step = by_step or dict(zip(needed, events, strict=True))
                subscription.offer_from_loop([by_step[step] for step in chosen])

    def _deliver(self, events: Sequence[Event]) -> None:
        self._stamp(events)
        with self._host.routing:
            for subscription in self._roster.route(type(events[0])):
                subscription.offer_from_loop(events)
            self._host.measure_headroom()

    def _stamp(self, events: Sequence[Event]) -> None:
        now, run_id, seq = datetime.now(UTC), self._host.run_id, self._seq
        for event in events:
            seq += 1
            fields: Any = event.__dict__  # past the frozen model, as in inbox.py
            fields["seq"] = seq
            fields["time"] = now
            fields["run_id"] = run_id
        self._seq = seq

    async def _wait_for_room(self, kind: type[Event]) -> int:
        """Wait until every Lossless queue that wants ``kind`` takes one more; for how many rows there is room."""
        while (full := self._fullest(kind)) is not None and (full.queue.room() or 0) <= 0:
            handled = full.handled

            def moved_on(full: Subscription = full, handled: int = handled) -> bool:
                return full.state != "active" or full.handled != handled or (full.queue.room() or 0) > 0

            # The loop watches over its own rows; this one is for events that it does not count, such as those of
            # epochs, where it may be waiting for another subscriber behind this very event.
            with self._host.clock.timeout(full.stall_timeout_s) as patience:
                while not moved_on():
                    await self._host.settled.wait_unless(moved_on)
            if patience.cancelled_caught and not moved_on():
                full.stall(full.stall_timeout_s)
        return self._most_rows if full is None else full.queue.room() or 1

    def _fullest(self, kind: type[Event]) -> Subscription | None:
        wanting = self._roster.route(kind)
        return min(
            (s for s in self._roster.bounded if s in wanting), key=lambda s: s.queue.room() or 0, default=None
        )
