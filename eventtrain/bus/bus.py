"""The event bus: publish from any thread, one queue and one worker per subscription, nobody waits for anybody.

Two ways lead in. ``publish`` appends to an inbox that the event loop routes; ``feed`` takes what the training loop
has to say, in step order, as ready events and as series whose events are built only if someone wants them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventtrain.bus.handlers import Attempt, Handler
from eventtrain.bus.options import EventTypes, Lag, OnError, Options
from eventtrain.bus.queues import Lossless, Queue
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.bus.wake import Doorbell, LoopThread, Signal
from eventtrain.bus.watchdog import Watchdog
from eventtrain.errors import BusClosed, ConfigurationError, EventReused, QueueFull, SubscriberError
from eventtrain.events import Event

E = TypeVar("E", bound=Event)
T = TypeVar("T")

CLAIMED = -1
"""``seq`` of an event that was published and waits in the inbox for its number."""
ROUTE_BATCH = 256
"""Events routed before the event loop gets a turn."""
BUILD_BATCH = 64
"""Events of a series built before the event loop gets a turn: about 0.2 ms."""
PLAIN_HANDLER_THREADS = 40
"""Worker threads for plain handlers: a limiter of our own, so that a service's own thread calls are not delayed."""


class ControlSource(Protocol):
    """Gives each handler call its control: the training side of the bus."""

    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt: ...


@dataclass(frozen=True, slots=True)
class EventSeries:
    """Consecutive events of one type, one per step, built on demand in step order."""

    event_type: type[Event]
    steps: range
    build: Callable[[Iterable[int]], list[Event]]


