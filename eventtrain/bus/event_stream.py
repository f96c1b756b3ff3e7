"""Event stream: reads a subscription with ``async for`` instead of a handler, on any event loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, Self, TypeVar

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from eventtrain.bus.publish_queue import PublishQueue
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.errors import WaitsForItself
from eventtrain.events import LOOP_EVENTS, CheckpointCommitted, CheckpointFailed, Event

E = TypeVar("E", bound=Event)


class EventStream(Generic[E]):
    """Asynchronous iterator over the events of one or more classes. One task at a time. Made by ``EventBus.stream``.

    Created on the event loop that reads it. It ends when the bus was closed, the subscription has ended, or the process
    was asked to end, and the waiting events were read.
    """

    def __init__(self, subscription: SubscriptionCore, publish_queue: PublishQueue) -> None:
        self._subscription = subscription
        self._publish_queue = publish_queue
        self._is_ending = False
        self._loop = LoopThread()
        self._wakeup = subscription.worker.wakeup = Wakeup(self._loop)

    @property
    def end_reason(self) -> str | None:
        """Why no further event will come, after those that wait; None while some may. Any thread.

        For example "the bus was closed", or that the subscription was disabled after failures of its ``where=``.
        """
        if not self._subscription.active:
            return self._subscription.end_reason
        if self._is_ending:
            return "the process was asked to end"
        return self._publish_queue.close_reason if self._publish_queue.closed else None

    def wake(self) -> None:
        """Lets the reader look again. Any thread."""
        self._wakeup.wake()

    def end(self) -> None:
        """Ends the stream behind the waiting events. Any thread; also for signal handlers."""
        self._is_ending = True
        self._loop.run_later(self._wakeup.wake)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        await checkpoint_if_cancelled()
        subscription, queue = self._subscription, self._subscription.queue
        while True:
            try:
                event: Any = queue.take()
            except IndexError:
                if self.end_reason is not None:
                    raise StopAsyncIteration from None
                await self._wakeup.sleep_until(lambda: len(queue) or self.end_reason is not None)
                continue
            subscription.worker.delivered += 1
            subscription.progress.notify_all()  # there is room again
            await cancel_shielded_checkpoint()
            return event


def handler_of_this_task(active: Iterable[SubscriptionCore]) -> SubscriptionCore | None:
    """Returns the subscription, of those in ``active``, whose async handler is the calling task; None if none is."""
    task_id = anyio.get_current_task().id
    return next((s for s in active if task_id in s.worker.task_ids), None)


def require_no_wait_for_itself(
    event_types: tuple[type[Event], ...], active: Iterable[SubscriptionCore]
) -> None:
    """Raises WaitsForItself if this task is a handler for whose end the next event of these classes waits."""
    handler = handler_of_this_task(active)
    if handler is None:
        return
    if handler.in_checkpoints and _all_of(event_types, (CheckpointCommitted, CheckpointFailed)):
        raise WaitsForItself(
            f"{handler.name} waits in its handler for the outcome of a checkpoint, and checkpoints wait for the end of "
            "that handler, because it has state or a finite lag. Handle CheckpointCommitted in a method or "
            "subscription of its own, or wait in a task that the handler does not wait for."
        )
    if handler.filter.holds_the_loop and _all_of(event_types, LOOP_EVENTS):
        names = " or ".join(kind.__name__ for kind in event_types)
        raise WaitsForItself(
            f"{handler.name} waits in its handler for {names}, and training waits for the end of that handler, because "
            "its lag is 0. Subscribe to it, or use a larger lag or lag=None."
        )


def _all_of(event_types: tuple[type[Event], ...], kinds: tuple[type[Event], ...]) -> bool:
    # Otherwise an event of another class may come first.
    return all(issubclass(event_type, kinds) for event_type in event_types)
