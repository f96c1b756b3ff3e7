"""``HyperparamScheduler``: any injected hyperparameter as a function of the epoch or the step."""

from __future__ import annotations

from eventtrain.subscribers.policies.patience_units import STEP_LAG
from eventtrain.subscribers.policies.scheduler_base import ScheduleFollower
from eventtrain.subscribers.policies.schedules import By, Schedule


class HyperparamScheduler(ScheduleFollower):
    """Like ``LearningRateScheduler``, for whatever ``optax.inject_hyperparams`` holds: weight decay, momentum, b1.

    Args:
        hyperparam: its name, as the optimiser's factory calls it: "weight_decay".
        schedule, by, path, lag: as for ``LearningRateScheduler``; ``schedule(epoch, value)`` gets this hyperparameter's
            value in effect.

    Several of them can follow several hyperparameters; give each a ``name``. Failures and costs are those of
    ``LearningRateScheduler``.

    Raises:
        ConfigurationError: ``schedule`` is no function that can be called so, an unknown ``by``, a negative ``lag``.
    """

    def __init__(
        self,
        hyperparam: str,
        schedule: Schedule,
        by: By = "epoch",
        *,
        path: str | None = None,
        lag: int = STEP_LAG,
    ) -> None:
        super().__init__(hyperparam, schedule, by, path, lag)
