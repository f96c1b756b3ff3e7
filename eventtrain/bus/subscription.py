"""One subscription: the queue its events wait in, the worker that hands them to the handler, and how it ends."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from anyio import CapacityLimiter

from eventtrain.bus.barrier import Barrier, SubscriptionState, can_be_stored
from eventtrain.bus.clock import Clock
from eventtrain.bus.failures import DeadLetter, Failures
from eventtrain.bus.filters import EventFilter
from eventtrain.bus.handler_cost import HandlerCost
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
from eventtrain.bus.options import EventTypes, Options, event_classes
from eventtrain.bus.queues import Lossless
from eventtrain.bus.worker import Gated, Worker, own_failure
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event, SubscriberDisabled, SubscriberLagged

logger = logging.getLogger("eventtrain")

State = Literal["active", "disabled", "cancelled", "finished"]
"""``disabled`` after failures, ``cancelled`` on request, ``finished`` when ``once`` is fulfilled."""


@dataclass(frozen=True)
class SubscriptionStatistics:
    """A moment's figures of one subscription."""

    name: str
    state: State
    delivered: int
    """Events handled without an error."""
    errors: int
    """Failed attempts."""
    dropped: int
    """Events that the queue let go."""
    pending: int
    """Events waiting or being handled."""
    lag_events: int
    """How many events it is behind: ``pending``, and what its queue dropped since the handler last took one."""
    lag_s: float
    """Age of the oldest waiting event, in seconds; 0.0 when none waits."""
    handler_wall_s: float
    handler_cpu_s: float
    longest_slice_s: float
    """The longest time the handler held the event loop without giving way, in seconds."""


class SubscriptionHost(Protocol):
    """What a subscription asks of its bus."""

    @property
    def clock(self) -> Clock:
        """Where time comes from."""
        ...

    @property
    def limiter(self) -> CapacityLimiter:
        """The limiter of the threads in which plain handlers run."""
        ...

    def notify(self, event: Event) -> None:
        """Publish on behalf of the bus."""
        ...

    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt:
        """Begin one handler call with a control."""
        ...

    def subscription_failed(self, subscription: Subscription, error: Exception) -> None:
        """End the run."""
        ...

    def settle(self) -> None:
        """Have everyone who waits look again."""
        ...

    def left(self, subscription: Subscription) -> None:
        """The subscription ended."""
        ...


