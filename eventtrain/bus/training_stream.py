"""Training stream: the events of the training loop, in its order.

They come as ready events, and as series whose events are built only if a subscription wants them. Everything in front
of a marker or an activation is delivered before it takes effect.

Threads. One thread at a time appends (``append``), without a lock: the deque is atomic. The event loop's thread routes.
``rows_routed`` is written there and read by the training thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from weakref import ref

from anyio.lowlevel import checkpoint

from eventtrain.bus.barrier import Marker, SubscriptionCheckpoint, SubscriptionRestore
from eventtrain.bus.clock import Clock
from eventtrain.bus.publish_queue import PublishQueue
from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.step_series import StepColumns, StepSeries, stamp
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopCondition, Wakeup
from eventtrain.events import Event

BUILD_BATCH = 64
"""Events of a series built before the event loop gets a turn: about 0.1 ms."""


@dataclass(frozen=True, slots=True)
class EventSeries:
    """Consecutive events of one class, one per step, built on demand in the order of steps."""

    event_type: type[Event]
    steps: range
    build: Callable[[Sequence[int]], Sequence[Event]]
    columns: StepColumns | None = None
    """Their metrics, for handlers that take a ``StepSeries``."""


@dataclass(frozen=True, slots=True)
class Activation:
    """The place in the stream from which the training loop counts the events of ``subscription``."""

    subscription: SubscriptionCore


StreamItem = Event | EventSeries | Activation | Marker | SubscriptionRestore
"""Anything that may be appended."""


class TrainingStream:
    """Numbers and delivers events at the pace of the slowest Lossless queue that wants them.

    Args:
        table: finds the subscriptions to an event.
        publish_queue: told when events were put into queues past it.
        progress: notified by the queues' workers, and by the stream when an item was delivered.
        clock: measures how long the stream waits for a subscription.
        blocked_s: returns for how long the event loop was blocked so far. A subscription is not blamed for that time.
        most_rows: how many steps the training loop may be ahead if no Lossless queue limits it.
    """

    def __init__(
        self,
        table: RoutingTable,
        publish_queue: PublishQueue,
        progress: CrossLoopCondition,
        *,
        clock: Clock,
        blocked_s: Callable[[], float],
        most_rows: int,
    ) -> None:
        self._table = table
        self._publish_queue = publish_queue
        self._progress = progress
        self._clock = clock
        self._blocked_s = blocked_s
        self._most_rows = most_rows
        self._items: deque[StreamItem] = deque()
        self.seq = 0
        """Number of the last event that was delivered."""
        # Weak: a stream without events would keep the subscriptions of a trainer that is gone.
        self._overfull: tuple[ref[SubscriptionCore], ...] = ()
        self.rows_routed = 0
        """Number of events of series that were routed, whether wanted or not."""

    # --- the training loop: any thread, never blocks ----------------------------------------------------------

    def append(self, items: Iterable[StreamItem]) -> None:
        """Adds items in their order. One caller at a time."""
        self._items.extend(items)

    def rows_allowed(self, event_types: Iterable[type[Event]]) -> int:
        """Returns the value of ``rows_routed`` up to which rows that become events of these classes may be produced."""
        fullest = self.fullest(event_types)
        return self.rows_routed + (self._most_rows if fullest is None else _free_rows(fullest))

    def fullest(self, event_types: Iterable[type[Event]]) -> SubscriptionCore | None:
        """Returns the subscription to any of these classes with room for the fewest rows, if a queue is bounded.

        One whose queue is beyond its limit, since the stream does not wait for single events, comes first.
        """
        if self._overfull and (overfull := self._overfull_now()):
            return overfull[0]
        bounded = (s for event_type in event_types for s in self._table.bounded_route(event_type))
        return min(bounded, key=_free_rows, default=None)

    @property
    def overfull(self) -> bool:
        """Whether single events have filled a queue beyond its limit."""
        return bool(self._overfull) and bool(self._overfull_now())

    def _overfull_now(self) -> tuple[SubscriptionCore, ...]:
        found = (known() for known in self._overfull)
        return tuple(s for s in found if s is not None and s.active and _room(s) < 0)

    def continue_from(self, seq: int) -> None:
        """Numbers the next event ``seq + 1``, as the run that is resumed would have done."""
        self.seq = max(self.seq, seq)

    def unrouted(self) -> int:
        """Returns the number of events that were appended and not routed yet."""
        return sum(len(i.steps) if isinstance(i, EventSeries) else 1 for i in list(self._items))

    def clear(self) -> None:
        """Removes everything that was not routed."""
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)

    # --- the event loop's thread ------------------------------------------------------------------------------

    async def route(self, wakeup: Wakeup) -> None:
        """Delivers the items, forever."""
        items = self._items
        while True:
            await wakeup.sleep_until(lambda: len(items))
            await self._deliver(items[0])  # removed behind it, so that the stream does not look empty before
            items.popleft()
            self._progress.notify_all()
            await wakeup.let_others_run()

    async def _deliver(self, item: StreamItem) -> None:
        if isinstance(item, Activation):
            item.subscription.activate()
        elif isinstance(item, Marker):
            self._pass_marker(item)
        elif isinstance(item, SubscriptionRestore):
            self._restore(item)
        elif isinstance(item, EventSeries):
            await self._deliver_series(item)
        else:
            # Never waits: the events behind this one may be for others, who have room. The training loop waits
            # instead, before its next step, so that a queue exceeds its limit by the events of one step.
            with self._table.delivery_lock:
                self.seq += 1
                queue = self._publish_queue
                stamp(item, self.seq, datetime.now(UTC), queue.run_id, queue.attempt)
                for subscription in self._table.route(type(item)):
                    subscription.offer_from_loop([item])
                bounded = self._table.bounded_route(type(item))
                if any(_room(subscription) < 0 for subscription in bounded):
                    self._overfull = tuple(map(ref, dict.fromkeys((*self._overfull_now(), *bounded))))
                self._publish_queue.measure_headroom()

    def _pass_marker(self, marker: Marker) -> None:
        barrier, table = marker.barrier, self._table
        with table.delivery_lock:
            expected = [s for s in table.active if s.in_checkpoints]
            for name in table.finished - {s.name for s in expected}:
                barrier.add(name, SubscriptionCheckpoint(spent=True))
            for subscription in table.disabled:
                barrier.add(subscription.name, SubscriptionCheckpoint(disabled=True))
            for subscription in expected:
                subscription.contribute_to(barrier)
        barrier.expect((s.name for s in expected), self.seq)

    def _restore(self, restore: SubscriptionRestore) -> None:
        with self._table.delivery_lock:
            for subscription in self._table.active:
                if subscription.name == restore.name:
                    subscription.restore(restore.checkpoint)
            self._publish_queue.measure_headroom()

    async def _deliver_series(self, series: EventSeries) -> None:
        steps = series.steps
        while steps:
            room = await self._wait_for_room(series.event_type)
            if series.columns is None or not all(
                s.takes_series for s in self._table.route(series.event_type)
            ):
                room = min(room, BUILD_BATCH)
            chunk, steps = steps[:room], steps[room:]
            self._items[0] = replace(series, steps=steps)
            with self._table.delivery_lock:
                choices = [(s, s.choose(chunk)) for s in self._table.route(series.event_type)]
                choices = [(s, chosen) for s, chosen in choices if chosen]
                if choices:
                    self._deliver_chosen(series, chunk, choices)
                    self._publish_queue.measure_headroom()
            self.rows_routed += len(chunk)
            if choices and steps:
                await checkpoint()

    def _deliver_chosen(
        self, series: EventSeries, chunk: range, choices: list[tuple[SubscriptionCore, range]]
    ) -> None:
        wanted = _union(chunk, [chosen for _, chosen in choices])
        first, now = self.seq + 1, datetime.now(UTC)
        run_id, attempt = self._publish_queue.run_id, self._publish_queue.attempt
        self.seq += len(wanted)

        def seqs(steps: Sequence[int]) -> Sequence[int]:
            if len(steps) == len(wanted):
                return range(first, first + len(wanted))
            places = {step: seq for seq, step in enumerate(wanted, first)}
            return [places[step] for step in steps]

        if (columns := series.columns) is not None:
            for subscription, chosen in choices:
                if subscription.takes_series:
                    whole = StepSeries(columns, chosen, seqs(chosen), now, run_id, attempt, series.build)
                    subscription.offer_series(whole)
            choices = [choice for choice in choices if not choice[0].takes_series]
            if not choices:
                return
        built = _union(chunk, [chosen for _, chosen in choices])
        events = series.build(built)
        for event, seq in zip(events, seqs(built), strict=True):
            stamp(event, seq, now, run_id, attempt)
        by_step = None
        for subscription, chosen in choices:
            if len(chosen) == len(events):
                subscription.offer_from_loop(events)
            else:
                by_step = by_step or dict(zip(built, events, strict=True))
                subscription.offer_from_loop([by_step[step] for step in chosen])

    async def _wait_for_room(self, event_type: type[Event]) -> int:
        """Waits until every Lossless queue that wants ``event_type`` has room; returns for how many events."""
        while fullest := min(self._table.bounded_route(event_type), key=_room, default=None):
            room, handled = _room(fullest), fullest.handled
            if room > 0:
                return room

            def has_moved(fullest: SubscriptionCore = fullest, handled: int = handled) -> bool:
                return not fullest.active or fullest.handled != handled or _room(fullest) > 0

            # The training loop watches over its own rows. This timeout is for events that it does not count, such as
            # those of epochs: there it may be waiting for another subscription, behind this very event.
            blocked_s, left_s = self._blocked_s(), fullest.stall_timeout_s
            while left_s > 0 and not has_moved():
                with self._clock.timeout(left_s):
                    await self._progress.wait_until(has_moved)
                left_s, blocked_s = self._blocked_s() - blocked_s, self._blocked_s()
            if not has_moved():
                fullest.disable_stalled(fullest.stall_timeout_s)
        return self._most_rows


def _union(chunk: range, chosen: Sequence[range]) -> Sequence[int]:
    """Returns the steps of ``chunk`` that any of these has, in order."""
    if any(len(steps) == len(chunk) for steps in chosen):
        return chunk
    return chosen[0] if len(chosen) == 1 else sorted({step for steps in chosen for step in steps})


def _room(subscription: SubscriptionCore) -> int:
    return subscription.queue.room() or 0


def _free_rows(subscription: SubscriptionCore) -> int:
    """Returns the number of rows, every ``every``-th of which becomes an event, that fit into the queue."""
    return max(0, _room(subscription)) * subscription.options.every
