"""Finds the periodic requests that are due at a boundary: every so many steps, epochs or seconds."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Generic, TypeVar

from eventtrain.control.requests import PeriodicRequest
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.run_status import RunStatus

R = TypeVar("R", bound=PeriodicRequest)


class RequestSchedule(Generic[R]):
    """The requests of one kind, of all subscribers of a run. Training thread only; never blocks."""

    def __init__(self, requests: Sequence[R], status: RunStatus) -> None:
        self._requests = requests
        self._status = status
        self._last_step = status.step

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def by_clock(self) -> bool:
        """Whether a request goes by the clock, so that ``take_due`` has to be asked again and again."""
        return any(request.every_s is not None for request in self._requests)

    def waits(self) -> bool:
        """Returns whether a request that goes by the clock is due."""
        now_s = monotonic()
        return any(r.at_start or (r.every_s is not None and now_s >= r.next_s) for r in self._requests)

    def next_step(self) -> int:
        """Returns the next step after which a request is due; NEVER if none is."""
        step = self._status.step
        return min(
            ((step // r.every + 1) * r.every for r in self._requests if r.every is not None), default=NEVER
        )

    def is_due(self) -> bool:
        """Returns whether a request by step is due at this boundary and was not taken yet."""
        return self._status.step > self._last_step and any(map(self._by_step, self._requests))

    def take_due(self) -> list[R]:
        """Returns the requests by step and by clock that are due at this boundary; each boundary once."""
        step, now_s = self._status.step, monotonic()
        due = [
            request
            for request in self._requests
            if request.at_start
            or (step > self._last_step and self._by_step(request))
            or (request.every_s is not None and now_s >= request.next_s)
        ]
        self._last_step = max(step, self._last_step)
        for request in due:
            request.at_start = False
        return self._taken(due)

    def take_epoch(self, epochs: int) -> list[R]:
        """Returns the requests due at the end of the ``epochs``-th epoch, except those that its last step served."""
        return self._taken(
            [
                request
                for request in self._requests
                if request.every_epochs is not None
                and epochs % request.every_epochs == 0
                and not self._by_step(request)
            ]
        )

    def _by_step(self, request: R) -> bool:
        return request.every is not None and self._status.step % request.every == 0

    @staticmethod
    def _taken(requests: list[R]) -> list[R]:
        for request in requests:
            if request.every_s is not None:
                request.next_s = monotonic() + request.every_s
        return requests
