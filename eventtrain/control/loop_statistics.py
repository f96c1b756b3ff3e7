"""Where the training thread's time goes. A few clock readings a step; what reads them may be on any thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """Where the training thread's time went since the run began, in seconds; no moment counts twice.

    What is left of ``duration_s`` went to compiling, evaluating, commands, pauses and, in a ``session``, your own code.
    """

    step: int = 0
    """Completed in all, those that are still on the device counted."""
    steps: int = 0
    """Of them, those of this run; since it resumed, of one that did."""
    duration_s: float = 0.0
    """Since the run began, and to its end at most."""
    data_wait_s: float = 0.0
    """Getting batches. Not those that you hand to ``session.step``, nor those of evaluations."""
    dispatch_s: float = 0.0
    """In the compiled step: its dispatch, and on some backends the computation; compiling for a new kind of batch."""
    device_wait_s: float = 0.0
    """Waiting for the device, because the loop was ``max_in_flight_steps`` ahead of it."""
    observer_wait_s: float = 0.0
    """Waiting for subscribers: decisions that were due, full queues, writers of checkpoints."""
    observing_s: float = 0.0
    """Handing windows of metrics over, and keeping count of what is to be decided."""


class LoopClock:
    """Adds up the times of ``LoopStatistics``. Written by the training thread; readable from any."""

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
        """The run has ended: ``duration_s`` stays as it is."""
        self._ended_s = perf_counter()

    def for_data(self, fetch: Callable[[], T]) -> T:
        """Charge the time of ``fetch()``, but for what it waits for observers."""
        began_s, waited_s = perf_counter(), self.observer_wait_s
        fetched = fetch()
        self.data_wait_s += perf_counter() - began_s - (self.observer_wait_s - waited_s)
        return fetched

    def for_observers(self, wait: Callable[[], T]) -> T:
        """Charge the time of ``wait()``, once where such waits are nested."""
        began_s, waited_s = perf_counter(), self.observer_wait_s
        try:
            return wait()
        finally:
            self.observer_wait_s = waited_s + perf_counter() - began_s

    def read(self, step: int, steps: int) -> LoopStatistics:
        """The figures of this moment."""
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
