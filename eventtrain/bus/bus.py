"""``EventBus``: publish from any thread, one queue and one worker per subscription."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from eventtrain.bus.clock import Clock
from eventtrain.bus.core import BusCore
from eventtrain.bus.event_stream import EventStream
from eventtrain.bus.handlers import Handler, HandlerDecorator
from eventtrain.bus.options import StreamOptions, SubscriptionOptions, event_classes
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.errors import BusClosed
from eventtrain.events import Event
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

if TYPE_CHECKING:
    from eventtrain.bus.options import EventTypesOf

logger = logging.getLogger("eventtrain")

E = TypeVar("E", bound=Event)


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
        block_warning_s: a handler that blocks the event loop for longer is named in a warning.
        cpu_budget: share of one CPU core; a handler that uses more over a second is named in a warning.
        clock: the source of time; tests pass ``eventtrain.testing.FakeClock()``.
    """

    @checked
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
        require_count("EventBus", "buffer_limit", buffer_limit, at_least=1)
        require_number("EventBus", "drain_timeout_s", drain_timeout_s, at_least=0)
        require_number("EventBus", "block_warning_s", block_warning_s, above=0)
        require_number("EventBus", "cpu_budget", cpu_budget, above=0)
        self._core = BusCore(
            run_id=run_id,
            buffer_limit=buffer_limit,
            drain_timeout_s=drain_timeout_s,
            block_warning_s=block_warning_s,
            cpu_budget=cpu_budget,
            clock=clock if clock is not None else Clock(),
        )
        self._publish_queue = self._core.publish_queue  # two calls, not three, on the hot path
        self._exit_stack: AsyncExitStack | None = None

    @property
    def run_id(self) -> str:
        """Stamped on events that carry none; a trainer sets it to that of its run."""
        return self._core.run_id

    # --- publishing -----------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Publishes ``event``. Any thread, also inside handlers; never blocks.

        Before the bus is started events are kept, for the subscriptions made by then. The bus stamps ``run_id``,
        ``attempt``, ``stream``, ``seq`` and ``time`` before delivery.

        Raises:
            QueueFull: a Lossless queue that wants it is at its limit (or the buffer is); nothing was published.
            EventReused: this very instance was published before.
            BusClosed: the bus was closed.
        """
        self._publish_queue.publish(event)

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. Any event loop.

        If it is cancelled while it waits, the event was not published.

        Raises:
            WaitsForItself: the queue at its limit is that of the calling handler.
        """
        await self._core.publish_async(event)

    # --- subscribing ----------------------------------------------------------------------------------------

    def subscribe(
        self,
        event_type: EventTypesOf[E],
        handler: Callable[[E], object] | Callable[[E, Any], object],
        **options: Unpack[SubscriptionOptions[E]],
    ) -> Subscription:
        """Calls ``handler`` for events of ``event_type``. Any thread; never blocks.

        In a notebook a function replaces one of the same name that an earlier cell subscribed, with a warning.

        Args:
            event_type: a class, a base class (``Event`` for everything), a union or a tuple.
            handler: ``(event)`` or ``(event, control)``; async, or a plain function, which runs in a worker thread.
            options: ``SubscriptionOptions``.

        Raises:
            ConfigurationError: an option, a combination of options, or a handler that cannot work.
            BusClosed: the bus was closed.
        """
        return Subscription(self._core.subscribe(event_type, handler, options))

    def on(
        self, event_type: EventTypesOf[E], **options: Unpack[SubscriptionOptions[E]]
    ) -> HandlerDecorator[E, Any]:
        """Decorator form of ``subscribe``; returns the function unchanged."""
        event_classes(event_type)  # @bus.on without arguments would subscribe nothing: refuse it now

        def subscribe(handler: Handler) -> Handler:
            self._core.subscribe(event_type, handler, options)
            return handler

        return subscribe

    @overload
    def stream(
        self, event_type: EventTypesOf[E], **options: Unpack[StreamOptions[E]]
    ) -> AbstractAsyncContextManager[EventStream[E]]: ...
    @overload
    def stream(
        self, event_type: type[E], *more: type[E], **options: Unpack[StreamOptions[E]]
    ) -> AbstractAsyncContextManager[EventStream[E]]: ...
    def stream(
        self, event_type: Any, *more: Any, **options: Any
    ) -> AbstractAsyncContextManager[EventStream[Any]]:
        """Iterates over events: ``async with bus.stream(T) as events: async for event in events: ...``.

        Any event loop. The iteration ends when the bus was closed, the subscription has ended, or the process is asked
        to end (SIGTERM or SIGINT reaches the signal handler of a server on this thread), and the events before that
        were read; ``events.end_reason`` says why. Draining does not wait for the reader.

        Args:
            event_type: as for ``subscribe``.
            more: further event classes.
            options: ``StreamOptions``.

        Raises:
            WaitsForItself: as ``wait_for``.
        """
        return self._core.open_stream((event_type, *more), options)

    @overload
    async def wait_for(
        self,
        event_type: EventTypesOf[E],
        *,
        where: Callable[[E], bool] | None = None,
        timeout_s: float | None = None,
    ) -> E: ...
    @overload
    async def wait_for(
        self,
        event_type: type[E],
        *more: type[E],
        where: Callable[[E], bool] | None = None,
        timeout_s: float | None = None,
    ) -> E: ...
    async def wait_for(
        self,
        event_type: Any,
        *more: Any,
        where: Callable[[Any], bool] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Returns the next event of ``event_type``, or of ``more`` classes, published from now on.

        Args:
            event_type: as for ``subscribe``.
            more: further event classes.
            where: only an event for which this predicate is true.
            timeout_s: how long to wait, in seconds; None: without a limit.

        Raises:
            TimeoutError: none came within ``timeout_s``.
            BusClosed: none can come any more; the message says why, for example that the bus was closed.
            WaitsForItself: a handler waits for an event that waits for the end of the handler: CheckpointCommitted or
                CheckpointFailed, if its subscription takes part in checkpoints; any event of the training loop, if
                its lag is 0.
        """
        core, types = self._core, event_classes((event_type, *more))
        wanted = " or ".join(kind.__name__ for kind in types)
        with core.clock.timeout(timeout_s):
            async with core.open_stream(
                types, {"where": where, "once": True, "name": f"wait_for {wanted}"}
            ) as events:
                async for event in events:
                    return event
                reason = events.end_reason
            raise BusClosed(f"No {wanted} came: {reason}.")
        raise TimeoutError(f"No {wanted} came within timeout_s={timeout_s} s.")

    # --- running ----------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an event loop serves this bus now."""
        return self._core.running

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[Self]:
        """Runs the bus for the length of the block, without draining at its end and without closing it.

        Subscriptions survive, so a bus can be served again. Workers still busy at the end are cancelled.
        """
        async with self._core.serve():
            yield self

    async def drain(self, timeout_s: float | None = None) -> dict[str, int]:
        """Waits until everything published has been handled, including what handlers publish meanwhile.

        Any event loop, but not inside a handler, which would wait for itself.

        Returns:
            The events not handled after ``timeout_s`` seconds: subscription name -> number. Empty if there are none.

        Raises:
            SubscriberError: a subscription with ``on_error="fail"`` failed.
            WaitsForItself: it was called in a handler.
        """
        left = await self._core.wait_until_quiet(timeout_s)
        if self._core.failure is not None:
            raise self._core.failure
        return left

    async def aclose(self, timeout_s: float | None = None) -> dict[str, int]:
        """Drains, then stops for good: later calls of ``publish`` raise BusClosed. Idempotent; any event loop.

        Returns:
            As ``drain``: the events not handled within ``timeout_s`` (default: the bus' ``drain_timeout_s``).
        """
        return await self._core.aclose(timeout_s)

    async def __aenter__(self) -> Self:
        stack = AsyncExitStack()
        await stack.enter_async_context(self._core.serve())
        self._exit_stack = stack
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        stack, self._exit_stack = self._exit_stack, None
        assert stack is not None
        try:
            if error is None:
                left = await self.aclose()
                if left:
                    listing = ", ".join(f"{name}: {count}" for name, count in left.items())
                    logger.warning("The bus was closed before everything was handled; left over: %s", listing)
        finally:
            self._core.close(f"its block raised {type(error).__name__}: {error}" if error is not None else "")
            suppressed = await stack.__aexit__(error_type, error, traceback)
        return suppressed

    # --- figures ----------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """Returns the figures of every subscription by name, disabled ones included. Any thread; never blocks."""
        return self._core.statistics()

    @property
    def subscriptions(self) -> tuple[Subscription, ...]:
        """The active subscriptions, those disabled after failures, and those of trainers that do not run now."""
        return tuple(Subscription(core) for core in self._core.subscriptions)


def core_of(bus: EventBus) -> BusCore:
    """Returns the core of ``bus``, for the training side of eventtrain. It is not for users."""
    return bus._core  # pyright: ignore[reportPrivateUsage]  # the one place outside of the class
