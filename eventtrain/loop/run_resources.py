"""``RunResources``: what connects the training loop of one run with the other threads."""

from __future__ import annotations

from dataclasses import dataclass

from eventtrain.bus.core import BusCore
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopClock
from eventtrain.device.fetcher import Fetcher
from eventtrain.loop.event_builder import EventBuilder
from eventtrain.loop.lag_gates import LagGates


@dataclass(frozen=True)
class RunResources:
    """Made when a run begins, before the step is compiled.

    Attributes:
        bus: where events are published.
        plane: where commands and requests come from.
        gates: count what subscriptions with a finite lag have to decide on.
        builder: makes the events of the training stream, on the fetch thread.
        fetcher: carries windows of metrics, and events between them, to ``builder`` in one order.
        clock: charges the time of the training thread.
    """

    bus: BusCore
    plane: ControlPlane
    gates: LagGates
    builder: EventBuilder
    fetcher: Fetcher
    clock: LoopClock
