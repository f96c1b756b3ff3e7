"""Keeps the state of each event that a function of ``trainer.on(..., with_state=True)`` is given."""

from __future__ import annotations

from eventtrain.control.held_states import HeldStates
from eventtrain.events import Event, SnapshotTaken, StepCompleted
from eventtrain.loop.backpressure import Backpressure
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.snapshot_ledger import SnapshotLedger


class LentStates:
    """The states that functions use during a run. Training thread only.

    While training continues, each function has at most one: the loop waits at the next one until it has returned.
    """

    def __init__(
        self,
        status: RunStatus,
        resources: RunResources,
        windows: MetricWindows,
        ledger: SnapshotLedger,
        backpressure: Backpressure,
    ) -> None:
        self._status = status
        self._windows = windows
        self._ledger = ledger
        self._backpressure = backpressure
        self._held: tuple[HeldStates, ...] = tuple(resources.plane.held_states)
        gates = resources.gates
        gates.also_every = tuple(
            held.subscription.options.every for held in self._held if StepCompleted in held.subscription.types
        )
        gates.plan_step_event(status.step)

    def __bool__(self) -> bool:
        return bool(self._held)

    def keep(self, kind: type[Event]) -> None:
        """Keep the present state for the functions that are given the event of class ``kind``, which comes next."""
        step, epoch = self._status.step, self._status.epoch
        for held in self._held:
            if held.wants(kind, step, epoch):
                name = held.subscription.name
                taken = SnapshotTaken(step=step, tag=f"{name}/{step}", epoch=epoch, requested_by=name)
                held.add(kind, self._ledger.take(taken))

    def make_room(self) -> bool:
        """Wait until each function has at most one state. Returns False if the run has to end first."""
        for held in self._held:
            while len(held) > 1:
                if not held.subscription.active:
                    held.clear()
                    break
                self._windows.flush()
                if not self._backpressure.wait_for(held.subscription, lambda held=held: len(held) <= 1):
                    return False
        return True
