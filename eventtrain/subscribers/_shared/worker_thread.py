"""``WorkerThread`` and ``in_own_thread``: blocking work of subscribers, off the event loop.

A ``WorkerThread`` never keeps a program alive. A call of ``in_own_thread`` does until it returns, if asyncio runs on
the main thread. So work that may hang belongs in a ``WorkerThread``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread

from eventtrain.errors import BusClosed, QueueFull
from eventtrain.events import Event

T = TypeVar("T")

logger = logging.getLogger("eventtrain")

QUEUE_FULL_S = 0.01


async def in_own_thread(call: Callable[[], T]) -> T:
    """Returns what ``call`` returns, run in a thread of its own. If cancelled, the thread is left to finish alone."""
    # A limiter of its own: anyio's would make it wait for forty blocked handlers of a service, and under trio a call
    # that was left behind keeps its place in a limiter that several calls share.
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


def publish_waiting(
    publish: Callable[[Event], None], event: Event, stopping: threading.Event | None = None
) -> None:
    """Publishes ``event`` from a worker thread; waits while a Lossless queue is at its limit, so no event is lost.

    If the bus is closed, or once ``stopping`` is set, the event is dropped with a warning in the log. Blocks.
    """
    stopping = stopping or threading.Event()
    while not stopping.is_set():
        try:
            publish(event)
            return
        except QueueFull:
            stopping.wait(QUEUE_FULL_S)
        except BusClosed:
            break
    logger.warning("%s of step %d was not published: the bus is closed", event.kind, event.step)


class WorkerThread(threading.Thread):
    """Runs jobs one at a time, in the order in which they were put.

    A daemon: a job that hangs does not keep the program alive.

    Args:
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
    """

    def __init__(self, owner: str, publish: Callable[[Event], None]) -> None:
        super().__init__(name=f"eventtrain {owner}", daemon=True)
        self._publish = publish
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stopping = threading.Event()
        """Set when jobs must end soon and publish nothing more."""

    def put(self, job: Callable[[], None]) -> None:
        """Queues ``job``; an exception that it raises is only logged. Never blocks; any thread."""
        self._jobs.put(job)

    def finish(self, timeout_s: float) -> bool:
        """Ends the thread after the jobs put so far; returns whether it ended within ``timeout_s``. Blocks."""
        self._jobs.put(None)
        self.join(timeout_s)
        self.stopping.set()
        return not self.is_alive()

    async def finish_within(self, timeout_s: float, give_up: Callable[[], None] | None = None) -> bool:
        """``finish`` without blocking the event loop.

        Args:
            timeout_s: seconds.
            give_up: called if that was too short, or if this call is cancelled, since the trainer's
                ``drain_timeout_s`` may be shorter; it reports what was not done.
        """
        in_time = False
        try:
            in_time = await in_own_thread(partial(self.finish, timeout_s))
        finally:
            self.stopping.set()
            if not in_time and give_up is not None:
                give_up()
        return in_time

    def run(self) -> None:
        """Runs jobs until ``finish``."""
        while (job := self._jobs.get()) is not None and not self.stopping.is_set():
            try:
                job()
            except Exception as error:  # its text may contain secrets
                logger.error("%s: a job raised %s", self.name, type(error).__name__)

    def publish(self, event: Event) -> None:
        """Publishes ``event``, as ``publish_waiting`` does, until ``stopping`` is set. Only for jobs."""
        publish_waiting(self._publish, event, self.stopping)
