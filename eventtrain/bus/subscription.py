"""One subscription: which events it wants, the queue they wait in, and the worker that hands them to the handler."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic, perf_counter
from typing import Any, Literal, NamedTuple, Protocol

from anyio import CapacityLimiter
from anyio.lowlevel import checkpoint

from eventtrain.bus.handlers import (
    Attempt,
    Call,
    Handler,
    describe,
    in_thread,
    is_async,
    takes_control,
    with_control,
    with_retries,
    with_timeout,
)
from eventtrain.bus.meter import Meter, metered
from eventtrain.bus.queues import Lossless
from eventtrain.bus.options import EventTypes, Options, event_classes
from eventtrain.bus.wake import Doorbell, LoopThread
from eventtrain.events import (
    LOOP_EVENTS,
    Event,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
)

logger = logging.getLogger("eventtrain")

SLICE_TARGET_S = 0.0005
"""How long a worker goes from event to event before it gives way to other tasks and to the GIL's waiters."""
DEAD_LETTERS = 100
"""How many failed events a subscription keeps for inspection."""
NOTICES = (SubscriberFailed, SubscriberLagged)
"""Failures in handling these are counted and logged only; an event about them would beget itself."""


class DeadLetter(NamedTuple):
    """An event whose handling failed for good, and why."""

    event: Event
    error: Exception


@dataclass(frozen=True)
class SubscriptionStatistics:
    """A moment's figures of one subscription."""

    name: str
    state: Literal["active", "disabled", "cancelled"]
    delivered: int
    """Events handled without an error."""
    errors: int
    """Failed attempts."""
    dropped: int
    """Events that the queue let go."""
    pending: int
    """Events waiting or being handled."""
    lag_s: float
    """Age of the oldest waiting event, in seconds; 0.0 when none waits."""
    handler_wall_s: float
    handler_cpu_s: float
    longest_slice_s: float
    """The longest time the handler held the event loop without giving way, in seconds."""


class Host(Protocol):
    """What a subscription asks of its bus."""

    limiter: CapacityLimiter

    def notify(self, event: Event) -> None: ...
    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt: ...
    def subscription_failed(self, subscription: Subscription, error: Exception) -> None: ...
    def settled(self, subscription: Subscription) -> None: ...
    def left(self, subscription: Subscription) -> None: ...


class _Gated(NamedTuple):
    """An item of a finite-lag subscription that the loop counts too; ``event`` is None where ``where`` said no."""

    event: Event | None


