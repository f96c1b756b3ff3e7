"""``JobThread``: what a subscriber has to wait for, done in a thread of its own, and said when it is done."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial

from eventtrain.errors import BusClosed, QueueFull
from eventtrain.events import Event
from eventtrain.subscribers._shared.own_thread import in_own_thread

logger = logging.getLogger("eventtrain")

QUEUE_FULL_S = 0.01


class JobThread(threading.Thread):
    """Does jobs one after the other, in the order in which they came.

    A daemon: a job that hangs does not keep the program from ending.

    Args:
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
    """

    def __init__(self, owner: str, publish: Callable[[Event], None]) -> None:
        super().__init__(name=f"eventtrain {owner}", daemon=True)
        self._publish = publish
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.stopping = threading.Event()
        """Jobs are to end soon, and to say nothing any more."""

    def put(self, job: Callable[[], None]) -> None:
        """Have ``job`` done; what it raises is only logged. Never blocks; any thread."""
        self._jobs.put(job)

    def finish(self, timeout_s: float) -> bool:
        """Take no more jobs, and wait for those there are; whether ``timeout_s`` was enough. Blocks."""
        self._jobs.put(None)
        self.join(timeout_s)
        self.stopping.set()
        return not self.is_alive()

    async def finish_within(self, timeout_s: float, give_up: Callable[[], None] | None = None) -> bool:
        """As ``finish``, from the event loop, which goes on.

        Args:
            timeout_s: seconds.
            give_up: called where that was not enough, or where this is cancelled: the trainer's ``drain_timeout_s`` may
                be shorter. It says what is left.
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
        """Work until ``finish``."""
        while (job := self._jobs.get()) is not None and not self.stopping.is_set():
            try:
                job()
            except Exception as error:  # its text may hold secrets
                logger.error("%s: a job raised %s", self.name, type(error).__name__)

    def say(self, event: Event) -> None:
        """Publish; waits while a Lossless queue is at its limit, since no event may be lost. Within a job."""
        while not self.stopping.is_set():
            try:
                self._publish(event)
                return
            except QueueFull:
                self.stopping.wait(QUEUE_FULL_S)
            except BusClosed:
                break
        logger.warning("Nobody hears of %s (step %d): the bus has ended", event.kind, event.step)
