"""``TerminateOnNaN``: stops, fails or rolls back the run when the loss is NaN or infinite."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from pydantic import NonNegativeInt

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError, NonFiniteMetric
from eventtrain.events import RunStarted, StepCompleted
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import STEP_LAG, Policy
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number

Action = Literal["stop", "raise", "rollback"]
Place = Literal[0, 1]
"""Snapshots alternate between two places."""


class TerminateOnNaNState(SavedState):
    """State of a ``TerminateOnNaN``. The snapshots are not part of it.

    Attributes:
        good: the place of the snapshot to roll back to.
        candidate: the place of one that is not proven yet, and the boundary at which it is taken.
        rollbacks: in this run; ``rollbacks_to_good``: to the good snapshot.
        ignore_until: events up to this step belong to a state that was given up.
        unrepaired: the last value read was not finite.
        over: the run was told to stop.
    """

    version: Literal[1] = 1
    good: Place | None = None
    candidate: tuple[Place, NonNegativeInt] | None = None
    rollbacks: NonNegativeInt = 0
    rollbacks_to_good: NonNegativeInt = 0
    ignore_until: NonNegativeInt = 0
    unrepaired: bool = False
    over: bool = False


class TerminateOnNaN(Policy[TerminateOnNaNState]):
    """Checks every step's loss; NaN and infinities are bad, as for Keras' TerminateOnNaN.

    Args:
        action: "stop" ends the run with a reason that names metric, value and step. "raise" fails it: ``fit`` raises
            SubscriberError from NonFiniteMetric. "rollback" restores the last good state, reduces the learning rate,
            and continues.
        monitor: name of a metric of StepCompleted.
        snapshot_every: a state is kept after each step whose number this divides. (This and the following arguments
            but the last two: for "rollback".)
        lr_factor: above 0 and at most 1. The n-th rollback to the same snapshot multiplies its learning rate by
            ``lr_factor ** n``.
        max_rollbacks: in one run; the next bad value stops it.
        hyperparam: name of the learning rate in ``optax.inject_hyperparams``.
        path: of the learning rate, if several have this name.
        lag: a decision takes effect this many steps after the bad one, in every rerun. None: as soon as it arrives,
            but not for "rollback".
        strict: fail the run if a step lacks the metric, instead of warning once. A metric that no step has fails it
            before the first one.

    A snapshot is good once a step computed from it had a finite loss: the loss of step k is that of the state before
    its update. At most two are kept on the device, the good one and its successor until that is proven. The first is
    taken when the run starts. Steps computed after the bad one are given up with the state, and the data continues
    at its current position. If a run ends while the state is bad, the good one is restored at its end, with the
    learning rate it had. A run without a good snapshot stops.

    It starts from scratch with every ``fit``, unless a saved state was loaded; missing snapshots are then taken again.
    Snapshots are released when a run ends by itself. A run whose optimiser has no such hyperparameter fails when it
    starts.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    _initial = TerminateOnNaNState()

    @checked
    def __init__(
        self,
        action: Action = "stop",
        *,
        monitor: str = "loss",
        snapshot_every: int = 100,
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
        hyperparam: str = "learning_rate",
        path: str | None = None,
        lag: int | None = STEP_LAG,
        strict: bool = False,
    ) -> None:
        require_choice("TerminateOnNaN", "action", action, ("stop", "raise", "rollback"))
        require_count("TerminateOnNaN", "snapshot_every", snapshot_every, at_least=1)
        require_number("TerminateOnNaN", "lr_factor", lr_factor, above=0, at_most=1)
        require_count("TerminateOnNaN", "max_rollbacks", max_rollbacks)
        if action == "rollback" and lag is None:
            raise ConfigurationError(
                'TerminateOnNaN("rollback", lag=None): without a finite lag it is not known which events belong to the '
                "state that was given up. Leave lag out, or give a number of steps."
            )
        self.events = (RunStarted, StepCompleted) if action == "rollback" else StepCompleted
        self.lag = {RunStarted: 0, StepCompleted: lag} if action == "rollback" else lag
        self.on_error = "fail" if strict or action == "raise" else "isolate"
        self._action = action
        self.state_about = {"monitor": monitor, "hyperparam": path or hyperparam}
        self._metric = monitor
        self._snapshot_every = snapshot_every
        self._lr_factor = lr_factor
        self._max_rollbacks = max_rollbacks
        self._hyperparam = hyperparam
        self._path = path
        self._lag = lag or 0
        self._state = self._initial
        self._reader = MetricReader("TerminateOnNaN", monitor, strict=strict)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks in this run so far."""
        return self._state.rollbacks

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded.

        For "rollback" raises ConfigurationError if ``every`` or ``lag`` was changed, HyperparamError if the
        hyperparameter cannot be set.
        """
        self._reader = self._reader.for_run(self._name)
        self._reader.look_up_in(run, StepCompleted)
        await super().start(run)
        if self._action != "rollback":
            return
        if (self.every, self.lag) != (1, {RunStarted: 0, StepCompleted: self._lag}):
            raise ConfigurationError(
                f'{self._name}("rollback") cannot have every={self.every!r}, lag={self.lag!r}: the steps of its '
                "snapshots would not be known. Give lag= to the constructor, and leave every alone."
            )
        if self._lr_factor < 1:
            run.require_hyperparam(self._hyperparam, self._path)
        for place in (0, 1):
            if not self._loaded:
                self._release(place, run.control)
            run.restore_at_end(self._tag(place), "all", where=partial(self._is_wanted_at_end, place))

    async def handle(self, event: RunStarted | StepCompleted, control: Control) -> None:
        """Checks one step's value, and acts on a bad one."""
        if isinstance(event, RunStarted):
            self._take_first(event.step, control)
            return
        if self._state.over or event.step <= self._state.ignore_until:
            return
        value = self._reader.read(event.metrics)
        if value is None:
            return
        what = f"{self._metric} is {value} at step {event.step}"
        if math.isfinite(value):
            if self._action == "rollback":
                self._note_good(event.step, control)
        elif self._action == "raise":
            raise NonFiniteMetric(f"{what}. Lower the learning rate, or clip the gradients.")
        elif self._action == "stop":
            self._give_up(what, control)
        else:
            self._roll_back(event.step, what, control)

    def _give_up(self, reason: str, control: Control) -> None:
        self._change(over=True)
        control.stop(reason=f"{self._name}: {reason}")

    def _roll_back(self, step: int, what: str, control: Control) -> None:
        state = self._state
        self._change(unrepaired=True)
        if state.good is None or not self._is_kept(state.good, control):
            self._give_up(f"{what}, and no snapshot is known to be good", control)
        elif state.rollbacks >= self._max_rollbacks:
            self._give_up(f"{what}, after {state.rollbacks} rollbacks", control)
        else:
            count = state.rollbacks_to_good + 1
            control.restore(self._tag(state.good), "all", reason=what)
            if self._lr_factor < 1:
                control.scale_hyperparam(
                    self._hyperparam, self._lr_factor**count, path=self._path, reason=f"rollback: {what}"
                )
            self._change(
                rollbacks=state.rollbacks + 1,
                rollbacks_to_good=count,
                candidate=None,
                ignore_until=step + self._lag,
            )

    def _is_wanted_at_end(self, place: int) -> bool:
        return self._state.unrepaired and place == self._state.good

    def _take_first(self, step: int, control: Control) -> None:
        state = self._state
        places = (state.good, state.candidate[0] if state.candidate is not None else None)
        if not any(place is not None and self._is_kept(place, control) for place in places):
            self._change(good=None, rollbacks_to_good=0)
            self._take(0, step, control)

    def _note_good(self, step: int, control: Control) -> None:
        """The state before ``step`` was good: accepts the candidate computed before it, and takes the next one."""
        if self._state.unrepaired:
            self._change(unrepaired=False)
        candidate = self._state.candidate
        if candidate is not None and step > candidate[1]:
            self._change(candidate=None)
            # It does not exist if the device had no room for it.
            if self._is_kept(candidate[0], control, candidate[1]):
                if self._state.good is not None:
                    self._release(self._state.good, control)
                self._change(good=candidate[0], rollbacks_to_good=0)
        boundary = step + self._lag
        if self._state.candidate is None and boundary % self._snapshot_every == 0:
            self._take(1 if self._state.good == 0 else 0, boundary, control)

    def _take(self, place: Place, boundary: int, control: Control) -> None:
        self._change(candidate=(place, boundary))
        control.snapshot(self._tag(place), reason="to roll back to")

    def _is_kept(self, place: Place, control: Control, step: int | None = None) -> bool:
        kept = control.snapshots.get(self._tag(place))
        return kept is not None and step in (None, kept.step)

    def _release(self, place: Place, control: Control) -> None:
        if self._is_kept(place, control):
            control.snapshots[self._tag(place)].release()

    def _tag(self, place: Place) -> str:
        return f"{self._name}/{place}"

    def _change(self, **fields: Any) -> None:
        self._state = self._state.model_copy(update=fields)