class Subscription:
    """One handler's claim on a class of events. Made by ``EventBus.subscribe``."""

    def __init__(self, host: Host, event_type: EventTypes, handler: Handler | None, options: Options, index: int) -> None:
        self.types = event_classes(event_type)
        self.handler = handler
        self.name = options.name or (describe(handler) if handler is not None else f"stream-{index}")
        options.check(self.name, self.types)
        self.options = options
        self.index = index
        self.queue = options.queue.open()
        self.meter = Meter()
        self.state: Literal["active", "disabled", "cancelled"] = "active"
        self.delivered = 0
        self.errors = 0
        self.in_flight = 0
        self._counted = False
        self.passed = 0
        """How many events that the loop counts (those with a finite lag) this subscription is through with."""
        self.timed_out = False
        """A decider exceeded its ``timeout_s``: what it decides is no longer reproducible."""
        self.dead_letters: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS)
        self.bell: Doorbell | None = None
        self._host = host
        self._consecutive_failures = 0
        self._reported_drops = 0
        self._last_delivery_s = -float("inf")
        self._burst = 1
        self._lock = threading.Lock()
        self._lags: dict[type[Event], int | None] = {}
        self._filtered = options.every > 1 or options.every_s is not None or options.where is not None or options.once
        self.decides = any(self.lag_for(kind) is not None for kind in self.types) or isinstance(options.lag, Mapping)
        self._call = self._assemble(handler) if handler is not None else None

    def __repr__(self) -> str:
        return f"<Subscription {self.name!r} to {' | '.join(kind.__name__ for kind in self.types)}, {self.state}>"

    def _assemble(self, handler: Handler) -> Call:
        control = takes_control(handler)
        call = handler if is_async(handler) else in_thread(handler, self._host.limiter, self.meter)
        if control:
            call = with_control(call, lambda event: self._host.open_attempt(self, event))
        if self.options.timeout_s is not None:
            call = with_timeout(call, self.options.timeout_s)
        if self.options.on_error == "retry":
            call = with_retries(call, self.options.retries, self.options.retry_delay_s, self._attempt_failed)
        return call

    # --- which events -----------------------------------------------------------------------------------

    def lag_for(self, kind: type[Event]) -> int | None:
        """The lag that holds for events of class ``kind``; a mapping is searched along the MRO."""
        if kind not in self._lags:
            lag = self.options.lag
            if isinstance(lag, Mapping):
                lag = next((lag[base] for base in kind.__mro__ if base in lag), None)
            elif not issubclass(kind, LOOP_EVENTS):
                lag = None
            self._lags[kind] = lag
        return self._lags[kind]

    def _wants(self, event: Event) -> bool:
        options = self.options
        if options.every > 1 and not event.is_multiple_of(options.every):
            return False
        if options.every_s is not None:
            now_s = monotonic()
            if now_s - self._last_delivery_s < options.every_s:
                return False
        if options.where is not None:
            try:
                if not options.where(event):
                    return False
            except Exception as error:
                self._failed(event, error)
                return False
        if options.every_s is not None:
            self._last_delivery_s = monotonic()
        if options.once:
            self._host.left(self)
        return True

    # --- taking events in: the event loop's thread, or a holder of the routing lock ----------------------

    def offer(self, event: Event) -> None:
        """Take one event in, if this subscription wants it."""
        if self.state != "active" or (self._filtered and not self._wants(event)):
            return
        self.queue.put(event)
        if self.bell is not None and self.bell.armed:
            self.bell.ring()

    def offer_from_loop(self, events: list[Event]) -> None:
        """Take in events of one type from the training loop, which counts those with a finite lag."""
        if self.state != "active":
            return
        if self.decides and self.lag_for(type(events[0])) is not None:
            if not self._counted:
                return
            every = self.options.every
            due = events if every == 1 else [event for event in events if event.is_multiple_of(every)]
            chosen: Iterable[Any] = [_Gated(event if self._wants(event) else None) for event in due]
        elif self._filtered:
            chosen = [event for event in events if self._wants(event)]
        else:
            chosen = events
        self.queue.put_many(chosen)
        if self.bell is not None and self.bell.armed:
            self.bell.ring()

    def choose(self, steps: range) -> range:
        """Which of these consecutive steps' events need to be built for this subscription."""
        if self.state != "active":
            return steps[:0]
        options = self.options
        if options.every > 1:
            first = -(-steps.start // options.every) * options.every
            return range(first, steps.stop, options.every)
        return steps if self._filtered else self.queue.choose(steps)

    # --- the worker ---------------------------------------------------------------------------------------

    def activate(self) -> None:
        """A run begins to count this subscription's events, from here in the stream on."""
        self.passed = 0
        self._counted = True

    def attach(self, loop: LoopThread) -> None:
        """Bind to the event loop that will run the worker, on that loop's thread."""
        self.bell = Doorbell(loop)

    async def work(self) -> None:
        """Hand events to the handler until the subscription ends or the task is cancelled."""
        await metered(self._work(), self.meter)

    async def _work(self) -> None:
        assert self.bell is not None and self._call is not None
        queue, take, bell, call = self.queue, self.queue.take, self.bell, self._call
        while True:
            if not queue:
                self._host.settled(self)
                if self.state != "active":
                    return
                await bell.sleep_unless(lambda: len(queue) or self.state != "active")
                continue
            began = perf_counter()
            self.in_flight += 1
            try:
                count = 0
                while count < self._burst and queue:
                    event = take()
                    count += 1
                    if type(event) is _Gated:
                        await self._decide(event.event)
                        continue
                    try:
                        await call(event)
                    except Exception as error:
                        self._failed(event, error)
                    else:
                        self.delivered += 1
                        self._consecutive_failures = 0
            finally:
                self.in_flight -= 1
            elapsed = perf_counter() - began
            self.meter.wall_s += elapsed
            # Grow while bursts are short, so that cheap handlers pay for one clock reading in many events; shrink
            # at once for expensive ones, so that nobody else waits behind a burst of them.
            self._burst = min(self._burst * 2, 512) if elapsed < SLICE_TARGET_S / 2 else max(1, self._burst // 2)
            if elapsed > 8 * SLICE_TARGET_S:
                self._burst = 1
            self._host.settled(self)
            await checkpoint()

    async def _decide(self, event: Event | None) -> None:
        """Handle an event that the loop may be waiting for, and say that this subscription is through with it."""
        assert self._call is not None
        try:
            if event is not None:
                await self._call(event)
                self.delivered += 1
                self._consecutive_failures = 0
        except Exception as error:
            assert event is not None
            if isinstance(error, TimeoutError) and self.options.timeout_s is not None:
                self.timed_out = True
            self._failed(event, error)
        self.passed += 1
        self._host.settled(self)

    # --- failures -------------------------------------------------------------------------------------------

    def _attempt_failed(self, event: Event, error: Exception, attempt: int) -> None:
        self.errors += 1
        logger.error(
            "Subscriber %s failed on %s of step %d (attempt %d): %s: %s",
            self.name, event.kind, event.step, attempt, type(error).__name__, error,
            exc_info=error if self.errors == 1 else None,
        )  # fmt: skip
        if not isinstance(event, NOTICES):
            self._host.notify(
                SubscriberFailed(
                    step=event.step,
                    subscriber=self.name,
                    event_kind=event.kind,
                    error=f"{type(error).__name__}: {error}",
                    attempt=attempt,
                )
            )

    def _failed(self, event: Event, error: Exception) -> None:
        attempts = self.options.retries + 1 if self.options.on_error == "retry" else 1
        self._attempt_failed(event, error, attempts)
        self.dead_letters.append(DeadLetter(event, error))
        self._consecutive_failures += 1
        if self.options.on_error == "fail":
            self._host.subscription_failed(self, error)
        limit = self.options.disable_after
        if limit is not None and self._consecutive_failures >= limit:
            self.disable(f"{self._consecutive_failures} failures in a row, the last: {type(error).__name__}: {error}")

    def report_drops(self) -> None:
        """Publish ``SubscriberLagged`` for what was dropped since the last report."""
        dropped = self.queue.dropped - self._reported_drops
        if dropped:
            self._reported_drops = self.queue.dropped
            self._host.notify(SubscriberLagged(subscriber=self.name, dropped=dropped))

    # --- the end ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the subscription: no further event is handled, a running handler finishes. Any thread; never blocks."""
        self._end("cancelled")
        self.queue.clear()
        self._wake()

    def disable(self, reason: str) -> None:
        """Switch it off after failures: what waits is dropped and counted, and ``SubscriberDisabled`` says so."""
        if self._end("disabled"):
            self.queue.dropped += self.queue.clear()
            logger.error("Subscriber %s is disabled after %s", self.name, reason)
            self._host.notify(SubscriberDisabled(subscriber=self.name, reason=reason))
            self._wake()

    def finish(self) -> None:
        """Take nothing more in, handle what waits, then end."""
        self._end("cancelled")
        self._wake()

    def _end(self, state: Literal["disabled", "cancelled"]) -> bool:
        with self._lock:
            if self.state != "active":
                return False
            self.state = state
        self._host.left(self)
        self._host.settled(self)
        return True

    def _wake(self) -> None:
        if self.bell is not None:
            self.bell.ring()

    # --- looking at it --------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Events waiting or being handled."""
        return len(self.queue) + self.in_flight

    @property
    def handled(self) -> int:
        """Events it got done with, well or badly."""
        return self.delivered + self.errors

    @property
    def stall_timeout_s(self) -> float:
        """How long training waits for it at its limit."""
        queue = self.options.queue
        return queue.stall_timeout_s if isinstance(queue, Lossless) else float("inf")

    def stall(self, waited_s: float) -> None:
        """Training waited at the limit of its queue while it handled nothing: that is its failure."""
        self.disable(f"it handled nothing for {waited_s:.1f} s while training waited at its limit of {len(self.queue)} events")

    def redeliver(self) -> int:
        """Queue all dead letters once more, oldest first; returns how many. Call it on the bus' event loop."""
        letters = list(self.dead_letters)
        self.dead_letters.clear()
        for letter in letters:
            self.queue.put(letter.event)
        self._wake()
        return len(letters)

    def statistics(self) -> SubscriptionStatistics:
        """The figures of this moment. Any thread; never blocks."""
        oldest = self.queue.oldest()
        event = oldest.event if isinstance(oldest, _Gated) else oldest
        lag_s = max(0.0, (datetime.now(UTC) - event.time).total_seconds()) if event is not None else 0.0
        return SubscriptionStatistics(
            name=self.name,
            state=self.state,
            delivered=self.delivered,
            errors=self.errors,
            dropped=self.queue.dropped,
            pending=self.pending,
            lag_s=lag_s,
            handler_wall_s=self.meter.wall_s,
            handler_cpu_s=self.meter.cpu_s,
            longest_slice_s=self.meter.longest_slice_s,
        )
