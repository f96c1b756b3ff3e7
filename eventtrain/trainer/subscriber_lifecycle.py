"""Starts the subscribers of a run, and stops them when everything was handled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from time import monotonic
from typing import Literal

import anyio

from eventtrain.bus.core import BusCore
from eventtrain.errors import BusClosed, EventTrainError
from eventtrain.events import SubscriberFailed
from eventtrain.subscribers.base import RunContext, Subscriber

logger = logging.getLogger("eventtrain")


class SubscriberLifecycle:
    """The subscribers of one run. Training thread only; every method blocks. Deadlines are in ``monotonic`` time."""

    def __init__(self, bus: BusCore, subscribers: Sequence[Subscriber]) -> None:
        self._bus = bus
        self._subscribers = subscribers
        self._started: list[Subscriber] = []

    def start(self, context: RunContext) -> None:
        """Start one after the other. If one raises, the rest is not started and its error is raised."""
        for subscriber in self._subscribers:
            self._started.append(subscriber)
            try:
                self._bus.submit(subscriber.start, context).result()
            except EventTrainError as error:
                name = subscriber.name or type(subscriber).__name__
                error.add_note(f"Raised by the subscriber {name} when the run started.")
                raise

    def drain(self, deadline_s: float) -> dict[str, int]:
        """Wait for every handler. Returns what was not handled in time, by subscription. Raises BusClosed."""
        return self._bus.submit(
            partial(self._bus.wait_until_quiet, max(0.0, deadline_s - monotonic()))
        ).result()

    def stop(self, deadline_s: float, step: int) -> dict[str, int]:
        """Wait for every handler, then stop the subscribers. Returns what was not handled in time, by subscription."""
        try:
            self.drain(deadline_s)
            for subscriber in self._started:
                self._end(subscriber, "finish", deadline_s, step)
            self.drain(deadline_s)
            for subscriber in self._started:
                self._end(subscriber, "stop", deadline_s, step)
            return self.drain(max(deadline_s, monotonic() + 1.0))
        except BusClosed:
            return self._bus.undelivered()

    def _end(
        self, subscriber: Subscriber, how: Literal["finish", "stop"], deadline_s: float, step: int
    ) -> None:
        """Call ``finish`` or ``stop``. It is cancelled at the deadline, and not waited for a second after that."""
        name = subscriber.name or type(subscriber).__name__
        timeout_s = max(1.0, deadline_s - monotonic())

        async def in_time() -> None:
            with anyio.fail_after(timeout_s):
                await getattr(subscriber, how)()

        try:
            self._bus.submit(in_time).result(timeout=timeout_s + 1.0)
        except BusClosed:
            raise
        except Exception as error:
            text = (
                "did not finish in time"
                if isinstance(error, FutureTimeout)
                else f"{type(error).__name__}: {error}"
            )
            logger.error("Subscriber %s failed in %s(): %s", name, how, text)
            self._bus.notify(SubscriberFailed(step=step, subscriber=name, event_kind=how, error=text))
