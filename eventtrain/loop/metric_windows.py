"""The open window: the steps dispatched since the last flush, and the events published between them."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.events import Event
from eventtrain.loop.event_builder import TrainWindow
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus


class MetricWindows:
    """Collects the rows of the metric ring and the events between them. Training thread only; never blocks.

    Args:
        compiled, carry: have the ring.
        status, resources: of the run. The fetcher gets full windows, and events while the ring is empty, in one
            order.
        interval_s: how long a row may wait while the loop runs.

    Attributes:
        flush_at_s: when the open window is due, in ``perf_counter`` time.
    """

    def __init__(
        self,
        compiled: CompiledStep,
        carry: Carry,
        status: RunStatus,
        resources: RunResources,
        interval_s: float,
    ) -> None:
        self.flush_at_s = 0.0
        self._compiled = compiled
        self._carry = carry
        self._status = status
        self._fetcher = resources.fetcher
        self._gates = resources.gates
        self._clock = resources.clock
        self._interval_s = interval_s
        self._between: list[Event] = []
        self._first_batch = 0

    @property
    def open(self) -> bool:
        """Whether there are rows that were not sent."""
        return self._carry.rows > 0

    def emit(self, event: Event) -> None:
        """Publish ``event`` in the training stream, behind the steps dispatched so far."""
        self._gates.note(type(event), event.step, getattr(event, "epoch", 0))
        if self.open:
            self._between.append(event)
        else:
            self._fetcher.put(event)

    def put(self, item: Any) -> None:
        """Send ``item`` at once, behind everything dispatched and published so far."""
        self.flush()
        self._fetcher.put(item)

    def flush(self) -> None:
        """Send the rows to the fetch thread, with the events between them. The loop continues with a fresh ring."""
        began_s = perf_counter()
        status = self._status
        if self.open:
            between, self._between = tuple(self._between), []
            rows = self._carry.rows
            window = TrainWindow(
                first_step=status.step - rows + 1,
                rows=rows,
                epoch=status.epoch,
                first_batch=self._first_batch,
                between=between,
                announced=self._gates.announces_steps,
            )
            self._fetcher.put(self._compiled.take_ring(self._carry, window))
        self._first_batch = status.batch
        self._gates.flushed()
        now_s = perf_counter()
        self.flush_at_s = now_s + self._interval_s
        self._clock.observing_s += now_s - began_s

    def begin_epoch(self) -> None:
        """Count batches from 0: a new epoch begins, and everything before was flushed."""
        self._status.batch = self._first_batch = 0
