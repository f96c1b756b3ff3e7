"""Starts the subscribers of a run, and stops them when everything was handled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Literal, TypeVar

import anyio

from eventtrain.bus.cancellation import own_failure, persist
from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.run_context import RunContext
from eventtrain.errors import BusClosed
from eventtrain.events import SubscriberFailed
from eventtrain.subscribers.base import Subscriber

T = TypeVar("T")

logger = logging.getLogger("eventtrain")

GRACE_S = 0.5
"""How long after its own deadline a task on the event loop may answer."""
LONGEST_GRACE_S = 5.0
"""The same while the event loop answers, so that it is only slow."""


@dataclass(frozen=True)
class RunSubscriber:
    """A subscriber with its subscription, which is detached between runs."""

    subscriber: Subscriber
    subscription: SubscriptionCore

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.subscription.name


class LoopBlocked(Exception):
    """The event loop does not run anything, because a handler holds it."""


class SubscriberLifecycle:
    """The subscribers of one run. Training thread only; every method blocks. Deadlines are in ``monotonic`` time.

    Attributes:
        loop_is_lost: a handler blocked the event loop beyond a deadline, or the bus was stopped, so that subscribers
            can neither handle nor finish anything.
    """

    def __init__(self, bus: BusCore, subscribers: Sequence[RunSubscriber]) -> None:
        self._bus = bus
        self._subscribers = subscribers
        self._started: list[RunSubscriber] = []
        self.loop_is_lost = False

    def start(self, context: RunContext, wait: Callable[[Future[None]], bool]) -> None:
        """Start one after the other; each handles events from then on.

        If one raises, the rest is not started and its error is raised. If the run has to end before all have started,
        the rest is not started either.

        Args:
            context: for ``Subscriber.start``.
            wait: waits for a future, serving commands; returns False if the run has to end first.
        """
        waiting = list(self._subscribers)
        for one in waiting:
            self._bus.attach(one.subscription)
        try:
            while waiting:
                self._started.append(waiting[0])
                if not self._start(waiting[0], context, wait):
                    return
                self._bus.start_worker(waiting.pop(0).subscription)
        except Exception as error:
            error.add_note(f"Raised by the subscriber {self._started[-1].name} when the run started.")
            raise
        finally:
            for one in waiting:
                self._bus.detach(one.subscription)

    def _start(self, one: RunSubscriber, context: RunContext, wait: Callable[[Future[None]], bool]) -> bool:
        scopes: list[anyio.CancelScope] = []

        async def start() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await one.subscriber.start(context)

        async def cancel() -> None:
            for scope in scopes:
                scope.cancel()

        future = self._bus.submit(start)
        if wait(future):
            future.result()
            return True
        self._bus.submit(cancel)
        return False

    def drain(self, deadline_s: float) -> dict[str, int]:
        """Wait for every handler. Returns what was not handled in time, by subscription. Raises BusClosed."""
        if not self.loop_is_lost:
            try:
                quiet = partial(self._bus.wait_until_quiet, max(0.0, deadline_s - monotonic()))
                return self._on_loop(partial(persist, quiet), deadline_s)
            except LoopBlocked:
                pass
        return self._bus.undelivered()

    def stop(self, deadline_s: float, step: int) -> dict[str, int]:
        """Wait for every handler, then stop the subscribers. Returns what was not handled in time, by subscription."""
        try:
            self.drain(deadline_s)
            for one in self._started:
                self._end(one, "finish", deadline_s, step)
            self.drain(deadline_s)
            for one in self._started:
                self._end(one, "stop", deadline_s, step)
            undelivered = self.drain(max(deadline_s, monotonic() + 1.0))
        except BusClosed:
            self.loop_is_lost = True
            undelivered = self._bus.undelivered()
        if self.loop_is_lost:
            self._rescue()
        for one in self._subscribers:
            self._bus.detach(one.subscription)
        return undelivered

    def unwritten(self) -> dict[str, int]:
        """Returns, after ``stop``, what the subscribers handled and could not write or send, by subscription."""
        return {one.name: left for one in self._started if (left := one.subscriber.unwritten)}

    def _on_loop(self, function: Callable[[], Coroutine[Any, Any, T]], deadline_s: float) -> T:
        """Returns what ``function`` returns, which ends by itself at the deadline.

        Raises:
            LoopBlocked: it did not, because the event loop is blocked.
        """
        future = self._bus.submit(function)
        while True:
            late_s = monotonic() - deadline_s
            try:
                return future.result(timeout=max(0.1, GRACE_S - late_s))
            except FutureTimeout:
                if future.done():
                    return future.result()
                late_s = monotonic() - deadline_s
                if late_s > LONGEST_GRACE_S or (late_s >= GRACE_S and self._bus.blocked_now_s > GRACE_S):
                    self.loop_is_lost = True
                    logger.error(
                        "The run ends without its subscribers: %s blocks the event loop.",
                        self._bus.blocked_by(),
                    )
                    raise LoopBlocked from None

    def _end(self, one: RunSubscriber, how: Literal["finish", "stop"], deadline_s: float, step: int) -> None:
        """Call ``finish`` or ``stop``. It is cancelled at the deadline, and not waited for a second after that."""
        if self.loop_is_lost:
            return
        end_s = max(deadline_s, monotonic() + 1.0)

        async def in_time() -> str:
            try:
                with anyio.fail_after(end_s - monotonic()):
                    await getattr(one.subscriber, how)()
            except TimeoutError:
                left = one.subscriber.unwritten if how == "stop" else 0
                return (
                    f"did not finish in time; {left} rows are not written"
                    if left
                    else "did not finish in time"
                )
            except BaseException as error:
                failure = own_failure(error)
                return f"{type(failure).__name__}: {failure}"
            return ""

        try:
            problem = self._on_loop(in_time, end_s)
        except LoopBlocked:
            problem = "the event loop is blocked"
        if problem:
            logger.error("Subscriber %s failed in %s(): %s", one.name, how, problem)
            self._bus.notify(SubscriberFailed(step=step, subscriber=one.name, event_kind=how, error=problem))

    def _rescue(self) -> None:
        for one in self._started:
            try:
                one.subscriber.rescue()
            except Exception as error:
                logger.error(
                    "Subscriber %s failed in rescue(): %s: %s", one.name, type(error).__name__, error
                )
