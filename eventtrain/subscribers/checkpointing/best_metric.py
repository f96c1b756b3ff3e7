"""``BestSoFar``: the best value that is on disk, for a Checkpointer that writes nothing else. Pure."""

from __future__ import annotations

from typing import Literal

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.metric_goal import Goal, Mode, make_goal
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_number


class BestState(SavedState):
    """What survives a restart; ``step`` is that of the value, None where it was given as a threshold."""

    version: Literal[1] = 1
    value: float | None = None
    step: int | None = None
    before: float | None = None


class BestSoFar:
    """Says whether a value is better than every one before.

    Args:
        goal: what is better.
        threshold: what the first one has to be better than.
    """

    def __init__(self, goal: Goal, threshold: float | None = None) -> None:
        self._goal = goal
        self.state = BestState(value=threshold)

    def improves(self, value: float, step: int) -> bool:
        """Whether ``value`` is better, and then remember it."""
        if not self._goal.improves(value, self.state.value):
            return False
        self.state = BestState(value=value, step=step, before=self.state.value)
        return True

    def lost(self, step: int) -> None:
        """That of ``step`` was not written, so it is not to be beaten."""
        if self.state.step == step:
            self.state = BestState(value=self.state.before)


def goal_of(monitor: str | None, mode: Mode) -> Goal:
    """What is better, by a Checkpointer's arguments. Raises ConfigurationError: they do not say it."""
    if monitor is None:
        raise ConfigurationError(
            'Checkpointer(save_best_only=..., keep_best=...): say what is best, with monitor="val_loss".'
        )
    return make_goal("Checkpointer", monitor, mode, 0.0)


def require_decidable(
    save_best_only: bool, every: int | None, every_s: float | None, threshold: float | None
) -> None:
    """Raise ConfigurationError where a Checkpointer's arguments for the best one contradict each other."""
    if save_best_only and not (every is None and every_s is None):
        raise ConfigurationError(
            f"Checkpointer(save_best_only=True, every={every!r}, every_s={every_s!r}): it goes by the ends of epochs, "
            "where the metric is measured. For the best ones between them evaluate there, with EvaluateEvery, and pass "
            'monitor_unit="evaluations".'
        )
    if threshold is not None:
        require_number("Checkpointer", "initial_value_threshold", threshold)
        if not save_best_only:
            raise ConfigurationError(
                f"Checkpointer(initial_value_threshold={threshold!r}): needs save_best_only=True."
            )
