"""When Checkpointers want the state: every so many steps, epochs or seconds, at exactly those boundaries."""

from __future__ import annotations

from time import monotonic

from eventtrain.control import CheckpointPlan, ControlRoom
from eventtrain.effects import Effects
from eventtrain.gates import NEVER
from eventtrain.windows import Position, Windows


class CheckpointSchedule:
    """Has the state kept where a plan says so. Training thread only; never blocks."""

    def __init__(self, room: ControlRoom, effects: Effects, windows: Windows, position: Position) -> None:
        self._plans = room.plans
        self._effects = effects
        self._windows = windows
        self._position = position
        self._last_step = position.step

    @property
    def by_clock(self) -> bool:
        """Whether some plan goes by the clock, so that it has to be asked again and again."""
        return any(plan.every_s is not None for plan in self._plans)

    def next_step(self) -> int:
        """The next step after which the state is wanted; NEVER if by none."""
        step = self._position.step
        return min(
            ((step // p.every + 1) * p.every for p in self._plans if p.every is not None), default=NEVER
        )

    def take_due(self) -> None:
        """Keep the state of this boundary for the plans by step and by clock that want it."""
        step, now_s = self._position.step, monotonic()
        for plan in self._plans:
            by_step = plan.every is not None and step % plan.every == 0 and step > self._last_step
            by_clock = plan.every_s is not None and now_s >= plan.next_s
            if by_step or by_clock:
                self._take(plan)
        self._last_step = max(step, self._last_step)

    def take_epoch(self) -> None:
        """An epoch has ended and was decided on: keep its state for the plans by epoch that want it."""
        for plan in self._plans:
            by_step_too = plan.every is not None and self._position.step % plan.every == 0
            if (
                plan.every_epochs is not None
                and self._position.epoch % plan.every_epochs == 0
                and not by_step_too
            ):
                self._take(plan)

    def _take(self, plan: CheckpointPlan) -> None:
        if plan.every_s is not None:
            plan.next_s = monotonic() + plan.every_s
        self._windows.emit(
            self._effects.take_checkpoint(self._position.step, self._position.epoch, None, plan.owner)
        )
