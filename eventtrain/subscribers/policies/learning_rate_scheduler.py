"""``LearningRateScheduler``: the learning rate as a function of the epoch or the step."""

from __future__ import annotations

from eventtrain.subscribers.policies.patience_units import STEP_LAG
from eventtrain.subscribers.policies.scheduler_base import ScheduleFollower
from eventtrain.subscribers.policies.schedules import By, Schedule


class LearningRateScheduler(ScheduleFollower):
    """Sets the learning rate for each epoch, as Keras 3 does, or for each step, as an optax schedule in the optimiser.

    Args:
        schedule: ``schedule(epoch)``, ``schedule(epoch, lr)`` (whichever its signature takes; ``lr`` is the value in
            effect) or, by step, ``schedule(step)``: a number from a number. Any schedule of optax is one. The
            polynomial ``eta0 * max(0, 1 - t/T) ** r`` is ``optax.polynomial_schedule(eta0, 0.0, r, T)``. It is called
            on the event loop (the first time in a thread), and must depend on its arguments only. In a config file: a
            table with the ``name`` of a schedule of optax and its arguments.
        by: "epoch": the 0-based epoch, counted on over calls of ``fit``; set before its first step (``lag=0``).
            "step": the steps completed; ``schedule(k)`` is what step k + 1 is computed with, for every step.
        hyperparam: its name in ``optax.inject_hyperparams``, built with a number and not with a schedule.
        path: of the hyperparameter, where the name stands in several places.
        lag: by step only: how many steps ahead values are sent at least. It changes no value; where it is too small the
            loop waits for this subscriber.

    By epoch a value is sent where it differs in float32 from the one in effect, so that the schedule wins over what
    others did meanwhile. By step it is sent where it differs from the one sent before (and after a restore), so that
    what others set stays until the schedule's next change. By step the schedule is asked up to ``1.5 * lag`` steps
    ahead, also beyond the end of the run; what was sent for there is rejected when the run ends.

    By epoch it costs nothing per step. By step each change costs a command, its two events and the transfer of a
    scalar: 0.25 ms on two cores that also train (a step of 0.75 ms then took 1.38 times as long, whatever the lag; a
    schedule that seldom changes cost nothing measurable). Where steps are short and nobody else is to change the
    value, give the schedule to the optimiser instead: there it costs nothing.

    A schedule that raises, or gives no finite number, fails the run, since to train on with a wrong learning rate would
    be worse; what is in effect stays. So does an optimiser without such a hyperparameter, when the run starts.

    Raises:
        ConfigurationError: ``schedule`` is no function that can be called so, an unknown ``by``, a negative ``lag``.
    """

    def __init__(
        self,
        schedule: Schedule,
        by: By = "epoch",
        hyperparam: str = "learning_rate",
        *,
        path: str | None = None,
        lag: int = STEP_LAG,
    ) -> None:
        super().__init__(hyperparam, schedule, by, path, lag)
