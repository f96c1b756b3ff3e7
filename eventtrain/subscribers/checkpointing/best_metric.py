"""``BestMetric``: the best value that is on disk, for a Checkpointer that writes only improvements. Pure."""

from __future__ import annotations

from typing import Literal

from eventtrain.subscribers._shared.metric_goal import Goal
from eventtrain.subscribers._shared.state import SavedState


class BestMetricState(SavedState):
    """State saved with checkpoints; ``step`` is that of the value, None if it was given as a threshold."""

    version: Literal[1] = 1
    value: float | None = None
    step: int | None = None
    before: float | None = None


class BestMetric:
    """Compares each value with the best one before.

    Args:
        goal: which values are better.
        threshold: the first value must be better than this.
    """

    def __init__(self, goal: Goal, threshold: float | None = None) -> None:
        self._goal = goal
        self.state = BestMetricState(value=threshold)

    def improves(self, value: float, step: int) -> bool:
        """Returns whether ``value`` is better; if so, it is the best from now on."""
        if not self._goal.improves(value, self.state.value):
            return False
        self.state = BestMetricState(value=value, step=step, before=self.state.value)
        return True

    def lost(self, step: int) -> None:
        """Restores the best value before that of ``step``, whose checkpoint was not written."""
        if self.state.step == step:
            self.state = BestMetricState(value=self.state.before)
