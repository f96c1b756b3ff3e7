"""``LearningRateScheduler`` and ``HyperparamScheduler``: a hyperparameter as a function of the epoch or the step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError, HyperparamError, StateError
from eventtrain.events import CheckpointRestored, EpochStarted, Event, RunStarted, StepCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import STEP_LAG, Policy
from eventtrain.subscribers.policies.schedules import By, CheckedSchedule, Schedule, takes_value
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count


class ScheduleState(SavedState):
    """State of a scheduler; everything else is a function of the epoch or the step.

    Attributes:
        sent: by step, the last value sent.
    """

    version: Literal[1] = 1
    sent: Number | None = None


class HyperparamScheduler(Policy[ScheduleState]):
    """Like ``LearningRateScheduler``, for any hyperparameter: weight decay, momentum, or one of ``et.hyperparams``.

    Args:
        hyperparam: its name, as the optimiser's factory or ``et.hyperparams`` calls it: "weight_decay".
        schedule, by, path, lag: as of ``LearningRateScheduler``; ``schedule(epoch, value)`` gets this hyperparameter's
            value in effect.

    Several of them can follow several hyperparameters; give each a ``name``. Failures and costs are those of
    ``LearningRateScheduler``.

    Raises:
        ConfigurationError: ``schedule`` cannot be called like this, or another argument is invalid.
    """

    # By epoch: a value is sent on EpochStarted (lag 0), before the first step of the epoch.
    #
    # By step: schedule(k) is in effect from boundary k on, so that step k + 1 is the first computed with it, as in
    # optax. Values are sent ahead, in blocks of lag // 2 boundaries: the first ones on RunStarted (lag 0), and on the
    # StepCompleted of every (lag // 2)-th step k the block from boundary k + lag on. A value that stays the same is not
    # sent. A whole state that is restored at step r has the value of its own time, until a value already under way
    # changes it or the block after r takes effect: a lag and a block later at most.

    _initial = ScheduleState()
    on_error = "fail"

    @checked
    def __init__(
        self,
        hyperparam: str,
        schedule: Schedule,
        by: By = "epoch",
        *,
        path: str | None = None,
        lag: int = STEP_LAG,
    ) -> None:
        owner = type(self).__name__
        require_choice(owner, "by", by, ("epoch", "step"))
        require_count(owner, "lag", lag)
        self._takes_value = takes_value(owner, schedule, by)
        self._schedule = schedule
        self._hyperparam = hyperparam
        self._path = path
        self._label = hyperparam
        self._by_step = by == "step"
        self._lag = lag
        self._checked: CheckedSchedule | None = None
        self._state = self._initial
        self._end: int | None = None
        self._block = max(1, lag // 2) if self._by_step else 1
        """Number of boundaries whose values are sent at once."""
        self.every = self._block
        self.state_about = {"hyperparam": path or hyperparam, "by": by}
        self.events = (EpochStarted,)
        self._lags: dict[type[Event], int | None] = {EpochStarted: 0}
        if self._by_step:
            self.events = (RunStarted, StepCompleted, CheckpointRestored)
            self._lags = {RunStarted: 0, StepCompleted: lag, CheckpointRestored: None}
        self.lag = self._lags

    async def start(self, run: RunContext) -> None:
        """Checks that it can follow the schedule.

        Raises ConfigurationError if ``every`` or ``lag`` was changed, StateError if a run by step resumes without a
        state of this scheduler, HyperparamError if the hyperparameter cannot be set.
        """
        name = self._name
        if self._by_step and (self.every, self.lag) != (self._block, self._lags):
            raise ConfigurationError(
                f'{name}(by="step") cannot have every={self.every!r}, lag={self.lag!r}: it would miss the '
                "events at which its values are due. Give lag= to the constructor, and leave every alone."
            )
        self._label = run.require_hyperparam(self._hyperparam, self._path)
        self._checked = CheckedSchedule(name, self._hyperparam, self._schedule)
        if self._by_step and run.resumed and not self._loaded:
            raise StateError(
                f"{name} was missing when the checkpoint to resume from was taken, and the values of the first "
                f"{self._lag + self._block} steps would have been sent before. Start a new run from its state instead: "
                "Trainer(state=et.load_state(path, like=state))."
            )
        self._end = None if run.total_steps is None else run.start_step + run.total_steps
        await super().start(run)

    async def handle(self, event: Event, control: Control) -> None:
        """Sends the values that are due."""
        step = event.step
        if isinstance(event, EpochStarted):
            await self._set_for_epoch(event, control)
        elif isinstance(event, RunStarted):
            self._state = ScheduleState()
            next_event = (step // self._block + 1) * self._block
            await self._set_for_steps(step, range(step, next_event + self._lag), control)
        elif isinstance(event, StepCompleted):
            first = step + self._lag
            await self._set_for_steps(step, range(first, first + self._block), control)
        elif isinstance(event, CheckpointRestored) and event.part == "all":
            self._state = ScheduleState()  # the next value is sent even if it is the same

    async def _set_for_epoch(self, event: EpochStarted, control: Control) -> None:
        assert self._checked is not None
        held = event.hyperparams[self._label]
        value = await self._checked.at(event.epoch, *([held] if self._takes_value else []))
        # In float32, as most optimisers hold it: 0.1 does not differ from 0.10000000149 in effect.
        if np.float32(value) != np.float32(held):
            self._set(value, control, event.step, f"epoch {event.epoch + 1}")

    async def _set_for_steps(self, step: int, boundaries: range, control: Control) -> None:
        assert self._checked is not None
        for boundary in boundaries:
            try:
                value = await self._checked.at(boundary)
            except HyperparamError:
                if self._end is not None and step < self._end <= boundary:
                    return  # for example a table of values that ends with the run: no step needs this one
                raise
            if value != self._state.sent:
                self._state = ScheduleState(sent=value)
                self._set(value, control, boundary, f"step {boundary}")

    def _set(self, value: Number, control: Control, boundary: int, where: str) -> None:
        control.set_hyperparam(
            self._hyperparam, value, path=self._path, at_step=boundary, reason=f"schedule, {where}"
        )


class LearningRateScheduler(HyperparamScheduler):
    """Sets the learning rate for each epoch, as Keras 3 does, or for each step, as an optax schedule in the optimiser.

    Args:
        schedule: ``schedule(epoch)``, ``schedule(epoch, lr)`` (whichever its signature takes; ``lr`` is the value in
            effect) or, by step, ``schedule(step)``: returns a number for a number. Any schedule of optax is one. The
            polynomial ``eta0 * max(0, 1 - t/T) ** r`` is ``optax.polynomial_schedule(eta0, 0.0, r, T)``. It is called
            on the event loop (the first time in a thread), and must depend on its arguments only. In a config file: a
            table with the ``name`` of a schedule of optax and its arguments.
        by: "epoch": the 0-based epoch, counted over all calls of ``fit``; set before its first step (``lag=0``).
            "step": the steps completed; step k + 1 is computed with ``schedule(k)``, for every step.
        hyperparam: its name in ``optax.inject_hyperparams``, built with a number and not with a schedule.
        path: of the hyperparameter, if several have this name.
        lag: by step only: the least number of steps that values are sent ahead. It changes no value; if it is too small
            the loop waits for this subscriber.

    By epoch a value is sent if it differs in float32 from the one in effect, so that the schedule overrides other
    changes. By step it is sent if it differs from the one sent before (and after a restore), so that a value set by
    another subscriber remains until the schedule's next change. By step the schedule is called up to ``1.5 * lag``
    steps ahead, also beyond the end of the run; values sent for that are rejected when the run ends.

    By epoch it costs nothing per step. By step each change costs a command, its two events and the transfer of a
    scalar: 0.25 ms on two cores that also train (a step of 0.75 ms then took 1.38 times as long, whatever the lag; a
    schedule that seldom changes cost nothing measurable). Where steps are short and nothing else changes the value,
    give the schedule to the optimiser instead: there it costs nothing.

    A schedule that raises, or does not return a finite number, fails the run, since training with a wrong learning rate
    would be worse; the value in effect remains. An optimiser without such a hyperparameter fails the run at its start.

    Raises:
        ConfigurationError: ``schedule`` cannot be called like this, or another argument is invalid.
    """

    @checked
    def __init__(
        self,
        schedule: Schedule,
        by: By = "epoch",
        hyperparam: str = "learning_rate",
        *,
        path: str | None = None,
        lag: int = STEP_LAG,
    ) -> None:
        super().__init__(hyperparam, schedule, by, path=path, lag=lag)
