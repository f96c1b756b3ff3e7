"""``HyperparamScheduler``: any injected hyperparameter as a function of the epoch or the step."""

from __future__ import annotations

from typing import Any

from eventtrain.control import Control
from eventtrain.events import Event
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.subscribers.schedule_follower import ScheduleFollower
from eventtrain.subscribers.schedules import By, Schedule
from eventtrain.subscribers.watching import STEP_LAG


class HyperparamScheduler(Subscriber):
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

    on_error = "fail"

    def __init__(
        self,
        hyperparam: str,
        schedule: Schedule,
        by: By = "epoch",
        *,
        path: str | None = None,
        lag: int = STEP_LAG,
    ) -> None:
        self._follower = ScheduleFollower("HyperparamScheduler", hyperparam, schedule, by, path, lag)
        self.events = self._follower.events
        self.every = self._follower.every
        self.lag = self._follower.lag

    async def start(self, run: RunContext) -> None:
        """Raises where the hyperparameter cannot be set, or the schedule not be followed."""
        await self._follower.start(run, self)

    async def handle(self, event: Event, control: Control) -> None:
        """Send the values that are due."""
        await self._follower.handle(event, control)

    async def stop(self) -> None:
        """What was loaded holds for one run."""
        await self._follower.stop()

    def state_dict(self) -> dict[str, Any]:
        """The value sent last, as plain JSON data; the epoch and the step say the rest."""
        return self._follower.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the value over; a resumed run goes on with it.

        Raises:
            StateError: another version, or broken.
        """
        self._follower.load_state_dict(self.name or type(self).__name__, state)
