"""One subscription: its queue, its filter, its worker, and its end.

Threads. The worker runs on the event loop's thread. Events are put into the queue by the holder of the bus' routing
lock (``offer``, ``offer_from_loop``, ``restore``) and by ``redeliver``. Everything else may be called on any thread.
``state`` changes once, away from "active", under ``_lock``; it is read without a lock. ``run`` and ``worker.passed``
are written on the event loop's thread and read by the training thread, which relies on the order in ``activate``.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from anyio import CapacityLimiter

from eventtrain.bus.barrier import Barrier, SubscriptionCheckpoint
from eventtrain.bus.cancellation import failure_of, own_failure
from eventtrain.bus.clock import Clock
from eventtrain.bus.failures import DeadLetter, Failures
from eventtrain.bus.filters import EventFilter
from eventtrain.bus.handler_cost import HandlerCost
from eventtrain.bus.handlers import (
    Call,
    CommandTransaction,
    Handler,
    in_thread,
    settled,
    takes_control,
    with_control,
    with_retries,
    with_timeout,
)
from eventtrain.bus.options import Options
from eventtrain.bus.queues import Lossless, LosslessQueue
from eventtrain.bus.step_series import StepSeries
from eventtrain.bus.wakeup import CrossLoopCondition
from eventtrain.bus.worker import CountedEvent, SeriesHandler, Worker
from eventtrain.errors import ConfigurationError
from eventtrain.events import BUILT_IN, Event, SubscriberDisabled, SubscriberLagged
from eventtrain.validation.callables import is_async

logger = logging.getLogger("eventtrain")

State = Literal["active", "disabled", "cancelled", "finished"]
"""``disabled`` after failures, ``cancelled`` on request, ``finished`` when ``once`` is fulfilled."""

Save = Callable[[], Awaitable[SubscriptionCheckpoint]]
"""Returns state, about and error of what belongs to a checkpoint. Called on the bus' event loop."""


@dataclass(frozen=True)
class SubscriptionStatistics:
    """Figures of one subscription at one moment."""

    name: str
    state: State
    delivered: int
    """Events handled without an error."""
    errors: int
    """Failed attempts."""
    dropped: int
    """Events dropped by the queue."""
    pending: int
    """Events waiting or being handled."""
    lag_events: int
    """Number of events it is behind: ``pending``, and those that its queue dropped since the handler last took one."""
    lag_s: float
    """Age of the oldest waiting event, in seconds; 0.0 if none waits."""
    handler_wall_s: float
    handler_cpu_s: float
    longest_slice_s: float
    """The longest time that the handler held the event loop without suspending, in seconds."""


class SubscriptionHost(Protocol):
    """The bus, as its subscriptions see it."""

    clock: Clock
    progress: CrossLoopCondition

    @property
    def limiter(self) -> CapacityLimiter:
        """Limits the threads in which plain handlers run."""
        ...

    def notify(self, event: Event) -> None:
        """Publishes an event of the bus itself."""
        ...

    def has_subscribers(self, event_type: type[Event]) -> bool:
        """Whether any subscription receives events of this class."""
        ...

    def has_room_for_notice(self, event_type: type[Event], ahead: int = 0) -> bool:
        """Whether an event of this class passes no limit of a queue behind ``ahead`` others."""
        ...

    def begin_transaction(self, subscription: SubscriptionCore, event: Event) -> CommandTransaction:
        """Makes the control of one handler call."""
        ...

    def subscription_failed(self, subscription: SubscriptionCore, error: Exception) -> None:
        """A subscription with ``on_error="fail"`` failed."""
        ...

    def subscription_ended(self, subscription: SubscriptionCore) -> None:
        """The subscription receives nothing more."""
        ...


class Subscription:
    """One handler's subscription to a class of events. Returned by ``EventBus.subscribe``."""

    def __init__(self, core: SubscriptionCore) -> None:
        self._core = core

    @property
    def name(self) -> str:
        """Name in messages and statistics."""
        return self._core.name

    @property
    def active(self) -> bool:
        """Whether it still receives events."""
        return self._core.active

    @property
    def dead_letters(self) -> deque[DeadLetter]:
        """The last events whose handling failed for good, oldest first; at most 100."""
        return self._core.failures.dead_letters

    def cancel(self) -> None:
        """Ends the subscription: no further event is handled, a running handler finishes. Any thread; never blocks."""
        self._core.cancel()

    def redeliver(self) -> int:
        """Queues all dead letters once more, oldest first, and returns their number. Any thread.

        They go to the handler without asking ``where`` and the other filters. A training loop that waited for the
        first attempt does not count them again.

        Raises:
            ConfigurationError: the subscription has ended.
        """
        return self._core.redeliver()

    def statistics(self) -> SubscriptionStatistics:
        """Returns the figures of this moment. Any thread; never blocks."""
        return self._core.statistics()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subscription) and self._core is other._core

    def __hash__(self) -> int:
        return hash(self._core)

    def __repr__(self) -> str:
        types = " | ".join(event_type.__name__ for event_type in self._core.types)
        return f"<Subscription {self.name!r} to {types}, {self._core.state}>"


