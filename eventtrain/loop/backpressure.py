"""At the limit of a Lossless queue, training runs at the pace of its subscriber and publishes LoopStalled."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.events import LoopStalled, StepCompleted, StepStarted
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.waiting import WaitingPlace

ROW_EVENTS = (StepCompleted, StepStarted)
STALL_REPORT_S = 0.1
"""Waits for one subscriber are reported by LoopStalled when they add up to this."""


class Backpressure:
    """Keeps the loop from producing more events than the Lossless queues can take. Training thread only."""

    def __init__(self, bus: BusCore, windows: MetricWindows, status: RunStatus, place: WaitingPlace) -> None:
        self._bus = bus
        self._windows = windows
        self._status = status
        self._place = place
        self._offset = bus.stream.rows_routed - status.step
        self._free_until = 0
        self._known: object = None
        self._waited_s: dict[str, float] = {}

    def free_steps(self) -> int:
        """Returns how many steps may be dispatched before a Lossless queue could overflow.

        All queues are looked at when those steps are used up, or other subscriptions are there.
        """
        bus, step = self._bus, self._status.step
        if step >= self._free_until or bus.table.active is not self._known or bus.stream.overfull:
            self._known = bus.table.active
            self._free_until = bus.stream.rows_allowed(ROW_EVENTS) - self._offset
        return self._free_until - step

    def make_room(self) -> bool:
        """Wait until a step may be dispatched. Returns False if the run has to end first."""
        while self.free_steps() <= 0:
            self._windows.flush()
            slowest = self._bus.stream.fullest(ROW_EVENTS)
            if slowest is None:  # the event loop itself is behind
                if not self._place.wait_for_observers(lambda: self.free_steps() > 0):
                    return False
            elif not self.wait_for(slowest, lambda: self.free_steps() > 0):
                return False
        return True

    def wait_for(self, slowest: SubscriptionCore, ready: Callable[[], bool]) -> bool:
        """Wait until ``ready()``, or ``slowest`` has handled an event or has failed to for its ``stall_timeout_s``.

        The time in which another handler blocked the event loop is not its fault. Returns False if the run has to end.
        """
        began_s, handled, blocked_s = monotonic(), slowest.handled, self._bus.blocked_s

        def is_stalled() -> bool:
            return monotonic() - began_s - (self._bus.blocked_s - blocked_s) >= slowest.stall_timeout_s

        def has_moved() -> bool:
            return ready() or slowest.handled != handled or is_stalled()

        if not self._place.wait_for_observers(has_moved):
            return False
        waited_s = monotonic() - began_s
        self._report(slowest.name, waited_s)
        if is_stalled() and slowest.handled == handled:
            slowest.disable_stalled(waited_s)
        return True

    def _report(self, name: str, waited_s: float) -> None:
        waited_s += self._waited_s.get(name, 0.0)
        if waited_s >= STALL_REPORT_S:
            stalled = LoopStalled(step=self._status.step, subscriber=name, waited_s=waited_s)
            self._bus.notices.add((LoopStalled, name), stalled, total="waited_s")
            waited_s = 0.0
        self._waited_s[name] = waited_s
