"""The training thread's time by what it was spent on. Costs a few clock readings a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """The training thread's time since the run began, in seconds, by what it was spent on. No moment counts twice.

    The rest of ``duration_s`` is compiling, evaluating, commands, pauses and, in a ``session``, your own code.
    """

    step: int = 0
    """Steps completed, including those still on the device."""
    steps: int = 0
    """Steps of this run; of a run that resumed, since then."""
    duration_s: float = 0.0
    """From the beginning of the run, to its end at most."""
    data_wait_s: float = 0.0
    """Getting batches, except those given to ``session.step`` and those of evaluations."""
    dispatch_s: float = 0.0
    """Calling the compiled step: dispatch, on some backends the computation, and compiling for a new kind of batch."""
    device_wait_s: float = 0.0
    """Waiting for the device, because the loop was ``max_in_flight_steps`` ahead of it."""
    observer_wait_s: float = 0.0
    """Waiting for subscribers: decisions that were due, full queues, checkpoints being written."""
    observing_s: float = 0.0
    """Handing over windows of metrics, and counting the events that subscriptions with a finite lag decide on."""


class LoopClock:
    """Accumulates the times of ``LoopStatistics``. Written by the training thread, readable from any."""

    __slots__ = (
        "_began_s",
        "_ended_s",
        "data_wait_s",
        "device_wait_s",
        "dispatch_s",
        "observer_wait_s",
        "observing_s",
    )

    def __init__(self) -> None:
        self._began_s = perf_counter()
        self._ended_s: float | None = None
        self.data_wait_s = 0.0
        self.dispatch_s = 0.0
        self.device_wait_s = 0.0
        self.observer_wait_s = 0.0
        self.observing_s = 0.0

    def stop(self) -> None:
        """Stop ``duration_s``: the run has ended."""
        self._ended_s = perf_counter()

    def for_data(self, fetch: Callable[[], T]) -> T:
        """Charge the time of ``fetch()`` to data, except what it waited for observers."""
        began_s, waited_s = perf_counter(), self.observer_wait_s
        fetched = fetch()
        self.data_wait_s += perf_counter() - began_s - (self.observer_wait_s - waited_s)
        return fetched

    def for_observers(self, wait: Callable[[], T]) -> T:
        """Charge the time of ``wait()`` to observers, once if such waits are nested."""
        began_s, waited_s = perf_counter(), self.observer_wait_s
        try:
            return wait()
        finally:
            self.observer_wait_s = waited_s + perf_counter() - began_s

    def read(self, step: int, steps: int) -> LoopStatistics:
        """Returns the figures of this moment."""
        now_s = self._ended_s if self._ended_s is not None else perf_counter()
        return LoopStatistics(
            step,
            steps,
            now_s - self._began_s,
            self.data_wait_s,
            self.dispatch_s,
            self.device_wait_s,
            self.observer_wait_s,
            self.observing_s,
        )
