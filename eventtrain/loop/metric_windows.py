"""The open window: what was dispatched and said since the last flush, and the way it goes to the fetch thread."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from eventtrain.control.loop_statistics import LoopClock
from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.fetcher import Fetcher
from eventtrain.events import Event
from eventtrain.loop.event_builder import TrainWindow
from eventtrain.loop.lag_gates import LagGates


@dataclass(slots=True)
class Position:
    """Where the run is: steps and epochs completed (those on the device counted), steps of the epoch so far."""

    step: int
    epoch: int
    batch: int = 0
    in_epoch: bool = False
    """EpochStarted of ``epoch`` was said, and EpochCompleted was not."""


class MetricWindows:
    """Collects the rows of the ring with what the loop says between them. Training thread only; never blocks.

    Args:
        compiled, carry: whose ring holds the rows.
        fetcher: gets full windows, and what is said while the ring is empty, in one order.
        gates: hear of every event, since some may be decided on.
        position: of the run.
        clock: gets the time that sending takes.
        interval_s: how long a row may wait while the loop runs.
    """

    def __init__(
        self,
        compiled: CompiledStep,
        carry: Carry,
        fetcher: Fetcher,
        gates: LagGates,
        position: Position,
        clock: LoopClock,
        interval_s: float,
    ) -> None:
        self.flush_at_s = 0.0
        """When the open window is due, in ``perf_counter`` time."""
        self._compiled = compiled
        self._carry = carry
        self._fetcher = fetcher
        self._gates = gates
        self._position = position
        self._clock = clock
        self._interval_s = interval_s
        self._notes: list[Event] = []
        self._first_batch = 0

    @property
    def open(self) -> bool:
        """Whether there are rows that were not sent."""
        return self._carry.rows > 0

    def emit(self, event: Event) -> None:
        """Say something in the training stream, behind the steps dispatched so far."""
        self._gates.note(type(event), event.step, getattr(event, "epoch", 0))
        if self.open:
            self._notes.append(event)
        else:
            self._fetcher.put(event)

    def put(self, item: Any) -> None:
        """Send something behind everything dispatched and said so far, and at once."""
        self.flush()
        self._fetcher.put(item)

    def flush(self) -> None:
        """Send the rows to the fetch thread, with what was said between them; go on with a fresh ring."""
        began_s = perf_counter()
        if self.open:
            notes, self._notes = tuple(self._notes), []
            rows, position = self._carry.rows, self._position
            first_step = position.step - rows + 1
            window = TrainWindow(
                first_step, rows, position.epoch, self._first_batch, notes, self._gates.announces_steps
            )
            self._fetcher.put(self._compiled.take_ring(self._carry, window))
        self._first_batch = self._position.batch
        self._gates.flushed()
        now_s = perf_counter()
        self.flush_at_s = now_s + self._interval_s
        self._clock.observing_s += now_s - began_s

    def begin_epoch(self) -> None:
        """Count the batches of a new epoch; everything before was flushed."""
        self._position.batch = self._first_batch = 0
