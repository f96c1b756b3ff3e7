"""What is wanted every so many steps, epochs or seconds, at exactly those boundaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from eventtrain.control.requests import BoundaryRequest
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.metric_windows import Position


class RequestSchedule:
    """Does what plans ask for where they ask for it. Training thread only; never blocks.

    Args:
        plans: of all subscribers.
        position: of the run.
        carry_out: does it for one plan, at the present boundary.
    """

    def __init__(
        self,
        plans: Sequence[BoundaryRequest],
        position: Position,
        carry_out: Callable[[BoundaryRequest], None],
    ) -> None:
        self._plans = plans
        self._position = position
        self._carry_out = carry_out
        self._last_step = position.step

    def __bool__(self) -> bool:
        return bool(self._plans)

    @property
    def by_clock(self) -> bool:
        """Whether some plan goes by the clock, so that it has to be asked again and again."""
        return any(plan.every_s is not None for plan in self._plans)

    def next_step(self) -> int:
        """The next step after which something is wanted; NEVER if by none."""
        step = self._position.step
        return min(
            ((step // p.every + 1) * p.every for p in self._plans if p.every is not None), default=NEVER
        )

    def is_due(self) -> bool:
        """Whether a plan by step is due at this boundary and was not carried out yet."""
        step = self._position.step
        return step > self._last_step and any(
            p.every is not None and step % p.every == 0 for p in self._plans
        )

    def take_due(self) -> bool:
        """Carry out, at this boundary, the plans by step and by clock that are due; whether there were any."""
        step, now_s, taken = self._position.step, monotonic(), False
        for plan in self._plans:
            by_step = plan.every is not None and step % plan.every == 0 and step > self._last_step
            by_clock = plan.every_s is not None and now_s >= plan.next_s
            if by_step or by_clock or plan.at_start:
                plan.at_start = False
                self._take(plan)
                taken = True
        self._last_step = max(step, self._last_step)
        return taken

    def take_epoch(self, epochs: int) -> None:
        """Carry out, at the end of the ``epochs``-th epoch, the plans by epoch; not those that its last step served."""
        for plan in self._plans:
            by_step_too = plan.every is not None and self._position.step % plan.every == 0
            if plan.every_epochs is not None and epochs % plan.every_epochs == 0 and not by_step_too:
                self._take(plan)

    def _take(self, plan: BoundaryRequest) -> None:
        if plan.every_s is not None:
            plan.next_s = monotonic() + plan.every_s
        self._carry_out(plan)
