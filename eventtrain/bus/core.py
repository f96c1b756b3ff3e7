"""Core of the event bus, behind ``EventBus``: used by the training loop, the trainer and ``Subscriber`` classes.

Two ways lead in. ``publish`` appends to ``publish_queue``, from any thread; ``feed`` appends to ``stream``, from the
training loop, in the order of steps. Both are routed on the event loop that serves the bus.

Threads. Methods are for any thread unless stated otherwise; coroutines for any event loop. ``_runner`` and the
start of workers are guarded by ``table.delivery_lock``: a subscription either joins before an event loop takes over,
and is started by it, or sees the runner and joins behind the waiting events. ``failure`` is set once per run, by
whichever handler fails first; every waiter learns of it, as of all else, through ``progress``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from anyio.abc import TaskStatus
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from eventtrain.bus.cancellation import persist
from eventtrain.bus.clock import Clock
from eventtrain.bus.event_stream import EventStream, handler_of_this_task, require_no_wait_for_itself
from eventtrain.bus.failures import Notices
from eventtrain.bus.handlers import (
    CommandTransaction,
    Handler,
    describe,
    is_redefined,
    notebook_cell,
    require_annotation,
    takes_control,
)
from eventtrain.bus.options import Options, event_classes
from eventtrain.bus.publish_queue import PublishQueue
from eventtrain.bus.routing_table import RoutingTable
from eventtrain.bus.runner import BusRunner
from eventtrain.bus.subscription import Save, SubscriptionCore, SubscriptionStatistics
from eventtrain.bus.termination import on_termination
from eventtrain.bus.training_stream import StreamItem, TrainingStream
from eventtrain.bus.wakeup import CrossLoopCondition
from eventtrain.bus.watchdog import Watchdog
from eventtrain.bus.worker import SeriesHandler
from eventtrain.errors import (
    AlreadyRunning,
    BusClosed,
    ConfigurationError,
    QueueFull,
    SubscriberError,
    WaitsForItself,
)
from eventtrain.events import Event
from eventtrain.validation.annotations import fits, shown

logger = logging.getLogger("eventtrain")

T = TypeVar("T")

DROP_REPORT_S = 1.0
"""Interval at which dropped events are reported."""
GIVE_UP_POLL_S = 0.05
"""Interval at which a thread that waits for room evaluates ``give_up``."""
LOCK_TIMEOUT_S = 1.0
"""How long the end of a run waits for the delivery lock."""


class ControlSource(Protocol):
    """The training side of the bus: makes the controls of handlers."""

    def begin_transaction(self, subscription: SubscriptionCore, event: Event) -> CommandTransaction:
        """Makes the control of one handler call."""
        ...


class BusCore:
    """Routes events to subscriptions and runs their workers. For the arguments see ``EventBus``.

    Attributes:
        progress: notified whenever a handler has handled something, a subscription has ended, or the bus has failed,
            closed or stopped.
        failure: set when a subscription with ``on_error="fail"`` has failed.
        notices: those of the training side that can come without end: of rejected commands, stalls and traces.
        control_source: makes the controls of handlers that take ``(event, control)``; None without a trainer.
    """

    def __init__(
        self,
        *,
        run_id: str,
        buffer_limit: int,
        drain_timeout_s: float,
        block_warning_s: float,
        cpu_budget: float,
        clock: Clock,
    ) -> None:
        self.clock = clock
        self.progress = CrossLoopCondition()
        self.failure: SubscriberError | None = None
        self.control_source: ControlSource | None = None
        self.table = RoutingTable()
        self.publish_queue = PublishQueue(self.table, self.progress, buffer_limit)
        self.publish_queue.run_id = run_id
        self.notices = Notices(self.notify, self.has_room_for_notice)
        self.stream = TrainingStream(
            self.table,
            self.publish_queue,
            self.progress,
            clock=clock,
            blocked_s=lambda: self.blocked_s,
            most_rows=buffer_limit,
        )
        self._drain_timeout_s = drain_timeout_s
        self._watchdog_limits = {"block_warning_s": block_warning_s, "cpu_budget": cpu_budget}
        self._runner: BusRunner | None = None
        self._is_served = False
        self._readers: set[EventStream[Any]] = set()

    @property
    def run_id(self) -> str:
        """Stamped on events that carry none."""
        return self.publish_queue.run_id

    @run_id.setter
    def run_id(self, run_id: str) -> None:
        self.publish_queue.run_id = run_id

    @property
    def attempt(self) -> int:
        """Stamped on events that carry none; 0 before the first run of a trainer."""
        return self.publish_queue.attempt

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self.publish_queue.attempt = attempt

    @property
    def forward(self) -> Callable[[Sequence[Event]], None] | None:
        """Gets the events that were published here, numbered, in groups of one class. Must not block.

        Not those of the training stream.
        """
        return self.publish_queue.forward

    @forward.setter
    def forward(self, forward: Callable[[Sequence[Event]], None] | None) -> None:
        self.publish_queue.forward = forward

    # --- publishing -----------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """See ``EventBus.publish``."""
        self.publish_queue.publish(event)

    def notify(self, event: Event) -> None:
        """Publishes an event of the bus or the training loop itself. Never refused, so that no failure is lost."""
        self.publish_queue.notify(event)

    def has_room_for_notice(self, event_type: type[Event], ahead: int = 0) -> bool:
        """Returns whether an event of this class passes no limit of a queue behind ``ahead`` more of them."""
        return self.publish_queue.has_room_for_notice(event_type, ahead)

    async def publish_async(self, event: Event) -> None:
        """See ``EventBus.publish_async``."""
        await checkpoint_if_cancelled()
        while not self._published(event):
            handler = handler_of_this_task(self.table.route(type(event)))
            if handler is not None and handler.queue.room() == 0 and handler.options.concurrency == 1:
                raise WaitsForItself(
                    f"{handler.name} publishes {event.kind} in its handler and waits for room in its own queue, which "
                    "only the end of that handler makes. Use publish(), or publish from another task."
                )
            await self.progress.wait_until(lambda: self._has_room(event))
            await checkpoint_if_cancelled()
        await cancel_shielded_checkpoint()

    def publish_blocking(self, event: Event, *, give_up: Callable[[], object] = lambda: False) -> bool:
        """Like ``publish_async``, for threads: blocks while a Lossless queue is at its limit.

        Never call it on the bus' event loop, which has to make the room.

        Args:
            event: the event to publish.
            give_up: evaluated on this thread, at least every 50 ms while waiting.

        Returns:
            False if ``give_up()`` was true before there was room; the event was not published then.

        Raises:
            EventReused, BusClosed: as ``publish``.
        """
        while not self._published(event):
            self.progress.block_until(lambda: give_up() or self._has_room(event), poll_s=GIVE_UP_POLL_S)
            if give_up():
                return False
        return True

    def _published(self, event: Event) -> bool:
        try:
            self.publish_queue.publish(event)
        except QueueFull:
            return False
        return True

    def _has_room(self, event: Event) -> bool:
        return self.publish_queue.closed or self.publish_queue.full_for(event) is None

    # --- subscribing ----------------------------------------------------------------------------------------

    def subscribe(
        self,
        event_types: object,
        handler: Handler,
        options: Mapping[str, Any],
        *,
        take_series: SeriesHandler | None = None,
        save: Save | None = None,
        attach: bool = True,
        owner: object = None,
    ) -> SubscriptionCore:
        """See ``EventBus.subscribe``.

        Args:
            event_types: a class, a base class, a union or a tuple.
            handler: of ``(event)`` or ``(event, control)``.
            options: ``SubscriptionOptions``.
            take_series: handles a ``StepSeries``, where the options allow it.
            save: gives the state that belongs to a checkpoint, if the handler has one.
            attach: False: it receives nothing before ``attach``.
            owner: what it belongs to, if not to the bus: a function replaces only those of the same owner.
        """
        types, name = event_classes(event_types), describe(handler)
        takes_control(handler)
        require_annotation(handler, types, name)
        return self._add(types, handler, options, name, take_series, save, attach=attach, owner=owner)

    def _add(
        self,
        types: tuple[type[Event], ...],
        handler: Handler | None,
        given: Mapping[str, Any],
        default_name: str,
        take_series: SeriesHandler | None = None,
        save: Save | None = None,
        *,
        attach: bool = True,
        owner: object = None,
    ) -> SubscriptionCore:
        if self.publish_queue.closed:
            raise BusClosed(
                f"Cannot subscribe: {self.publish_queue.close_reason}, so nothing more is delivered."
            )
        name = given.get("name")
        if not fits(name, str | None):
            raise ConfigurationError(
                f"Cannot subscribe {default_name}: name must be a string or None, got {shown(name)}."
            )
        name = name or default_name
        options = Options(given, name, types)
        cell = notebook_cell()
        if handler is not None and cell is not None:
            self._replace_earlier(handler, types, cell, owner)
        subscription = self.table.create(
            name,
            lambda name, index: SubscriptionCore(
                self,
                types,
                options,
                name=name,
                index=index,
                handler=handler,
                take_series=take_series,
                save=save,
            ),
        )
        subscription.owner, subscription.cell = owner, cell
        if attach:
            with self.table.delivery_lock:
                self.publish_queue.join(subscription)
        return subscription

    def _replace_earlier(
        self, handler: Handler, types: tuple[type[Event], ...], cell: int, owner: object
    ) -> None:
        """Cancels what an earlier cell subscribed: a function of the same name, or the same one to the same events."""
        for earlier in self.subscriptions:
            if (
                earlier.active
                and earlier.owner is owner
                and earlier.cell not in (None, cell)
                and is_redefined(earlier.handler, handler)
                and (earlier.handler is not handler or earlier.types == types)
            ):
                logger.warning(
                    "The handler %s of cell %d replaces the one of cell %d, which receives no more events. To have "
                    "both, give the functions different names.",
                    earlier.name, cell, earlier.cell,
                )  # fmt: skip
                earlier.cancel()

    def attach(self, subscription: SubscriptionCore) -> None:
        """Routes events to a detached subscription from now on; ``start_worker`` has them handled.

        Its handler runs in a copy of the caller's context (contextvars).
        """
        subscription.worker.context = copy_context()
        with self.table.delivery_lock:
            self.table.join(subscription)
            self.publish_queue.measure_headroom()

    def start_worker(self, subscription: SubscriptionCore) -> None:
        """Has the events of an attached subscription handled, if the bus is served now; ``serve`` does it for all."""
        with self.table.delivery_lock:
            if self._runner is not None and subscription.served:
                self._runner.start_worker(subscription.worker, subscription.name)

    def detach(self, subscription: SubscriptionCore) -> None:
        """Routes nothing more to a subscription until ``attach``, and forgets the events that wait for it."""
        lock = self.table.delivery_lock
        if not lock.acquire(timeout=LOCK_TIMEOUT_S):
            return  # a ``where`` that blocks the event loop holds it
        try:
            self.table.remove(subscription)
            subscription.queue.clear()
            subscription.worker.context = None
            self.publish_queue.measure_headroom()
        finally:
            lock.release()
        subscription.wake()
        self.progress.notify_all()

    @asynccontextmanager
    async def open_stream(
        self, event_types: object, options: Mapping[str, Any]
    ) -> AsyncGenerator[EventStream[Any]]:
        """See ``EventBus.stream``."""
        types = event_classes(event_types)
        require_no_wait_for_itself(types, self.table.active)
        subscription = self._add(types, None, options, "stream")
        reader = EventStream(subscription, self.publish_queue)
        self._readers.add(reader)
        try:
            with on_termination(reader.end):
                yield reader
        finally:
            self._readers.discard(reader)
            subscription.cancel()

    # --- the training loop's side ---------------------------------------------------------------------------

    def require_no_run(self) -> None:
        """Raises AlreadyRunning if a trainer's run uses this bus."""
        if self.progress.listener is not None:
            raise AlreadyRunning(
                "Another trainer's run uses this bus. One bus serves one run at a time: wait for it, or give each "
                "trainer a bus of its own."
            )

    def feed(self, items: Iterable[StreamItem]) -> None:
        """Appends to the training stream. One caller at a time, any thread; never blocks."""
        self.stream.append(items)
        runner = self._runner
        if runner is not None:
            runner.stream_wakeup.wake()

    @property
    def deciders(self) -> tuple[SubscriptionCore, ...]:
        """Active subscriptions with a finite lag. Replaced, never changed, so that identity shows a change."""
        return self.table.deciders

    @property
    def subscriptions(self) -> tuple[SubscriptionCore, ...]:
        """The active subscriptions, those disabled after failures, and those of trainers that do not run now."""
        return (*self.table.active, *self.table.disabled, *self.table.detached)

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """See ``EventBus.statistics``."""
        return {subscription.name: subscription.statistics() for subscription in self.subscriptions}

    def has_ended(self, name: str) -> bool:
        """Returns whether the subscription of this name was cancelled or disabled, or has finished."""
        return self.table.has_ended(name)

    def has_subscribers(self, event_type: type[Event]) -> bool:
        """Returns whether any subscription receives events of this class."""
        return bool(self.table.route(event_type))

    # --- the subscriptions' side ------------------------------------------------------------------------------

    @property
    def limiter(self) -> CapacityLimiter:
        """Limits the threads in which plain handlers run, while the bus is served."""
        assert self._runner is not None
        return self._runner.limiter

    def begin_transaction(self, subscription: SubscriptionCore, event: Event) -> CommandTransaction:
        """Makes the control of one handler call. Raises ConfigurationError if no trainer uses this bus."""
        if self.control_source is None:
            raise ConfigurationError(
                f"{subscription.name} takes (event, control), but no Trainer uses this bus. "
                "Pass the bus to one: Trainer(bus=...)."
            )
        return self.control_source.begin_transaction(subscription, event)

    def subscription_failed(self, subscription: SubscriptionCore, error: Exception) -> None:
        """A subscription with ``on_error="fail"`` failed."""
        if self.failure is None:
            self.failure = SubscriberError(
                f"Subscriber {subscription.name} failed, and on_error='fail' ends the run: "
                f"{type(error).__name__}: {error}"
            )
            self.failure.__cause__ = error
        self.progress.notify_all()

    def subscription_ended(self, subscription: SubscriptionCore) -> None:
        """The subscription receives nothing more."""
        self.table.leave(subscription)

    # --- serving ----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an event loop serves this bus now."""
        return self._runner is not None

    @property
    def served_here(self) -> bool:
        """Whether the caller is on the thread of the event loop that serves this bus, and so must not block."""
        runner = self._runner
        return runner is not None and runner.loop.here

    @property
    def blocked_s(self) -> float:
        """For how long the event loop was blocked while it served this bus, in seconds. Any thread."""
        runner = self._runner
        return runner.blocked_s if runner is not None else 0.0

    @property
    def blocked_now_s(self) -> float:
        """For how long the event loop has not answered now; 0.0 if it answers. Any thread."""
        runner = self._runner
        return runner.blocked_now_s if runner is not None else 0.0

    def blocked_by(self) -> str:
        """Returns which handler holds the event loop now, for messages. Any thread."""
        holding = [s for s in self.table.active if s.cost.slice_began is not None]
        return f"the handler of {holding[0].name}" if holding else "code other than a handler"

    def submit(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Runs a coroutine function on the bus' event loop, from any other thread.

        Raises:
            BusClosed: no event loop serves the bus; from the future's ``result()`` if it stops before the end.
        """
        runner = self._runner
        if runner is None:
            raise BusClosed("The bus is not running, so nothing can be run on its event loop.")
        return runner.submit(function, *args)

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        """See ``EventBus.serve``."""
        with self.table.delivery_lock:
            if self.publish_queue.closed:
                raise BusClosed(
                    f"Cannot start this bus: {self.publish_queue.close_reason}. Make a new EventBus."
                )
            if self._is_served:
                raise ConfigurationError("Cannot start this bus: it is already running. Use it as it is.")
            self._is_served = True
        failure: BaseException | None = None
        try:
            async with anyio.create_task_group() as tasks:
                runner: BusRunner = await tasks.start(self._run)
                watchdog = Watchdog(lambda: self.table.active, runner.ping, **self._watchdog_limits)
                watchdog.start()
                try:
                    yield
                except anyio.get_cancelled_exc_class():
                    raise
                except BaseException as error:  # raised outside of the task group, which would wrap it
                    failure = error
                finally:
                    runner.stop()
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(watchdog.stop, limiter=CapacityLimiter(1))
        finally:
            self._is_served = False
        if failure is not None:
            raise failure

    async def _run(self, *, task_status: TaskStatus[BusRunner]) -> None:
        """Runs routers and workers in a scope of their own, so that stopping them does not cancel the block around."""
        runner: BusRunner | None = None
        try:
            async with anyio.create_task_group() as tasks:
                runner = BusRunner(tasks)
                with self.table.delivery_lock:
                    self._runner = runner
                    self.publish_queue.open(runner)
                    for subscription in self.table.active:
                        if subscription.handler is not None:
                            runner.start_worker(subscription.worker, subscription.name)
                runner.start_task(partial(self.publish_queue.route, runner.publish_wakeup), "publish queue")
                runner.start_task(partial(self.stream.route, runner.stream_wakeup), "training stream")
                runner.start_task(runner.start_tasks, "start")
                runner.start_task(self._report_drops, "drops")
                task_status.started(runner)
                await persist(anyio.sleep_forever)  # inside: a task group that is cancelled ends its tasks
        finally:
            with self.table.delivery_lock:
                self._runner = None
                self.publish_queue.open(None)
            self.stream.clear()
            if runner is not None:
                runner.end()
            self.progress.notify_all()

    async def _report_drops(self) -> None:
        while True:
            await self.clock.sleep(DROP_REPORT_S)
            self._report_all_drops()  # a variable here would keep a subscription alive until the next report

    def _report_all_drops(self) -> None:
        self.notices.publish()
        for subscription in self.table.active:
            subscription.report_drops()

    # --- draining and closing ---------------------------------------------------------------------------------

    async def wait_until_quiet(self, timeout_s: float | None = None) -> dict[str, int]:
        """See ``EventBus.drain``, but raises nothing if a subscription has failed."""
        handler = handler_of_this_task(self.table.active)
        if handler is not None:
            raise WaitsForItself(
                f"{handler.name} waits in its handler until all handlers have finished, itself among them. Drain the "
                "bus in a task that the handler does not wait for."
            )
        with self.clock.timeout(timeout_s):
            await self.progress.wait_until(self._is_quiet)
            self._report_all_drops()
            await self.progress.wait_until(self._is_quiet)
        return self.undelivered()

    def _is_quiet(self) -> bool:
        if not self.running:
            return True
        with self.table.delivery_lock:  # an event on its way from a queue to the subscriptions is in neither
            return (
                not self.publish_queue
                and not self.stream
                and not any(s.pending for s in self.table.active if s.handler is not None)
            )

    def undelivered(self) -> dict[str, int]:
        """Returns subscription name -> events that wait or are being handled, and those that are not routed yet."""
        left = {s.name: s.pending for s in self.table.active if s.handler is not None and s.pending}
        unrouted = self.publish_queue.unrouted() + self.stream.unrouted()
        return {**left, "(unrouted)": unrouted} if unrouted else left

    async def aclose(self, timeout_s: float | None = None) -> dict[str, int]:
        """See ``EventBus.aclose``."""
        timeout_s = self._drain_timeout_s if timeout_s is None else timeout_s
        deadline_s = self.clock.now_s() + timeout_s
        try:
            if not self.publish_queue.closed:
                await self.wait_until_quiet(timeout_s)
                self.close()
                # Events that other threads published between the last look and the closing were accepted.
                await self.wait_until_quiet(max(0.0, deadline_s - self.clock.now_s()))
            left = self.undelivered()
        finally:
            self.close()
            if self._runner is not None:
                self._runner.stop()
        if self.failure is not None:
            raise self.failure
        return left

    def close(self, cause: str = "") -> None:
        """Refuses events from now on and ends the streams. Does not wait. ``cause``: why, if not on request."""
        cause = cause or (str(self.failure) if self.failure is not None else "")
        with self.table.delivery_lock:
            self.publish_queue.close(f"the bus was closed ({cause})" if cause else "the bus was closed")
        for reader in list(self._readers):
            reader.wake()
        self.progress.notify_all()
