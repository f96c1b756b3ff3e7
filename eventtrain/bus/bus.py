"""The event bus: publish from any thread, one queue and one worker per subscription, nobody waits for anybody.

Two ways lead in. ``publish`` appends to an inbox that the event loop routes; ``feed`` takes what the training loop
has to say, in step order (``training_stream.py``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from anyio.abc import TaskStatus
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from eventtrain.bus.clock import Clock
from eventtrain.bus.event_stream import EventStream, require_no_wait_for_itself
from eventtrain.bus.handlers import Attempt, Handler, takes_control
from eventtrain.bus.options import EventTypes, Lag, OnError, Options, event_classes
from eventtrain.bus.publish_queue import PublishQueue
from eventtrain.bus.queues import Lossless, Queue
from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.runner import BusRunner
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.bus.training_stream import Activation, EventSeries, StreamItem, TrainingStream
from eventtrain.bus.wakeup import Signal
from eventtrain.bus.watchdog import Watchdog
from eventtrain.errors import BusClosed, ConfigurationError, QueueFull, SubscriberError
from eventtrain.events import Event

__all__ = ["Activation", "ControlSource", "EventBus", "EventSeries"]

logger = logging.getLogger("eventtrain")

E = TypeVar("E", bound=Event)
T = TypeVar("T")

LAG_REPORT_S = 1.0
"""How often what queues dropped is said."""


class ControlSource(Protocol):
    """Gives each handler call its control: the training side of the bus."""

    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt:
        """Begin one handler call."""
        ...


class EventBus:
    """An asynchronous event bus on asyncio, uvloop or trio.

    ::

        async with EventBus() as bus:
            @bus.on(Temperature)
            async def report(event: Temperature) -> None: ...
            bus.publish(Temperature(celsius=21.5))

    Each subscription receives its events in publication order, whatever other subscriptions do. Leaving the ``async
    with`` block drains: everything published is handled first, within ``drain_timeout_s``.

    Args:
        run_id: stamped on events that carry none.
        buffer_limit: how many events may wait unrouted, also before the bus is started.
        drain_timeout_s: how long leaving the block waits for handlers.
        block_warning_s: a handler that holds the event loop longer is named in a warning.
        cpu_budget: share of one CPU core; a handler that uses more over a second is named in a warning.
        clock: where time comes from; tests pass ``eventtrain.testing.FakeClock()``.
    """

    def __init__(
        self,
        *,
        run_id: str = "",
        buffer_limit: int = 65_536,
        drain_timeout_s: float = 30.0,
        block_warning_s: float = 0.25,
        cpu_budget: float = 0.25,
        clock: Clock | None = None,
    ) -> None:
        self.run_id = run_id
        self.clock = clock if clock is not None else Clock()
        self.failure: SubscriberError | None = None
        self.on_progress: Callable[[], object] | None = None
        """Called when a worker got on, a subscription ended or the bus failed, on the thread where that happened."""
        self.routing = threading.RLock()
        """Held by whoever hands events to queues: the event loop, or a publisher that makes room."""
        self.settled = Signal()
        """Pulsed with every progress."""
        self._control_source: ControlSource | None = None
        self._drain_timeout_s = drain_timeout_s
        self._block_warning_s = block_warning_s
        self._cpu_budget = cpu_budget
        self._roster = RoutingTable()
        self._inbox = PublishQueue(self, self._roster, self._join, buffer_limit)
        self._stream = TrainingStream(self, self._roster, buffer_limit)
        self._serving: BusRunner | None = None
        self._claimed = False
        self._readers: set[EventStream] = set()
        self._exit_stack: AsyncExitStack | None = None

    # --- publishing -----------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Hand ``event`` to the bus. Any thread, also from inside handlers; never blocks.

        Before the bus is started events are kept, for those who have subscribed by then. The bus stamps ``run_id``,
        ``seq`` and ``time`` before delivery.

        Raises:
            QueueFull: a Lossless queue that wants it is at its limit (or the buffer is); nothing was published.
            EventReused: this very instance was published before.
            BusClosed: the bus was closed.
        """
        self._inbox.publish(event)

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. Any event loop.

        Cancelled while waiting: the event was not published.
        """
        await checkpoint_if_cancelled()
        inbox = self._inbox
        while True:
            try:
                inbox.publish(event)
            except QueueFull:
                await self.settled.wait_unless(lambda: inbox.closed or inbox.full_for(event) is None)
            else:
                return await cancel_shielded_checkpoint()

    def notify(self, event: Event) -> None:
        """Publish on behalf of the bus itself: never refused, so that no failure stays unsaid."""
        self._inbox.notify(event)

    def measure_headroom(self) -> None:
        """Queues were filled past the inbox: how much may be published before somebody has to look?"""
        self._inbox.measure_headroom()

    # --- subscribing ----------------------------------------------------------------------------------------

    def subscribe(
        self,
        event_type: EventTypes,
        handler: Handler,
        *,
        every: int = 1,
        every_s: float | None = None,
        where: Callable[[Any], bool] | None = None,
        once: bool = False,
        queue: Queue | None = None,
        lag: Lag = None,
        concurrency: int = 1,
        on_error: OnError = "isolate",
        retries: int = 3,
        retry_delay_s: float = 0.1,
        disable_after: int | None = 100,
        timeout_s: float | None = None,
        name: str | None = None,
    ) -> Subscription:
        """Call ``handler`` for events of ``event_type``. Any thread; never blocks.

        Args:
            event_type: a class, a base class (``Event`` is everything) or a union.
            handler: ``(event)`` or ``(event, control)``; async, or a plain function, which runs in a worker thread.
            every: only where ``step % every == 0`` (epoch events: ``(epoch + 1) % every == 0``).
            every_s: at most one event in so many seconds.
            where: a predicate ``event -> bool``; it runs on the event loop.
            once: only the first such event, then the subscription ends.
            queue: ``Lossless()`` unless given; ``KeepLatest()``, ``DropOldest(n)``, ``DropNewest(n)``.
            lag: when commands take effect: None as soon as they arrive, L exactly L steps after the event, 0 before the
                next step; or a mapping from event class to lag.
            concurrency: how many events may be handled at once; above 1 only the starts are in order.
            on_error: "isolate": report and go on; "retry": up to ``retries`` times, after ``retry_delay_s`` seconds and
                then twice as long each time; "fail": end the run.
            disable_after: so many failures in a row switch the subscription off; None for never.
            timeout_s: an attempt that takes longer fails.
            name: for messages and statistics; the handler's qualified name unless given.

        Raises:
            ConfigurationError: an option, a combination or a handler that cannot work.
            BusClosed: the bus was closed.
        """
        options = Options(
            every, every_s, where, once, queue if queue is not None else Lossless(), lag, concurrency,
            on_error, retries, retry_delay_s, disable_after, timeout_s, name,
        )  # fmt: skip
        takes_control(handler)  # None would mean a stream to read from
        return self._add(Subscription(self, event_type, handler, options, self._take_index()))

    def on(self, event_type: EventTypes, **options: Any) -> Callable[[Handler], Handler]:
        """Decorator form of ``subscribe``; the function comes back unchanged."""

        event_classes(
            event_type
        )  # a decorator without arguments would be silent for ever: refuse it here and now

        def decorate(handler: Handler) -> Handler:
            self.subscribe(event_type, handler, **options)
            return handler

        return decorate

    @asynccontextmanager
    async def stream(
        self,
        event_type: EventTypes,
        *,
        where: Callable[[Any], bool] | None = None,
        every: int = 1,
        queue: Queue | None = None,
        name: str | None = None,
    ) -> AsyncGenerator[AsyncIterator[Any]]:
        """``async with bus.stream(T) as events: async for event in events: ...``, on any event loop.

        The iteration ends when the bus is closed and what came before was read. Nobody waits for the reader on
        shutdown.

        Raises:
            WaitsForItself: as ``wait_for``.
        """
        options = Options(
            every=every, where=where, queue=queue if queue is not None else Lossless(), name=name
        )
        require_no_wait_for_itself(event_type, self._roster.active)
        async with self._reading(event_type, options) as events:
            yield events

    @asynccontextmanager
    async def _reading(self, event_type: EventTypes, options: Options) -> AsyncGenerator[AsyncIterator[Any]]:
        subscription = Subscription(self, event_type, None, options, self._take_index())
        reader = EventStream(subscription, lambda: self._inbox.closed)
        self._readers.add(reader)
        self._add(subscription)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            subscription.cancel()

    async def wait_for(
        self, event_type: type[E], *, where: Callable[[E], bool] | None = None, timeout_s: float | None = None
    ) -> E:
        """The next event of ``event_type`` (that ``where`` accepts) published from now on.

        Raises:
            TimeoutError: none came within ``timeout_s`` seconds.
            BusClosed: the bus closed before one came.
            WaitsForItself: a handler whose subscription takes part in checkpoints waits for CheckpointCommitted or
                CheckpointFailed. A checkpoint needs its state at the end of the handler, so that both would wait.
        """
        require_no_wait_for_itself(event_type, self._roster.active)
        options = Options(
            where=where, once=True, name=f"wait_for-{getattr(event_type, '__name__', event_type)}"
        )
        with self.clock.timeout(timeout_s):
            async with self._reading(event_type, options) as events:
                async for event in events:
                    return event
            raise BusClosed(f"The bus was closed before a {event_type.__name__} came.")
        raise TimeoutError(f"No {event_type.__name__} came within timeout_s={timeout_s} s.")

    def _take_index(self) -> int:
        if self._inbox.closed:
            raise BusClosed("Cannot subscribe: the bus is closed and will deliver nothing more.")
        return self._roster.next_index()

    def _add(self, subscription: Subscription) -> Subscription:
        self._roster.name(subscription)
        with self.routing:
            if self._serving is None:
                self._join(subscription)
                return subscription
            self._inbox.enlist(subscription)
        return subscription

    def _join(self, subscription: Subscription) -> None:
        self._roster.join(subscription)
        if self._serving is not None and subscription.handler is not None:
            self._serving.employ(subscription)

    def left(self, subscription: Subscription) -> None:
        """A subscription ended; called by itself, on any thread."""
        self._roster.leave(subscription)

    # --- the training loop's side ---------------------------------------------------------------------------

    def feed(self, items: Iterable[StreamItem]) -> None:
        """Take what the training loop says, in its order. One caller at a time, any thread; never blocks."""
        self._stream.append(items)
        serving = self._serving
        if serving is not None:
            serving.stream_bell.ring()

    def continue_stream(self, seq: int) -> None:
        """Number what is fed from now on from ``seq + 1`` on: a run resumes. Before anything of it is fed."""
        self._stream.continue_from(seq)

    def rows_allowed(self, kinds: Iterable[type[Event]]) -> int:
        """Up to which count (as in ``rows_routed``) the training loop may produce rows that become events of ``kinds``.

        Any thread; never blocks.
        """
        return self._stream.rows_allowed(kinds)

    def tightest(self, kinds: Iterable[type[Event]]) -> Subscription | None:
        """The subscription to any of ``kinds`` whose Lossless queue has room for the fewest rows, if there is one."""
        return self._stream.tightest(kinds)

    @property
    def rows_routed(self) -> int:
        """How many events of series, wanted or not, have been routed since the bus was made."""
        return self._stream.rows_routed

    @property
    def deciders(self) -> tuple[Subscription, ...]:
        """Active subscriptions with a finite lag; replaced, never changed, so that identity tells of a change."""
        return self._roster.deciders

    @property
    def has_control(self) -> bool:
        """Whether handlers that take ``(event, control)`` get theirs from some trainer."""
        return self._control_source is not None

    def attach_control(self, source: ControlSource | None) -> None:
        """Let handlers that take ``(event, control)`` get theirs from ``source``."""
        self._control_source = source

    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt:
        """The control for one handler call. Raises ConfigurationError where no trainer uses this bus."""
        if self._control_source is None:
            raise ConfigurationError(
                f"{subscription.name} takes (event, control), but no Trainer uses this bus. "
                "Pass it as Trainer(bus=...)."
            )
        return self._control_source.open_attempt(subscription, event)

    def subscription_failed(self, subscription: Subscription, error: Exception) -> None:
        """A subscription with ``on_error="fail"`` failed."""
        if self.failure is None:
            self.failure = SubscriberError(
                f"Subscriber {subscription.name} failed, and on_error='fail' ends the run: "
                f"{type(error).__name__}: {error}"
            )
            self.failure.__cause__ = error
        self.settle()

    def settle(self) -> None:
        """Something got on: whoever waits for that looks again."""
        self.settled.pulse()
        on_progress = self.on_progress
        if on_progress is not None:
            on_progress()

    # --- life -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an event loop serves this bus now."""
        return self._serving is not None

    @property
    def served_here(self) -> bool:
        """Whether the caller is on the thread of the event loop that serves this bus: it must not block."""
        serving = self._serving
        return serving is not None and serving.loop.here

    @property
    def limiter(self) -> CapacityLimiter:
        """The limiter of the threads in which plain handlers run, while the bus is served."""
        assert self._serving is not None
        return self._serving.limiter

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Run a coroutine function on the bus' event loop, from any other thread.

        Raises:
            BusClosed: no event loop serves the bus; from the future's ``result()`` if it stops first.
        """
        serving = self._serving
        if serving is None:
            raise BusClosed("The bus is not running, so nothing can be run on its event loop.")
        return serving.submit(function, *args)

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[Self]:
        """Run the bus for the length of the block, without draining at its end and without closing it.

        Subscriptions survive, so a bus can be served again. Workers still busy at the end are cancelled.
        """
        with self.routing:
            if self._inbox.closed:
                raise BusClosed("Cannot start this bus: it was closed. Make a new EventBus.")
            if self._claimed:
                raise ConfigurationError("Cannot start this bus: it is already running. Use it as it is.")
            self._claimed = True
        watchdog = Watchdog(
            lambda: self._roster.active, block_warning_s=self._block_warning_s, cpu_budget=self._cpu_budget
        )
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as host:
                serving: BusRunner = await host.start(self._run)
                watchdog.start()
                try:
                    yield self
                except Exception as error:  # raised outside the task group, which would wrap it
                    failure = error
                finally:
                    serving.stop()
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(watchdog.stop, limiter=CapacityLimiter(1))
        finally:
            self._claimed = False
        if failure is not None:
            raise failure

    async def _run(self, *, task_status: TaskStatus[BusRunner]) -> None:
        """Routers and workers in a scope of their own, so that stopping them does not cancel the block around."""
        serving: BusRunner | None = None
        try:
            async with anyio.create_task_group() as tasks:
                serving = BusRunner(tasks)
                with self.routing:
                    self._serving = serving
                    self._inbox.open(serving.inbox_bell)
                    for subscription in self._roster.active:
                        if subscription.handler is not None:
                            serving.employ(subscription)
                tasks.start_soon(self._inbox.route, serving.inbox_bell)
                tasks.start_soon(self._stream.route, serving.stream_bell)
                tasks.start_soon(serving.run_errands)
                tasks.start_soon(self._report_drops)
                task_status.started(serving)
        finally:
            with self.routing:
                self._serving = None
                self._inbox.open(None)
            self._stream.clear()
            if serving is not None:
                serving.end()
            self.settle()

    async def _report_drops(self) -> None:
        while True:
            await self.clock.sleep(LAG_REPORT_S)
            for subscription in self._roster.active:
                subscription.report_drops()

    async def drain(self, timeout_s: float | None = None) -> dict[str, int]:
        """Wait until everything published has been handled, including what handlers publish meanwhile.

        Any event loop, but not from inside a handler, which would wait for itself.

        Returns:
            What was not handled when ``timeout_s`` seconds had passed: subscription name -> events. Empty if all was.

        Raises:
            SubscriberError: a subscription with ``on_error="fail"`` failed.
        """
        left = await self.wait_until_quiet(timeout_s)
        if self.failure is not None:
            raise self.failure
        return left

    async def wait_until_quiet(self, timeout_s: float | None = None) -> dict[str, int]:
        """Like ``drain``, but a failed subscription raises nothing."""
        with self.clock.timeout(timeout_s):
            await self._until_quiet()
            for subscription in self._roster.active:
                subscription.report_drops()
            await self._until_quiet()
        return self.undelivered()

    async def _until_quiet(self) -> None:
        while self.running and not self._quiet():
            await self.settled.wait_unless(lambda: not self.running or self._quiet())

    def _quiet(self) -> bool:
        with self.routing:  # on its way from the inbox to the queues an event is in neither
            return (
                not self._inbox
                and not self._stream
                and not any(s.pending for s in self._roster.active if s.handler)
            )

    def undelivered(self) -> dict[str, int]:
        """Subscription name -> events that wait or are being handled; plus what is not yet routed."""
        left = {s.name: s.pending for s in self._roster.active if s.handler is not None and s.pending}
        unrouted = self._inbox.unrouted() + self._stream.waiting()
        return {**left, "(unrouted)": unrouted} if unrouted else left

    async def aclose(self, timeout_s: float | None = None) -> dict[str, int]:
        """Drain, then stop for good: later ``publish`` raises BusClosed. Idempotent; any event loop.

        Returns:
            As ``drain``: what was not handled within ``timeout_s`` (default: the bus' ``drain_timeout_s``).
        """
        timeout_s = self._drain_timeout_s if timeout_s is None else timeout_s
        deadline_s = self.clock.now_s() + timeout_s
        try:
            if not self._inbox.closed:
                await self.wait_until_quiet(timeout_s)
                self._close()
                # What other threads published between the last look and the closing was accepted, so it is delivered.
                await self.wait_until_quiet(max(0.0, deadline_s - self.clock.now_s()))
            left = self.undelivered()
        finally:
            self._close()
            if self._serving is not None:
                self._serving.stop()
        if self.failure is not None:
            raise self.failure
        return left

    def _close(self) -> None:
        with self.routing:
            self._inbox.close()
        for reader in list(self._readers):
            reader.wake()
        self.settled.pulse()

    async def __aenter__(self) -> Self:
        stack = AsyncExitStack()
        await stack.enter_async_context(self.serve())
        self._exit_stack = stack
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        stack, self._exit_stack = self._exit_stack, None
        assert stack is not None
        try:
            if kind is None:
                left = await self.aclose()
                if left:
                    listing = ", ".join(f"{name}: {count}" for name, count in left.items())
                    logger.warning("The bus was closed before everything was handled; left over: %s", listing)
        finally:
            self._close()
            suppressed = await stack.__aexit__(kind, error, traceback)
        return suppressed

    # --- looking at it --------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """The figures of every subscription, disabled ones too, by name. Any thread; never blocks."""
        return {s.name: s.statistics() for s in self.subscriptions}

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """All subscriptions that were not cancelled; those disabled after failures come last."""
        return (*self._roster.active, *self._roster.disabled)

    def has_ended(self, name: str) -> bool:
        """Whether the subscription of this name was cancelled or disabled, or is finished. Any thread."""
        return self._roster.has_ended(name)

    def has_subscribers(self, kind: type[Event]) -> bool:
        """Whether anyone would receive an event of class ``kind``. Any thread."""
        return bool(self._roster.route(kind))
