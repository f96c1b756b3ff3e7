"""Worker: takes events from one subscription's queue and calls its handler.

All methods run on the event loop's thread. Other threads only call ``wakeup.wake``, append to the queue, and read the
counters: ``delivered``, ``in_flight``, ``passed`` and ``drops_when_taken`` are each written by the worker alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import anyio
from anyio.abc import TaskGroup

from eventtrain.bus.cancellation import own_failure, persist
from eventtrain.bus.failures import Failures
from eventtrain.bus.handler_cost import HandlerCost, fresh_context, measured
from eventtrain.bus.queues import EventQueue, LosslessQueue
from eventtrain.bus.step_series import StepSeries
from eventtrain.bus.wakeup import CrossLoopCondition, LoopThread, Wakeup
from eventtrain.events import Event
from eventtrain.validation.callables import settle

SLICE_TARGET_S = 0.0005
"""Time for which a worker handles events before it suspends for other tasks and for threads that wait for the GIL."""
STRIDE = 8
"""Events between two readings of the clock once the first was quick: a reading costs as much as half a cheap
handler."""


SeriesHandler = Callable[[StepSeries], Awaitable[None]]


class CountedEvent(NamedTuple):
    """Queue item of a subscription with a finite lag, which the training loop counts too."""

    event: Event | None
    """None if ``where`` or ``once`` rejected it: there is nothing to handle, but the loop waits for it."""
    run: int
    """The run that counts it. An item left over by an earlier run must not open a gate of this one."""


class WorkerHost(Protocol):
    """The subscription, as its worker sees it."""

    queue: EventQueue
    failures: Failures
    cost: HandlerCost
    progress: CrossLoopCondition
    run: int

    @property
    def served(self) -> bool:
        """Whether the worker must continue."""
        ...

    @property
    def spent(self) -> bool:
        """Whether it has received its only event, because of ``once``."""
        ...

    def handler_failed(self, event: Event, error: Exception) -> None:
        """The handler failed on ``event`` for good."""
        ...

    def series_failed(self, series: StepSeries, error: Exception) -> None:
        """The handler failed on ``series``."""
        ...

    def finish(self) -> None:
        """Ends the subscription: ``once`` is fulfilled."""
        ...


class Worker:
    """Handles the events of one subscription."""

    def __init__(
        self,
        host: WorkerHost,
        call: Callable[[Event], Awaitable[object]],
        concurrency: int,
        take_series: SeriesHandler | None = None,
    ) -> None:
        self._host = host
        self._call = call
        self._take_series = take_series
        self._concurrency = concurrency
        self.task_ids: set[int] = set()
        """The tasks in which the handler is called."""
        self.context: Context | None = None
        """Copied for the handler: that of the call to ``fit``, during a run of its trainer; None: the task's own."""
        self._copied: Context | None = None  # the one in which the handler runs is a copy of this
        self.wakeup: Wakeup | None = None
        """Woken when there is something to do; None while no event loop serves the bus."""
        self.running_on: LoopThread | None = None
        """Event loop of the task that works; None: no task does. One still busy at the next ``attach`` continues."""
        self.delivered = 0
        self.in_flight = 0
        self.passed = 0
        """Number of counted events of this run that it has finished."""
        self.drops_when_taken = 0
        """Number of events that the queue had dropped when the worker last took one."""
        self.at_boundary: list[Callable[[], Awaitable[None]]] = []
        """Called once, before the next event is taken: contributions to barriers."""

    def attach(self, loop: LoopThread) -> None:
        """Binds the worker to the event loop that will run it, on that loop's thread."""
        self.wakeup = Wakeup(loop)
        self.running_on = loop

    async def work(self) -> None:
        """Passes events to the handler until the subscription ends or is detached, or the task is cancelled."""
        try:
            if self._concurrency == 1:
                self.task_ids = {anyio.get_current_task().id}
                await measured(self._work(), self._host.cost, self._context_copies())
            else:
                await self._work_concurrently()
        finally:
            self.running_on = None

    def _context_copies(self) -> Callable[[], Context]:
        """Returns a function that copies the context for a handler. Call it in the worker's task."""
        own = copy_context()

        def copy() -> Context:
            self._copied = self.context
            return (self._copied or own).copy()

        return copy

    async def _wait_for_work(self) -> bool:
        """Waits for an event; False once the subscription has ended, or is detached."""
        host, queue, wakeup = self._host, self._host.queue, self.wakeup
        assert wakeup is not None

        def is_finished() -> bool:
            return host.spent and not self.in_flight

        while host.served and not queue and not self.at_boundary:
            if is_finished():
                host.finish()
            else:
                await wakeup.sleep_until(
                    lambda: len(queue) or self.at_boundary or not host.served or is_finished()
                )
        return host.served

    # --- one event at a time ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        wakeup = self.wakeup
        assert wakeup is not None
        while await self._wait_for_work():
            self.in_flight += 1
            began_s = perf_counter()
            try:
                await self._reach_boundary()
                await self._handle_some(began_s + SLICE_TARGET_S)
            finally:
                self.in_flight -= 1
                self._host.cost.wall_s += perf_counter() - began_s
            self._host.progress.notify_all()
            await wakeup.let_others_run()
        await self._reach_boundary()

    async def _reach_boundary(self) -> None:
        while self.at_boundary:
            await self.at_boundary[0]()
            self.at_boundary.pop(0)

    async def _handle_some(self, until_s: float) -> None:
        """Handles waiting events until none is left or the time is ``until_s`` (``perf_counter``)."""
        call, host, queue, failures = self._call, self._host, self._host.queue, self._host.failures
        take = queue.take
        stride = 1
        if self._copied is not self.context:
            await fresh_context()
        untouched = copy_context()
        while True:
            self.drops_when_taken = queue.dropped
            for _ in range(stride):
                try:
                    event: Any = take()
                except IndexError:  # none left, or another thread has just cancelled the subscription
                    return
                if type(event) is CountedEvent:
                    await self._handle_counted(event)
                elif type(event) is StepSeries:
                    await self._handle_series(event)
                else:
                    try:
                        if (result := await call(event)) is not None:
                            await settle(result)
                    except BaseException as error:
                        host.handler_failed(event, own_failure(error))
                    else:
                        self.delivered += 1
                        failures.consecutive = 0
                try:  # cheap: an untouched context is the same object inside
                    touched = copy_context() != untouched
                except Exception:  # of a value's __eq__
                    touched = True
                if touched:
                    await fresh_context()
                    untouched = copy_context()
                if self.at_boundary:
                    await self._reach_boundary()
            if perf_counter() >= until_s:
                return
            stride = STRIDE

    async def _handle_counted(self, counted: CountedEvent) -> None:
        """Handles an event that the training loop may be waiting for, and counts it as passed."""
        if counted.event is not None:
            await self._handle(counted.event)
        if counted.run == self._host.run:
            self.passed += 1
            self._host.progress.notify_all()

    async def _handle_series(self, series: StepSeries) -> None:
        host, queue = self._host, self._host.queue
        assert self._take_series is not None
        assert isinstance(queue, LosslessQueue)
        queue.series_taken(len(series))
        try:
            await self._take_series(series)
        except BaseException as error:
            host.series_failed(series, own_failure(error))
        else:
            self.delivered += len(series)
            host.failures.consecutive = 0

    async def _handle(self, event: Event) -> None:
        try:
            if (result := await self._call(event)) is not None:
                await settle(result)
        except BaseException as error:
            self._host.handler_failed(event, own_failure(error))
        else:
            self.delivered += 1
            self._host.failures.consecutive = 0

    # --- several at once ------------------------------------------------------------------------------------

    async def _work_concurrently(self) -> None:
        slots, copy = anyio.Semaphore(self._concurrency), self._context_copies()
        async with anyio.create_task_group() as handlers:  # waits for running handlers at its end
            await persist(partial(self._take_concurrently, handlers, slots, copy))

    async def _take_concurrently(
        self, handlers: TaskGroup, slots: anyio.Semaphore, copy: Callable[[], Context]
    ) -> None:
        while await self._wait_for_work():
            await slots.acquire()
            try:
                event = self._host.queue.take()
            except IndexError:
                slots.release()
                continue
            self.in_flight += 1
            self.drops_when_taken = self._host.queue.dropped
            handlers.start_soon(self._handle_concurrently, event, slots, copy)

    async def _handle_concurrently(
        self, event: Event, slots: anyio.Semaphore, copy: Callable[[], Context]
    ) -> None:
        began_s, task_id = perf_counter(), anyio.get_current_task().id
        self.task_ids.add(task_id)
        try:
            # Slices of one event loop never overlap, so the tasks can share one cost.
            await measured(self._handle(event), self._host.cost, copy)
        finally:
            self.task_ids.discard(task_id)
            self.in_flight -= 1
            self._host.cost.wall_s += perf_counter() - began_s
            slots.release()
            self._host.progress.notify_all()
            if self._host.spent and self.wakeup is not None:
                self.wakeup.wake()