class Subscription:
    """One handler's claim on a class of events. Made by ``EventBus.subscribe``."""

    def __init__(
        self,
        host: SubscriptionHost,
        event_type: EventTypes,
        handler: Handler | None,
        options: Options,
        index: int,
    ) -> None:
        self.types = event_classes(event_type)
        self.handler = handler
        self.name = options.name or (describe(handler) if handler is not None else f"stream-{index}")
        options.check(self.name, self.types)
        self.options = options
        self.index = index
        self.queue = options.queue.open()
        self.meter = HandlerCost()
        self.selection = EventFilter(self.types, options, host.clock)
        self.failures = Failures(host.notify)
        self.state: State = "active"
        self.run = 0
        """Which run counts the events with a finite lag; 0 before the first."""
        self.save: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
        """Gives the state that belongs into a checkpoint, as plain JSON data; on the bus' event loop."""
        self._reported_drops = 0
        self._host = host
        self._lock = threading.Lock()
        call = self._assemble(handler) if handler is not None else _nobody
        self.worker = Worker(self, call, self.meter, options.concurrency)

    def __repr__(self) -> str:
        return f"<Subscription {self.name!r} to {' | '.join(kind.__name__ for kind in self.types)}, {self.state}>"

    def _assemble(self, handler: Handler) -> Call:
        options, host = self.options, self._host
        call, control = handler, takes_control(handler)
        if not is_async(handler):
            call = in_thread(handler, lambda: host.limiter, self.meter, options.concurrency)
        if control:
            call = with_control(call, lambda event: host.open_attempt(self, event))
        if options.timeout_s is not None:
            call = with_timeout(call, options.timeout_s, host.clock)
        if options.on_error == "retry":
            call = with_retries(
                call, options.retries, options.retry_delay_s, host.clock, self._note, lambda: self.active
            )
        return call

    def lag_for(self, kind: type[Event]) -> int | None:
        """The lag that holds for events of class ``kind``: None, or that many steps."""
        return self.selection.lag_for(kind)

    # --- taking events in: by a holder of the bus' routing lock ---------------------------------------------

    def offer(self, events: Sequence[Event]) -> None:
        """Take in those of these published events of one class that it wants."""
        if self.state == "active":
            self._put([event for event in events if self._wants(event)] if self.selection.filters else events)

    def offer_from_loop(self, events: Sequence[Event]) -> None:
        """Take in events of one class from the training loop, which counts those with a finite lag."""
        if self.lag_for(type(events[0])) is None:
            self.offer(events)
        elif self.state == "active" and self.run:
            due = [event for event in events if self.selection.is_due(event)]
            self._put([Gated(event if self._wants(event) else None, self.run) for event in due])

    def _put(self, items: Iterable[Any]) -> None:
        self.queue.put_many(items)
        bell = self.worker.bell
        if bell is not None and bell.armed:
            bell.ring()

    def _wants(self, event: Event) -> bool:
        try:
            return self.selection.wants(event)
        except Exception as error:  # of the user's `where`
            self._give_up(event, error, attempt=1)
            return False

    def choose(self, steps: range) -> range:
        """Which of these consecutive steps' events need to be built for this subscription."""
        if self.state != "active":
            return steps[:0]
        # Without filters the queue says at once what it would drop; such events are not even built.
        return self.selection.due_steps(steps) if self.selection.filters else self.queue.choose(steps)

    def activate(self) -> None:
        """A run begins to count this subscription's events, from here in the stream on."""
        self.worker.passed = 0
        self.run += 1  # last: the loop believes ``passed`` once it sees this

    # --- cuts ---------------------------------------------------------------------------------------------------

    @property
    def takes_part(self) -> bool:
        """Whether a checkpoint needs it: it has state or a finite lag, and a queue that drops nothing."""
        return (self.save is not None or self.selection.decides) and self.queue.room() is not None

    def mark(self, cut: Barrier) -> None:
        """A marker has come: give the share at the next handler boundary. On the event loop's thread."""
        waiting, spent = self.queue.waiting(), self.selection.spent

        async def give() -> None:
            await self._give_share(cut, waiting, spent)

        self.worker.at_boundary.append(give)
        self.wake()

    async def _give_share(self, cut: Barrier, waiting: Iterable[Any], spent: bool) -> None:
        unhandled: list[Event] = []
        decided_on: list[bool] = []
        for item in waiting:
            event = item.event if isinstance(item, Gated) else item
            if event is not None and can_be_stored(event):
                unhandled.append(event)
                decided_on.append(isinstance(item, Gated))
        try:
            state = await self.save() if self.save is not None else None
        except BaseException as error:
            cut.fail(self.name, own_failure(error))
            return
        disabled, failures = self.state == "disabled", self.failures.consecutive
        cut.give(
            self.name,
            SubscriptionState(state, tuple(unhandled), tuple(decided_on), spent, disabled, failures),
        )

    def take_over(self, share: SubscriptionState) -> None:
        """Begin with what was not handled at a cut, behind the activation. On the event loop's thread."""
        self.selection.spent = share.spent
        self.failures.consecutive = share.failures
        if share.disabled:
            self.disable("failures before the checkpoint from which the run resumes")
        items = zip(share.unhandled, share.decided_on, strict=True)
        self._put([Gated(event, self.run) if decided_on else event for event, decided_on in items])

    # --- failures -------------------------------------------------------------------------------------------

    def _note(self, event: Event, error: Exception, attempt: int) -> None:
        self.failures.note_attempt(self.name, event, error, attempt)

    def failed(self, event: Event, error: Exception) -> None:
        """The handler failed on ``event`` for good; called by the worker."""
        self._give_up(event, error, self.options.retries + 1 if self.options.on_error == "retry" else 1)

    def _give_up(self, event: Event, error: Exception, attempt: int) -> None:
        options, failures = self.options, self.failures
        self._note(event, error, attempt)
        failures.give_up(event, error)
        if options.on_error == "fail":
            self._host.subscription_failed(self, error)
        if options.disable_after is not None and failures.consecutive >= options.disable_after:
            self.disable(
                f"{failures.consecutive} failures in a row, the last: {type(error).__name__}: {error}"
            )

    def report_drops(self) -> None:
        """Publish ``SubscriberLagged`` for what was dropped since the last report. Any thread."""
        with self._lock:
            dropped = self.queue.dropped - self._reported_drops
            self._reported_drops += dropped
        if dropped:
            self._host.notify(SubscriberLagged(subscriber=self.name, dropped=dropped))

    def redeliver(self) -> int:
        """Queue all dead letters once more, oldest first; returns how many. Any thread.

        They go to the handler without asking ``where`` and the like, and a loop that waited for the first attempt does
        not count them again.

        Raises:
            ConfigurationError: the subscription has ended, so nobody would handle them.
        """
        if self.state != "active":
            raise ConfigurationError(
                f"Cannot redeliver to {self.name}: it is {self.state}. Subscribe the handler anew and publish "
                "copies of the events in its dead_letters."
            )
        letters = self.failures.take_letters()
        self._put([letter.event for letter in letters])
        return len(letters)

    # --- the end --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the subscription: no further event is handled, a running handler finishes. Any thread; never blocks."""
        if self._end("cancelled"):
            self.queue.clear()
            self.report_drops()
            self.wake()

    def disable(self, reason: str) -> None:
        """Switch it off after failures: what waits is dropped and counted, and ``SubscriberDisabled`` says so."""
        if self._end("disabled"):
            self.queue.drop_all()
            logger.error("Subscriber %s is disabled after %s", self.name, reason)
            self.report_drops()
            self._host.notify(SubscriberDisabled(subscriber=self.name, reason=reason))
            self.wake()

    def stall(self, waited_s: float) -> None:
        """Training waited at the limit of its queue while it handled nothing: that is its failure."""
        self.disable(
            f"it handled nothing for {waited_s:.1f} s while training waited at its limit of {len(self.queue)} events"
        )

    def finish(self) -> None:
        """``once`` is fulfilled; called by the worker."""
        self._end("finished")

    def settle(self) -> None:
        """Tell whoever waits for progress; called by the worker."""
        self._host.settle()

    def _end(self, state: State) -> bool:
        with self._lock:
            if self.state != "active":
                return False
            self.state = state
        self._host.left(self)
        self._host.settle()
        return True

    def wake(self) -> None:
        """Have the worker or reader look again."""
        if self.worker.bell is not None:
            self.worker.bell.ring()

    # --- looking at it --------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether it still takes events."""
        return self.state == "active"

    @property
    def delivered(self) -> int:
        """Events handled without an error."""
        return self.worker.delivered

    @property
    def passed(self) -> int:
        """How many events that the loop counts (those with a finite lag) it is through with, in this run."""
        return self.worker.passed

    @property
    def pending(self) -> int:
        """Events waiting or being handled."""
        return len(self.queue) + self.worker.in_flight + len(self.worker.at_boundary)

    @property
    def errors(self) -> int:
        """Failed attempts."""
        return self.failures.attempts

    @property
    def handled(self) -> int:
        """Grows whenever it got done with something, well or badly."""
        return self.worker.delivered + self.failures.attempts

    @property
    def timed_out(self) -> bool:
        """Whether an attempt ever exceeded ``timeout_s``: what it decides is then no longer reproducible."""
        return self.failures.timed_out

    @property
    def dead_letters(self) -> deque[DeadLetter]:
        """The last events whose handling failed for good, oldest first; at most 100."""
        return self.failures.dead_letters

    @property
    def stall_timeout_s(self) -> float:
        """How long training waits for it at its limit."""
        queue = self.options.queue
        return queue.stall_timeout_s if isinstance(queue, Lossless) else float("inf")

    def statistics(self) -> SubscriptionStatistics:
        """The figures of this moment. Any thread; never blocks."""
        oldest = self.queue.oldest()
        event = oldest.event if isinstance(oldest, Gated) else oldest
        pending, dropped = self.pending, self.queue.dropped
        return SubscriptionStatistics(
            name=self.name,
            state=self.state,
            delivered=self.delivered,
            errors=self.errors,
            dropped=dropped,
            pending=pending,
            lag_events=pending + (dropped - self.worker.drops_when_taken if pending else 0),
            lag_s=max(0.0, (datetime.now(UTC) - event.time).total_seconds()) if event is not None else 0.0,
            handler_wall_s=self.meter.wall_s,
            handler_cpu_s=self.meter.cpu_s,
            longest_slice_s=self.meter.longest_slice_s,
        )


async def _nobody(event: Event) -> None:
    """The handler of a stream, whose reader takes from the queue itself."""
