"""Reads one subscription's events with ``async for`` instead of a handler, on any event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from eventtrain.bus.options import EventTypes, event_classes
from eventtrain.bus.subscription import Subscription
from eventtrain.bus.wakeup import LoopThread, Wakeup
from eventtrain.errors import WaitsForItself
from eventtrain.events import CheckpointCommitted, CheckpointFailed


class EventStream:
    """An asynchronous iterator over the events of a subscription without a handler. For one task at a time.

    Made on the event loop that will read. It ends when the bus was closed (or the subscription ended) and what waited
    was read.
    """

    def __init__(self, subscription: Subscription, is_closed: Callable[[], bool]) -> None:
        self._subscription = subscription
        self._is_closed = is_closed
        self._bell = subscription.worker.bell = Wakeup(LoopThread())

    def wake(self) -> None:
        """Have it look again. Any thread."""
        self._bell.ring()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        await checkpoint_if_cancelled()
        subscription, queue = self._subscription, self._subscription.queue
        while True:
            try:
                event = queue.take()
            except IndexError:
                if self._is_closed() or not subscription.active:
                    raise StopAsyncIteration from None
                await self._bell.sleep_unless(
                    lambda: len(queue) or self._is_closed() or not subscription.active
                )
                continue
            subscription.worker.delivered += 1
            subscription.settle()  # there is room again
            await cancel_shielded_checkpoint()
            return event


def require_no_wait_for_itself(event_type: EventTypes, active: Iterable[Subscription]) -> None:
    """Raise WaitsForItself if this task is a handler of one of ``active`` that a checkpoint waits for."""
    if not all(
        issubclass(kind, (CheckpointCommitted, CheckpointFailed)) for kind in event_classes(event_type)
    ):
        return  # something else may come first
    task = anyio.get_current_task().id
    for subscription in active:
        if subscription.takes_part and subscription.worker.task == task:
            raise WaitsForItself(
                f"{subscription.name} waits in its handler for the outcome of a checkpoint, and checkpoints wait "
                "for the end of that handler, since it has state or a finite lag. Handle CheckpointCommitted in a "
                "method or subscription of its own, or wait in a task that the handler does not wait for."
            )
