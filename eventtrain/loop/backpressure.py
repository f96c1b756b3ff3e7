"""At the limit of a Lossless queue training runs at that subscriber's pace, and says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.events import LoopStalled, StepCompleted, StepStarted
from eventtrain.loop.metric_windows import MetricWindows, Position

ROW_EVENTS = (StepCompleted, StepStarted)
STALL_REPORT_S = 0.1
"""How much waiting for one subscriber is worth a LoopStalled event."""


class Backpressure:
    """Keeps the loop from producing what the queues cannot take. Training thread only.

    Args:
        bus: whose queues count.
        windows, position: of the run.
        wait: the loop's waiting place.
    """

    def __init__(
        self,
        bus: BusCore,
        windows: MetricWindows,
        position: Position,
        wait: Callable[[Callable[[], object]], bool],
    ) -> None:
        self._bus = bus
        self._windows = windows
        self._position = position
        self._wait = wait
        self._offset = bus.stream.rows_routed - position.step
        self._waited_s: dict[str, float] = {}

    def free_steps(self) -> int:
        """How many steps may be dispatched before some Lossless queue could overflow."""
        return self._bus.stream.rows_allowed(ROW_EVENTS) - self._offset - self._position.step

    def make_room(self) -> bool:
        """Wait until a step may be dispatched. False: the run has to end first."""
        while self.free_steps() <= 0:
            self._windows.flush()
            slowest = self._bus.stream.fullest(ROW_EVENTS)
            if slowest is None:  # the event loop itself is behind
                if not self._wait(lambda: self.free_steps() > 0):
                    return False
                continue
            began_s, handled = monotonic(), slowest.handled
            deadline_s = began_s + slowest.stall_timeout_s
            if not self._wait(partial(self._has_moved, slowest, handled, deadline_s)):
                return False
            self._report(slowest.name, monotonic() - began_s)
            if monotonic() >= deadline_s and slowest.handled == handled:
                slowest.disable_stalled(monotonic() - began_s)
        return True

    def _has_moved(self, slowest: SubscriptionCore, handled: int, deadline_s: float) -> bool:
        return self.free_steps() > 0 or slowest.handled != handled or monotonic() >= deadline_s

    def _report(self, name: str, waited_s: float) -> None:
        waited_s += self._waited_s.get(name, 0.0)
        if waited_s >= STALL_REPORT_S:
            self._bus.notify(LoopStalled(step=self._position.step, subscriber=name, waited_s=waited_s))
            waited_s = 0.0
        self._waited_s[name] = waited_s
