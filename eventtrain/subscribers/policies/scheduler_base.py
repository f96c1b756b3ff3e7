"""``ScheduleFollower``: when the values of a schedule are asked for and sent. What the schedulers have in common."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError, HyperparamError, StateError
from eventtrain.events import CheckpointRestored, EpochStarted, Event, RunStarted, StepCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_count
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.policies.checked_schedule import CheckedSchedule, takes_value
from eventtrain.subscribers.policies.schedules import By, Schedule


class ScheduleState(SavedState):
    """What survives a restart; the rest is a function of the epoch or the step."""

    version: Literal[1] = 1
    sent: Number | None = None
    """By step, the value sent last."""


class ScheduleFollower(Subscriber):
    """Has one hyperparameter follow a schedule, exactly. Abstract: the schedulers say what their arguments mean.

    By epoch: on EpochStarted (``lag=0``), before the first step of it.

    By step: ``schedule(k)`` is in effect from boundary k on, so that step k + 1 is the first computed with it, as in
    optax. Values are sent ahead, in blocks of ``lag // 2`` boundaries: RunStarted (``lag=0``) brings the first ones,
    and the StepCompleted of every ``lag // 2``-th step k the block from boundary k + lag on. Where the value stays the
    same nothing is sent. A whole state that is put back at step r has the value of its own time, until a value already
    under way changes it or the block after r takes effect: a lag and a block later at most.

    Args:
        hyperparam, schedule, by, path, lag: as those of ``LearningRateScheduler``.

    Raises:
        ConfigurationError: arguments that cannot work.
    """

    on_error = "fail"

    def __init__(self, hyperparam: str, schedule: Schedule, by: By, path: str | None, lag: int) -> None:
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
        self._sent: Number | None = None
        self._loaded = False
        self._end: int | None = None
        self._block = max(1, lag // 2) if self._by_step else 1
        """Of how many boundaries the values are sent at once."""
        self.every = self._block
        self.events = (EpochStarted,)
        self._lags: dict[type[Event], int | None] = {EpochStarted: 0}
        if self._by_step:
            self.events = (RunStarted, StepCompleted, CheckpointRestored)
            self._lags = {RunStarted: 0, StepCompleted: lag, CheckpointRestored: None}
        self.lag = self._lags

    async def start(self, run: RunContext) -> None:
        """Raises where the hyperparameter cannot be set, or the schedule not be followed."""
        name = self.name or type(self).__name__
        if self._by_step and (self.every, self.lag) != (self._block, self._lags):
            raise ConfigurationError(
                f'{name}(by="step") cannot have every={self.every!r}, lag={self.lag!r}: it would miss the '
                "events at which its values are due. Give lag= to the constructor, and leave every alone."
            )
        self._label = run.require_hyperparam(self._hyperparam, self._path)
        self._checked = CheckedSchedule(name, self._hyperparam, self._schedule)
        if self._by_step and run.resumed and not self._loaded:
            raise StateError(
                f"{name} was not there when the checkpoint was taken from which the run resumes, and the values of "
                f"the first {self._lag + self._block} steps would have been sent before. Start a run from its state "
                "instead: Trainer(state=et.load_state(path, like=state))."
            )
        self._end = None if run.total_steps is None else run.start_step + run.total_steps

    async def handle(self, event: Event, control: Control) -> None:
        """Send the values that are due."""
        step = event.step
        if isinstance(event, EpochStarted):
            await self._set_for_epoch(event, control)
        elif isinstance(event, RunStarted):
            self._sent = None
            next_event = (step // self._block + 1) * self._block
            await self._set_for_steps(step, range(step, next_event + self._lag), control)
        elif isinstance(event, StepCompleted):
            first = step + self._lag
            await self._set_for_steps(step, range(first, first + self._block), control)
        elif isinstance(event, CheckpointRestored) and event.part == "all":
            self._sent = None  # an older value was put back, so the next one is sent even if it is the same

    async def stop(self) -> None:
        """What was loaded holds for one run."""
        self._loaded = False

    async def _set_for_epoch(self, event: EpochStarted, control: Control) -> None:
        assert self._checked is not None
        held = event.hyperparams[self._label]
        value = await self._checked.at(event.epoch, *([held] if self._takes_value else []))
        # In float32, as most optimisers hold it: 0.1 is no change where 0.10000000149 is in effect.
        if np.float32(value) != np.float32(held):
            self._set(value, control, event.step, f"epoch {event.epoch}")

    async def _set_for_steps(self, step: int, boundaries: range, control: Control) -> None:
        assert self._checked is not None
        for boundary in boundaries:
            try:
                value = await self._checked.at(boundary)
            except HyperparamError:
                if self._end is not None and step < self._end <= boundary:
                    return  # a table of values, say, that ends with the run: no step needs this one
                raise
            if value != self._sent:
                self._sent = value
                self._set(value, control, boundary, f"step {boundary}")

    def _set(self, value: Number, control: Control, boundary: int, where: str) -> None:
        control.set_hyperparam(
            self._hyperparam, value, path=self._path, at_step=boundary, reason=f"schedule, {where}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The value sent last, as plain JSON data; the epoch and the step say the rest."""
        return ScheduleState(sent=self._sent).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the value over; a resumed run goes on with it.

        Raises:
            StateError: another version, or broken.
        """
        self._sent = ScheduleState.parse(self.name or type(self).__name__, state).sent
        self._loaded = True
