"""Takes events from one queue and calls the handler, giving way often enough that nobody waits behind it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import anyio
from anyio.lowlevel import checkpoint

from eventtrain.bus.failures import Failures
from eventtrain.bus.filters import EventFilter
from eventtrain.bus.handler_cost import HandlerCost, metered
from eventtrain.bus.handlers import Call
from eventtrain.bus.queues import EventQueue
from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.events import Event

SLICE_TARGET_S = 0.0005
"""How long a worker goes from event to event before it gives way to other tasks and to the GIL's waiters."""
STRIDE = 8
"""Events between two looks at the clock once the first was quick: a look costs as much as half a cheap handler."""


class Gated(NamedTuple):
    """An item of a finite-lag subscription that the loop counts too."""

    event: Event | None
    """None where ``where`` or ``once`` said no: there is nothing to handle, but the loop waits for it."""
    run: int
    """Which run counts it; what an earlier one left over must not open a gate of this one."""


class Claim(Protocol):
    """What a worker asks of its subscription."""

    queue: EventQueue
    selection: EventFilter
    failures: Failures
    run: int

    @property
    def active(self) -> bool:
        """Whether it still takes events."""
        ...

    def failed(self, event: Event, error: Exception) -> None:
        """The handler failed on ``event`` for good."""
        ...

    def finish(self) -> None:
        """``once`` is fulfilled."""
        ...

    def settle(self) -> None:
        """Have everyone who waits look again."""
        ...


class Worker:
    """Handles the events of one subscription, on the event loop's thread."""

    def __init__(self, claim: Claim, call: Call, meter: HandlerCost, concurrency: int) -> None:
        self._claim = claim
        self._call = call
        self._meter = meter
        self._concurrency = concurrency
        self.task: int | None = None
        """Of the event loop: in which the handler is called, where it is called for one event at a time."""
        self.bell: Wakeup | None = None
        """Rung when there is something to look at; None while no event loop serves the bus."""
        self.delivered = 0
        self.in_flight = 0
        self.passed = 0
        """How many items of this run that the loop counts it is through with."""
        self.drops_when_taken = 0
        """What the queue had dropped when the worker last took an event."""
        self.at_boundary: list[Callable[[], Awaitable[None]]] = []
        """Awaited, and forgotten, before the next event is taken: markers of cuts."""

    def attach(self, loop: LoopThread) -> None:
        """Bind to the event loop that will run the worker, on that loop's thread."""
        self.bell = Wakeup(loop)

    async def work(self) -> None:
        """Hand events to the handler until the subscription ends or the task is cancelled."""
        if self._concurrency == 1:
            self.task = anyio.get_current_task().id
            await metered(self._work(), self._meter)
        else:
            await self._work_concurrently()

    async def _has_work(self) -> bool:
        """Wait for an event; False once the subscription has ended."""
        claim, queue, bell = self._claim, self._claim.queue, self.bell
        assert bell is not None

        def has_got_its_once() -> bool:
            return claim.selection.spent and not self.in_flight

        while claim.active and not queue and not self.at_boundary:
            if has_got_its_once():
                claim.finish()
            else:
                await bell.sleep_unless(
                    lambda: len(queue) or self.at_boundary or not claim.active or has_got_its_once()
                )
        return claim.active

    # --- one after the other --------------------------------------------------------------------------------

    async def _work(self) -> None:
        while await self._has_work():
            self.in_flight += 1
            began_s = perf_counter()
            try:
                await self._reach_boundary()
                await self._handle_some(began_s + SLICE_TARGET_S)
            finally:
                self.in_flight -= 1
                self._meter.wall_s += perf_counter() - began_s
            self._claim.settle()
            await checkpoint()
        await self._reach_boundary()

    async def _reach_boundary(self) -> None:
        while self.at_boundary:
            await self.at_boundary[0]()
            self.at_boundary.pop(0)

    async def _handle_some(self, until_s: float) -> None:
        """Handle waiting events until none is left or it is ``until_s`` (``perf_counter``)."""
        call, claim, queue, failures = self._call, self._claim, self._claim.queue, self._claim.failures
        take = queue.take
        stride = 1
        while True:
            self.drops_when_taken = queue.dropped
            for _ in range(stride):
                try:
                    event: Any = take()
                except IndexError:  # none left, or cancelled by another thread just now
                    return
                if type(event) is Gated:
                    await self._decide(event)
                else:
                    try:
                        await call(event)
                    except BaseException as error:
                        claim.failed(event, own_failure(error))
                    else:
                        self.delivered += 1
                        failures.consecutive = 0
                if self.at_boundary:
                    await self._reach_boundary()
            if perf_counter() >= until_s:
                return
            stride = STRIDE

    async def _decide(self, gated: Gated) -> None:
        """Handle an event that the loop may be waiting for, and say that this subscription is through with it."""
        if gated.event is not None:
            await self._handle(gated.event)
        if gated.run == self._claim.run:
            self.passed += 1
            self._claim.settle()

    async def _handle(self, event: Event) -> None:
        try:
            await self._call(event)
        except BaseException as error:
            self._claim.failed(event, own_failure(error))
        else:
            self.delivered += 1
            self._claim.failures.consecutive = 0

    # --- several at once ------------------------------------------------------------------------------------

    async def _work_concurrently(self) -> None:
        slots = anyio.Semaphore(self._concurrency)
        async with anyio.create_task_group() as handlers:  # lets running handlers finish
            while True:
                await slots.acquire()
                if not await self._has_work():
                    return
                self.in_flight += 1
                try:
                    event = self._claim.queue.take()
                except IndexError:
                    self.in_flight -= 1
                    slots.release()
                    continue
                self.drops_when_taken = self._claim.queue.dropped
                handlers.start_soon(self._handle_beside_others, event, slots)

    async def _handle_beside_others(self, event: Event, slots: anyio.Semaphore) -> None:
        began_s = perf_counter()
        try:
            # Slices of one event loop never overlap, so the tasks can share the meter.
            await metered(self._handle(event), self._meter)
        finally:
            self.in_flight -= 1
            self._meter.wall_s += perf_counter() - began_s
            slots.release()
            self._claim.settle()
            if self._claim.selection.spent and self.bell is not None:
                self.bell.ring()


def own_failure(error: BaseException) -> Exception:
    """The failure of a handler; what ends the worker itself is raised again."""
    if isinstance(error, Exception):
        return error
    being_cancelled = anyio.current_effective_deadline() == -math.inf
    if isinstance(error, anyio.get_cancelled_exc_class()) and not being_cancelled:
        # It awaited something that somebody else cancelled. Let through, it would end the worker in silence.
        failure = RuntimeError("the handler awaited something that was cancelled")
        failure.__cause__ = error
        return failure
    raise error