class SubscriptionCore:
    """One subscription, as the bus and the training loop see it. Users see ``Subscription``.

    Args:
        host: the bus.
        types: the event classes subscribed to.
        options: the checked options.
        name: unique among the subscriptions of the bus.
        index: grows in the order of subscribing; orders the commands of several handlers.
        handler: None for a stream, whose reader takes events from the queue itself.
        take_series: handles a ``StepSeries`` as ``handler`` would its events.
        save: gives the state that belongs to a checkpoint, if there is one.
    """

    def __init__(
        self,
        host: SubscriptionHost,
        types: tuple[type[Event], ...],
        options: Options,
        *,
        name: str,
        index: int,
        handler: Handler | None,
        take_series: SeriesHandler | None = None,
        save: Save | None = None,
    ) -> None:
        self.types = types
        self.options = options
        self.name = name
        self.index = index
        self.handler = handler
        self.queue = options.policy.open()
        self.cost = HandlerCost()
        self.filter = EventFilter(
            types,
            host.clock,
            every=options.every,
            every_s=options.every_s,
            where=options.where,
            once=options.once,
            lag=options.lag,
        )
        self.failures = Failures(name, host.notify, host.has_room_for_notice, host.has_subscribers)
        self.progress = host.progress
        self.state: State = "active"
        self.attached = False
        """Whether events are routed to it now. Those of a trainer are detached between its runs."""
        self.owner: object = None
        """The object that it belongs to, if not to the bus, such as a trainer."""
        self.cell: int | None = None
        """Number of the notebook cell that made it."""
        self.end_reason = ""
        """Why it has ended, as a whole clause."""
        self.run = 0
        """The run that counts the events with a finite lag; 0 before the first."""
        self._save = save
        self._reported_drops = 0
        self._host = host
        self._lock = threading.Lock()
        self.takes_series = (
            take_series is not None
            and isinstance(self.queue, LosslessQueue)
            and self.filter.takes_whole_series()
            and (options.concurrency, options.timeout_s, options.on_error == "retry") == (1, None, False)
        )
        """Whether steps come as ``StepSeries``, which no option forbids."""
        self.worker = Worker(self, self._assemble(handler), options.concurrency, take_series)

    def _assemble(self, handler: Handler | None) -> Call:
        if handler is None:
            return _read_by_a_stream
        options, host = self.options, self._host
        call, control = handler, takes_control(handler)
        if not is_async(handler):
            call = in_thread(handler, lambda: host.limiter, self.cost, options.concurrency)
        if control or options.timeout_s is not None or options.on_error == "retry":
            call = settled(call)
        if control:
            call = with_control(call, lambda event: host.begin_transaction(self, event))
        if options.timeout_s is not None:
            call = with_timeout(call, options.timeout_s, host.clock)
        if options.on_error == "retry":
            call = with_retries(
                call,
                options.retries,
                options.retry_delay_s,
                clock=host.clock,
                failed=self.failures.add_attempt,
                active=lambda: self.active,
            )
        return call

    # --- receiving events: by the holder of the bus' delivery lock ---------------------------------------------

    def offer(self, events: Sequence[Event]) -> None:
        """Queues those of these events, all of one class, that pass the filter."""
        if self.state == "active":
            passes_all = self.filter.passes_all
            self._put(events if passes_all else [event for event in events if self._passes(event)])

    def offer_from_loop(self, events: Sequence[Event]) -> None:
        """Like ``offer``, for events of the training loop, which counts those with a finite lag."""
        if self.filter.lag_for(type(events[0])) is None:
            self.offer(events)
        elif self.state == "active" and self.run:
            due = [event for event in events if self.filter.is_due(event)]
            self._put([CountedEvent(event if self._passes(event) else None, self.run) for event in due])

    def offer_series(self, series: StepSeries) -> None:
        """Queues a series, if it ``takes_series``. On the event loop's thread."""
        if self.state == "active":
            assert isinstance(self.queue, LosslessQueue)
            self.queue.put_series(series, len(series))
            self._put(())

    def _put(self, items: Iterable[Any]) -> None:
        self.queue.put(items)
        wakeup = self.worker.wakeup
        if wakeup is not None and wakeup.armed:
            wakeup.wake()

    def _passes(self, event: Event) -> bool:
        try:
            return self.filter.passes(event)
        except BaseException as error:  # of the user's `where`
            self._give_up(event, failure_of(error), attempt=1)
            return False

    def choose(self, steps: range) -> range:
        """Returns the steps, of these consecutive ones, whose events need to be built for this subscription."""
        if self.state != "active":
            return steps[:0]
        # Without a filter the queue decides in advance what it would drop; such events are not even built.
        return self.queue.choose(steps) if self.filter.passes_all else self.filter.due_steps(steps)

    def activate(self) -> None:
        """Begins to count events for a run, from this place in the stream. On the event loop's thread."""
        self.worker.passed = 0
        self.run += 1  # last: the training thread trusts ``passed`` once it sees this

    # --- checkpoints ------------------------------------------------------------------------------------------

    @property
    def in_checkpoints(self) -> bool:
        """Whether checkpoints need it: it has state or a finite lag, and its queue drops nothing."""
        return (self._save is not None or self.filter.decides) and self.queue.room() is not None

    def contribute_to(self, barrier: Barrier[Any]) -> None:
        """Contributes to ``barrier`` at the next handler boundary. On the event loop's thread, at the marker."""
        waiting, spent = self.queue.waiting(), self.filter.spent
        self.worker.at_boundary.append(lambda: self._contribute(barrier, waiting, spent))
        self.wake()

    async def _contribute(self, barrier: Barrier[Any], waiting: Iterable[Any], spent: bool) -> None:
        unhandled: list[Event] = []
        decided_on: list[bool] = []
        for item in waiting:
            counted = isinstance(item, CountedEvent)
            events = item.events() if isinstance(item, StepSeries) else [item.event if counted else item]
            for event in events:
                # Others cannot be read back from a checkpoint.
                if event is not None and type(event) in BUILT_IN:
                    unhandled.append(event)
                    decided_on.append(counted)
        saved = SubscriptionCheckpoint()
        try:
            if self._save is not None:
                saved = await self._save()
        except BaseException as error:
            # One broken subscriber must not stop all checkpoints. Without its state, events before it mean nothing.
            failure = own_failure(error)
            saved = SubscriptionCheckpoint(error=f"{type(failure).__name__}: {failure}")
            unhandled, decided_on = [], []
        checkpoint = replace(
            saved,
            unhandled=tuple(unhandled),
            decided_on=tuple(decided_on),
            spent=spent,
            disabled=self.state == "disabled",
            failures=self.failures.consecutive,
        )
        barrier.add(self.name, checkpoint)

    def restore(self, checkpoint: SubscriptionCheckpoint) -> None:
        """Continues from ``checkpoint``, behind the activation. On the event loop's thread."""
        self.filter.spent = checkpoint.spent
        self.failures.consecutive = checkpoint.failures
        if checkpoint.disabled:
            self.disable("failures before the checkpoint from which the run resumes")
        items = zip(checkpoint.unhandled, checkpoint.decided_on, strict=True)
        self._put([CountedEvent(event, self.run) if decided_on else event for event, decided_on in items])

    # --- failures -------------------------------------------------------------------------------------------

    def handler_failed(self, event: Event, error: Exception) -> None:
        """The handler failed on ``event`` for good."""
        self._give_up(event, error, self.options.retries + 1 if self.options.on_error == "retry" else 1)

    def series_failed(self, series: StepSeries, error: Exception) -> None:
        """The handler failed on ``series``. One failure, with a dead letter for each event."""
        events = series.events()
        self._give_up(events[0], error, 1, *events[1:])

    def _give_up(self, event: Event, error: Exception, attempt: int, *others: Event) -> None:
        options, failures = self.options, self.failures
        failures.add_attempt(event, error, attempt)
        failures.add_dead_letters((event, *others), error)
        if options.on_error == "fail":
            self._host.subscription_failed(self, error)
        if options.disable_after is not None and failures.consecutive >= options.disable_after:
            self.disable(
                f"{failures.consecutive} failures in a row, the last: {type(error).__name__}: {error}"
            )

    def report_drops(self) -> None:
        """Publishes ``SubscriberLagged`` for the events dropped since the last report, and failures not published yet.

        While there is no room for these notices they wait and are added up; at the end of the subscription they do not.
        """
        self.failures.notices.publish(at_once=not self.active)
        if self.active and not self._host.has_room_for_notice(SubscriberLagged):
            return
        with self._lock:
            dropped = self.queue.dropped - self._reported_drops
            self._reported_drops += dropped
        if dropped:
            self._host.notify(SubscriberLagged(subscriber=self.name, dropped=dropped))

    def redeliver(self) -> int:
        """See ``Subscription.redeliver``."""
        if self.state != "active":
            raise ConfigurationError(
                f"Cannot redeliver to {self.name}: it is {self.state}. Subscribe the handler again and publish "
                "copies of the events in its dead_letters."
            )
        letters = self.failures.take_dead_letters()
        self._put([letter.event for letter in letters])
        return len(letters)

    # --- the end --------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ends the subscription on request. Waiting events are forgotten."""
        if self._end("cancelled", "was cancelled"):
            self.queue.clear()
            self.report_drops()
            self.wake()

    def disable(self, reason: str) -> None:
        """Ends the subscription after failures. Waiting events count as dropped."""
        if self._end("disabled", f"was disabled after {reason}"):
            self.queue.drop_all()
            logger.error("Subscriber %s is disabled after %s", self.name, reason)
            self.report_drops()
            self._host.notify(SubscriberDisabled(subscriber=self.name, reason=reason))
            self.wake()

    def disable_stalled(self, waited_s: float) -> None:
        """Disables a subscription that handled nothing while training waited at the limit of its queue."""
        self.disable(
            f"it handled nothing for {waited_s:.1f} s while training waited at its limit of {len(self.queue)} events"
        )

    def finish(self) -> None:
        """Ends the subscription: ``once`` is fulfilled."""
        self._end("finished", "has received its only event")

    def _end(self, state: State, how: str) -> bool:
        with self._lock:
            if self.state != "active":
                return False
            self.end_reason = f"its subscription {how}"
            self.state = state
        self._host.subscription_ended(self)
        self.progress.notify_all()
        return True

    def wake(self) -> None:
        """Lets the worker or the stream's reader look at the subscription again."""
        if self.worker.wakeup is not None:
            self.worker.wakeup.wake()

    # --- figures ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state == "active"

    @property
    def served(self) -> bool:
        """Whether its worker must continue."""
        return self.attached and self.state == "active"

    @property
    def spent(self) -> bool:
        """Whether it has received its only event, because of ``once``."""
        return self.filter.spent

    @property
    def passed(self) -> int:
        """Number of counted events (those with a finite lag) that it has finished in this run."""
        return self.worker.passed

    @property
    def pending(self) -> int:
        """Number of events waiting or being handled."""
        return len(self.queue) + self.worker.in_flight + len(self.worker.at_boundary)

    @property
    def handled(self) -> int:
        """A number that grows with every handled event, whether handling succeeded or failed."""
        return self.worker.delivered + self.failures.attempts

    @property
    def stall_timeout_s(self) -> float:
        """Time that training waits for it at the limit of its queue."""
        policy = self.options.policy
        return policy.stall_timeout_s if isinstance(policy, Lossless) else float("inf")

    def statistics(self) -> SubscriptionStatistics:
        """See ``Subscription.statistics``."""
        oldest = self.queue.oldest()
        event = oldest.event if isinstance(oldest, CountedEvent) else oldest
        pending, dropped = self.pending, self.queue.dropped
        return SubscriptionStatistics(
            name=self.name,
            state=self.state,
            delivered=self.worker.delivered,
            errors=self.failures.attempts,
            dropped=dropped,
            pending=pending,
            lag_events=pending + (dropped - self.worker.drops_when_taken if pending else 0),
            lag_s=max(0.0, (datetime.now(UTC) - event.time).total_seconds()) if event is not None else 0.0,
            handler_wall_s=self.cost.wall_s,
            handler_cpu_s=self.cost.cpu_s,
            longest_slice_s=self.cost.longest_slice_s,
        )


async def _read_by_a_stream(event: Event) -> None:
    """Stands for the handler of a stream, which is never called."""