@dataclass(frozen=True, slots=True)
class Activation:
    """From here in the stream on, the training loop counts the events of this subscription."""

    subscription: Subscription


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
    """

    def __init__(
        self,
        *,
        run_id: str = "",
        buffer_limit: int = 65_536,
        drain_timeout_s: float = 30.0,
        block_warning_s: float = 0.25,
        cpu_budget: float = 0.25,
    ) -> None:
        self.run_id = run_id
        self.failure: SubscriberError | None = None
        self.deciders: tuple[Subscription, ...] = ()
        """Active subscriptions with a finite lag; replaced, never changed, so that identity tells of a change."""
        self.on_progress: Callable[[], object] | None = None
        """Called on the event loop's thread whenever a worker got on, a subscription ended or the bus failed."""
        self._control_source: ControlSource | None = None
        self._buffer_limit = buffer_limit
        self._drain_timeout_s = drain_timeout_s
        self._block_warning_s = block_warning_s
        self._cpu_budget = cpu_budget
        self._inbox: deque[Event | Subscription] = deque()
        self._headroom = buffer_limit  # so many inbox entries fit into every Lossless queue; 0 when closed
        self._stream: deque[Event | EventSeries | Activation] = deque()
        self._routing = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._disabled: tuple[Subscription, ...] = ()  # kept for their statistics and dead letters
        self._routes: dict[type[Event], tuple[Subscription, ...]] = {}
        self._next_index = 0
        self._seq = 0
        self._stream_seq = 0
        self.rows_routed = 0
        """How many events of series, wanted or not, have been routed since the bus was made."""
        self._loop: LoopThread | None = None
        self._bell: Doorbell | None = None
        self._stream_bell: Doorbell | None = None
        self._errand_bell: Doorbell | None = None
        self._errands: deque[Callable[[], None]] = deque()
        self._submitted: set[Future[Any]] = set()
        self._workers: TaskGroup | None = None
        self._limiter: CapacityLimiter | None = None
        self._settled = Signal()
        self._closed = False
        self._exit_stack: AsyncExitStack | None = None

    # --- publishing -----------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Hand ``event`` to the bus. Any thread, also from inside handlers; never blocks.

        Before the bus is started events are kept and delivered at the start. The bus stamps ``run_id``, ``seq`` and
        ``time`` before delivery.

        Raises:
            QueueFull: a Lossless queue that wants it is at its limit (or the buffer is); nothing was published.
            EventReused: this very instance was published before.
            BusClosed: the bus was closed.
        """
        try:
            fields = event.__dict__
            if fields["seq"]:
                raise EventReused(
                    f"Cannot publish this {event.kind}: the instance was published before (seq {event.seq}), and "
                    "subscribers already share it. Make a new one, for example event.model_copy(update={'seq': 0})."
                )
        except (AttributeError, KeyError):
            raise ConfigurationError(f"Cannot publish {event!r}: it is no eventtrain.Event. Subclass Event.") from None
        if len(self._inbox) >= self._headroom:
            self._make_room_for(event)
        fields["seq"] = CLAIMED
        self._inbox.append(event)
        bell = self._bell
        if bell is not None and bell.armed:
            bell.ring()

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. Any event loop.

        Cancelled while waiting: the event was not published.
        """
        while True:
            try:
                return self.publish(event)
            except QueueFull:
                await self._settled.wait_unless(lambda: self._full_for(event) is None)

    def feed(self, items: Iterable[Event | EventSeries | Activation]) -> None:
        """Take what the training loop says, in its order. One caller at a time, any thread; never blocks."""
        self._stream.extend(items)
        if self._stream_bell is not None:
            self._stream_bell.ring()

    def notify(self, event: Event) -> None:
        """Publish on behalf of the bus itself: never refused, so that no failure stays unsaid."""
        if not self._closed:
            event.__dict__["seq"] = CLAIMED
            self._inbox.append(event)
            if self._bell is not None:
                self._bell.ring()

    def _make_room_for(self, event: Event) -> None:
        """The rare path of publish: route what waits, here and now, then look at the queues that want the event."""
        if self._closed:
            raise BusClosed(f"Cannot publish {event.kind}: the bus is closed and nobody would receive it.")
        if self._loop is not None:
            with self._routing:
                self._route_inbox(len(self._inbox))
        full = self._full_for(event)
        if full is not None:
            raise QueueFull(
                f"Cannot publish {event.kind}: {full}. Await publish_async() to wait for room, or give the subscription a "
                "queue that drops (KeepLatest(), DropOldest(n), DropNewest(n))."
            )

    def _full_for(self, event: Event) -> str | None:
        for subscription in self._route(type(event)):
            room = subscription.queue.room()
            if room is not None and room <= 0 and subscription.state == "active":
                return f"the Lossless queue of {subscription.name} is at its limit of {len(subscription.queue)} events"
        if len(self._inbox) >= self._buffer_limit:
            return f"{len(self._inbox)} events wait and the bus is not routing them (was it started?)"
        return None

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
            every, every_s, where, once, queue if queue is not None else Lossless(), lag, concurrency, on_error, retries,
            retry_delay_s, disable_after, timeout_s, name,
        )  # fmt: skip
        return self._add(Subscription(self, event_type, handler, options, self._take_index()))

    def on(self, event_type: EventTypes, **options: Any) -> Callable[[Handler], Handler]:
        """Decorator form of ``subscribe``; the function comes back unchanged."""

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

        The iteration ends when the bus is closed. Nobody waits for the reader on shutdown.
        """
        options = Options(every=every, where=where, queue=queue if queue is not None else Lossless(), name=name)
        subscription = Subscription(self, event_type, None, options, self._take_index())
        subscription.attach(LoopThread())
        self._add(subscription)

        async def events() -> AsyncIterator[Any]:
            waiting, bell = subscription.queue, subscription.bell
            assert bell is not None
            while True:
                with self._routing:  # the reader may live on another event loop than the bus
                    batch = [waiting.take() for _ in range(len(waiting))]
                self._settled.pulse()
                for event in batch:
                    yield event
                if subscription.state != "active" and not waiting:
                    return
                await bell.sleep_unless(lambda: len(waiting) or subscription.state != "active")

        iterator = events()
        try:
            yield iterator
        finally:
            subscription.cancel()
            await iterator.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # an async generator

    async def wait_for(
        self, event_type: type[E], *, where: Callable[[E], bool] | None = None, timeout_s: float | None = None
    ) -> E:
        """The next event of ``event_type`` (that ``where`` accepts) published from now on.

        Raises:
            TimeoutError: none came within ``timeout_s`` seconds.
            BusClosed: the bus closed before one came.
        """
        with anyio.fail_after(timeout_s):
            async with self.stream(event_type, where=where, name=f"wait_for-{event_type.__name__}") as events:
                async for event in events:
                    return event
        raise BusClosed(f"The bus was closed before a {event_type.__name__} came.")

    def _take_index(self) -> int:
        if self._closed:
            raise BusClosed("Cannot subscribe: the bus is closed and will deliver nothing more.")
        self._next_index += 1
        return self._next_index

    def _add(self, subscription: Subscription) -> Subscription:
        if self._loop is None:
            self._join(subscription)
        else:
            # It joins through the inbox, behind what was published before it subscribed.
            self._inbox.append(subscription)
            self._headroom = 0  # its limit may be lower than the others': the next publish looks
            bell = self._bell
            if bell is not None:
                bell.ring()
        return subscription

    def _join(self, subscription: Subscription) -> None:
        if subscription.state == "active":
            self._subscriptions = (*self._subscriptions, subscription)
            self._routes = {}
            if subscription.decides:
                self.deciders = (*self.deciders, subscription)
        if self._workers is not None and subscription.handler is not None:
            self._employ(subscription)

    def left(self, subscription: Subscription) -> None:
        """A subscription ended; called by itself, on any thread."""
        if subscription.state == "disabled":
            self._disabled = (*self._disabled, subscription)
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)
        self.deciders = tuple(s for s in self.deciders if s is not subscription)
        self._routes = {}

    # --- routing: the event loop's thread, or under the lock --------------------------------------------------

    def _route(self, kind: type[Event]) -> tuple[Subscription, ...]:
        routes = self._routes
        found = routes.get(kind)
        if found is None:
            found = tuple(s for s in self._subscriptions if issubclass(kind, s.types))
            routes[kind] = found
        return found

    def _route_inbox(self, count: int) -> None:
        inbox, run_id, now = self._inbox, self.run_id, datetime.now(UTC)
        for _ in range(count):
            if not inbox:
                break
            event = inbox.popleft()
            if isinstance(event, Subscription):
                self._join(event)
                continue
            fields = event.__dict__
            self._seq += 1
            fields["seq"] = self._seq
            fields["time"] = now
            if not fields["run_id"]:
                fields["run_id"] = run_id
            for subscription in self._routes.get(type(event)) or self._route(type(event)):
                subscription.offer(event)
        rooms = [room for s in self._subscriptions if (room := s.queue.room()) is not None]
        self._headroom = 0 if self._closed else max(0, min(rooms, default=self._buffer_limit))

    async def _route_published(self, bell: Doorbell) -> None:
        while True:
            await bell.sleep_unless(lambda: len(self._inbox))
            with self._routing:
                self._route_inbox(ROUTE_BATCH)
            await checkpoint()

    async def _route_stream(self, bell: Doorbell) -> None:
        stream = self._stream
        while True:
            await bell.sleep_unless(lambda: len(stream))
            item = stream[0]
            if isinstance(item, Activation):
                item.subscription.activate()
            elif isinstance(item, EventSeries):
                await self._deliver_series(item)
            else:
                await self._wait_for_row_room(type(item))
                self._deliver([item])
            stream.popleft()
            self._settle()

    async def _deliver_series(self, series: EventSeries) -> None:
        steps = series.steps
        while steps:
            room = await self._wait_for_row_room(series.event_type)
            chunk, steps = steps[: min(room, BUILD_BATCH)], steps[min(room, BUILD_BATCH) :]
            with self._routing:
                wanted = [(s, s.choose(chunk)) for s in self._route(series.event_type)]
                wanted = [(s, chosen) for s, chosen in wanted if chosen]
                if wanted:
                    self._deliver_chosen(series, chunk, wanted)
            self.rows_routed += len(chunk)
            if wanted:
                await checkpoint()

    def _deliver_chosen(self, series: EventSeries, chunk: range, wanted: list[tuple[Subscription, range]]) -> None:
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

    def _deliver(self, events: list[Event]) -> None:
        self._stamp(events)
        with self._routing:
            for subscription in self._route(type(events[0])):
                subscription.offer_from_loop(events)

    def _stamp(self, events: list[Event]) -> None:
        now = datetime.now(UTC)
        seq = self._stream_seq
        for event in events:
            seq += 1
            fields = event.__dict__
            fields["seq"] = seq
            fields["time"] = now
            fields["run_id"] = self.run_id
        self._stream_seq = seq

    # --- room -----------------------------------------------------------------------------------------------

    def rows_allowed(self, kinds: Iterable[type[Event]]) -> int:
        """Up to which count (as in ``rows_routed``) the training loop may produce rows that become events of ``kinds``.

        Any thread; never blocks.
        """
        tightest = self.tightest(kinds)
        return self.rows_routed + (self._buffer_limit if tightest is None else self._rows_free(tightest))

    def tightest(self, kinds: Iterable[type[Event]]) -> Subscription | None:
        """The subscription to any of ``kinds`` whose Lossless queue has room for the fewest rows, if there is one."""
        bounded = {s for kind in kinds for s in self._route(kind) if s.queue.room() is not None}
        return min(bounded, key=self._rows_free, default=None)

    @staticmethod
    def _rows_free(subscription: Subscription) -> int:
        room = subscription.queue.room()
        return max(0, room if room is not None else 0) * subscription.options.every

    async def _wait_for_row_room(self, kind: type[Event]) -> int:
        def room() -> int:
            rooms = [r for s in self._route(kind) if s.state == "active" and (r := s.queue.room()) is not None]
            return min(rooms, default=self._buffer_limit)

        while (free := room()) <= 0:
            await self._settled.wait_unless(lambda: room() > 0)
        return free

    def settled(self, subscription: Subscription) -> None:
        """A worker finished a burst, or a subscription ended."""
        self._settle()

    def _settle(self) -> None:
        self._settled.pulse()
        if self.on_progress is not None:
            self.on_progress()

    # --- control and failures -------------------------------------------------------------------------------

    def attach_control(self, source: ControlSource | None) -> None:
        """Let handlers that take ``(event, control)`` get theirs from ``source``."""
        self._control_source = source

    def open_attempt(self, subscription: Subscription, event: Event) -> Attempt:
        """The control for one handler call. Raises ConfigurationError where no trainer uses this bus."""
        if self._control_source is None:
            raise ConfigurationError(
                f"{subscription.name} takes (event, control), but no Trainer uses this bus. Pass it as Trainer(bus=...)."
            )
        return self._control_source.open_attempt(subscription, event)

    def subscription_failed(self, subscription: Subscription, error: Exception) -> None:
        """A subscription with ``on_error="fail"`` failed."""
        if self.failure is None:
            self.failure = SubscriberError(
                f"Subscriber {subscription.name} failed, and on_error='fail' ends the run: {type(error).__name__}: {error}"
            )
            self.failure.__cause__ = error
        self._settle()

    @property
    def limiter(self) -> CapacityLimiter:
        """The limiter of the threads in which plain handlers run."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(PLAIN_HANDLER_THREADS)
        return self._limiter

    # --- life -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an event loop serves this bus now."""
        return self._loop is not None

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[Self]:
        """Run the bus for the length of the block, without draining at its end and without closing it.

        Subscriptions survive, so a bus can be served again. Workers still busy at the end are cancelled.
        """
        if self._closed:
            raise BusClosed("Cannot start this bus: it was closed. Make a new EventBus.")
        if self.running:
            raise ConfigurationError("Cannot start this bus: it is already running. Use it as it is.")
        watchdog = Watchdog(
            lambda: self._subscriptions, block_warning_s=self._block_warning_s, cpu_budget=self._cpu_budget
        )
        failure: Exception | None = None
        async with anyio.create_task_group() as host:
            host.start_soon(self._run)
            await self._settled.wait_unless(lambda: self._workers is not None)
            watchdog.start()
            try:
                yield self
            except Exception as error:  # raised outside the task group, which would wrap it
                failure = error
            finally:
                self._stop_workers()
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(watchdog.stop)
        if failure is not None:
            raise failure

    async def _run(self) -> None:
        """Routers and workers in a scope of their own, so that stopping them does not cancel the block around."""
        self._loop = LoopThread()
        self._bell = Doorbell(self._loop)
        self._stream_bell = Doorbell(self._loop)
        self._errand_bell = Doorbell(self._loop)
        try:
            async with anyio.create_task_group() as workers:
                self._workers = workers
                workers.start_soon(self._route_published, self._bell)
                workers.start_soon(self._route_stream, self._stream_bell)
                workers.start_soon(self._run_errands, self._errand_bell)
                workers.start_soon(self._report_drops)
                for subscription in self._subscriptions:
                    if subscription.handler is not None:
                        self._employ(subscription)
                self._settled.pulse()
        finally:
            self._workers = self._loop = self._bell = self._stream_bell = self._errand_bell = None
            self._stream.clear()
            self._errands.clear()
            for future in list(self._submitted):
                future.cancel()
            self._settle()

    def _employ(self, subscription: Subscription) -> None:
        loop, workers = self._loop, self._workers
        assert loop is not None and workers is not None

        def start() -> None:
            subscription.attach(loop)
            for _ in range(subscription.options.concurrency):
                workers.start_soon(subscription.work, name=f"eventtrain {subscription.name}")

        self._errands.append(start)
        if self._errand_bell is not None:
            self._errand_bell.ring()

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Run a coroutine function on the bus' event loop, from any other thread.

        The future is cancelled when the bus stops first.

        Raises:
            BusClosed: no event loop serves the bus.
        """
        bell, future = self._errand_bell, Future[T]()

        async def run() -> None:
            try:
                future.set_result(await function(*args))
            except Exception as error:
                future.set_exception(error)
            except BaseException:
                future.cancel()
                raise

        def start() -> None:
            assert self._workers is not None
            self._submitted.add(future)
            future.add_done_callback(self._submitted.discard)
            self._workers.start_soon(run)

        if bell is None:
            raise BusClosed("The bus is not running, so nothing can be run on its event loop.")
        self._errands.append(start)
        bell.ring()
        return future

    async def _run_errands(self, bell: Doorbell) -> None:
        """Start tasks on behalf of other threads: anyio lets only a task start another one."""
        while True:
            await bell.sleep_unless(lambda: len(self._errands))
            while self._errands:
                self._errands.popleft()()

    def _stop_workers(self) -> None:
        if self._workers is not None:
            self._workers.cancel_scope.cancel()

    async def _report_drops(self) -> None:
        while True:
            await anyio.sleep(1.0)
            for subscription in self._subscriptions:
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
        with anyio.move_on_after(timeout_s):
            await self._until_quiet()
            for subscription in self._subscriptions:
                subscription.report_drops()
            await self._until_quiet()
        return self.undelivered()

    async def _until_quiet(self) -> None:
        while self.running and not self._quiet():
            await self._settled.wait_unless(self._quiet)

    def undelivered(self) -> dict[str, int]:
        """Subscription name -> events that wait or are being handled; plus what is not yet routed."""
        left = {s.name: s.pending for s in self._subscriptions if s.handler is not None and s.pending}
        unrouted = sum(isinstance(item, Event) for item in list(self._inbox))
        unrouted += sum(len(i.steps) if isinstance(i, EventSeries) else 1 for i in list(self._stream))
        return {**left, "(unrouted)": unrouted} if unrouted else left

    def _quiet(self) -> bool:
        return not self._inbox and not self._stream and not any(s.pending for s in self._subscriptions if s.handler)

    async def aclose(self, timeout_s: float | None = None) -> dict[str, int]:
        """Drain, then stop for good: later ``publish`` raises BusClosed. Idempotent.

        Returns:
            As ``drain``: what was not handled within ``timeout_s`` (default: the bus' ``drain_timeout_s``).
        """
        left: dict[str, int] = {}
        if self.running and not self._closed:
            left = await self.drain(self._drain_timeout_s if timeout_s is None else timeout_s)
        self._closed = True
        self._headroom = 0
        for subscription in self._subscriptions:
            subscription.finish()
        self._stop_workers()
        return left

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
                await self.aclose()
        finally:
            self._closed = True
            self._headroom = 0
            suppressed = await stack.__aexit__(kind, error, traceback)
        return suppressed

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """The figures of every subscription, disabled ones too, by name. Any thread; never blocks."""
        return {s.name: s.statistics() for s in self.subscriptions}

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """All subscriptions that were not cancelled; those disabled after failures come last."""
        return (*self._subscriptions, *self._disabled)

    def has_subscribers(self, kind: type[Event]) -> bool:
        """Whether anyone would receive an event of class ``kind``. Any thread."""
        return bool(self._route(kind))
