"""``ReduceLROnPlateau``: a smaller learning rate when a metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Any, Literal

import numpy as np

from eventtrain.control.control import Control
from eventtrain.events import TO_BE_CONTINUED, EpochCompleted, EvalCompleted, RunCompleted, StepCompleted
from eventtrain.subscribers._shared.metric_goal import Mode, Monitor, MonitorState, NaNPolicy, Unit, make_goal
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import (
    require_choice,
    require_count,
    require_number,
)
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.policies.patience_units import LAGS, WATCHED


class ReduceLROnPlateauState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    monitor: MonitorState


class ReduceLROnPlateau(Subscriber):
    """Multiplies a hyperparameter by ``factor`` before the next epoch begins (``lag=0``), with Keras 3's decisions.

    Args:
        monitor: name of a metric of EpochCompleted; for other units, of the event that they go by.
        factor: between 0 and 1.
        patience: cut at the ``patience``-th epoch in a row without an improvement (0 and 1 both: at the first).
        mode: "min", "max", or "auto" by the metric's name.
        min_delta: how much better counts as an improvement.
        cooldown: for so long after a cut nothing counts; the epoch that ends it does. By "steps" it lasts at least
            until a step was computed with the smaller value: ``lag + 1`` steps.
        min_lr: the value is never cut below it.
        hyperparam: its name in ``optax.inject_hyperparams``.
        path: of the hyperparameter, where the name stands in several places.
        patience_unit: of patience and cooldown: "epochs"; "evaluations" (EvalCompleted, also in the middle of an epoch;
            ``lag=0``); "steps" (StepCompleted; ``lag=64``); "seconds" (EpochCompleted by the clock: no lag, so not
            reproducible).
        min_delta_relative: ``min_delta`` is a share of the value to be beaten.
        nan: a NaN is never best. "count": no improvement; "ignore": not looked at; "stop": stop the run.
        strict: fail the run if the metric is missing, instead of warning once.

    The count begins anew with every ``fit``, unless a saved state was loaded. A run whose optimiser has no such
    hyperparameter fails when it starts.

    Raises:
        ConfigurationError: a factor not between 0 and 1, negative counts, an unknown mode, a metric whose direction
            cannot be told.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        mode: Mode = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0,
        hyperparam: str = "learning_rate",
        *,
        path: str | None = None,
        patience_unit: Unit = "epochs",
        min_delta_relative: bool = False,
        nan: NaNPolicy = "count",
        strict: bool = False,
    ) -> None:
        goal = make_goal("ReduceLROnPlateau", monitor, mode, min_delta, relative=min_delta_relative)
        require_number("ReduceLROnPlateau", "factor", factor, above=0, below=1)
        require_count("ReduceLROnPlateau", "patience", patience)
        require_count("ReduceLROnPlateau", "cooldown", cooldown)
        require_number("ReduceLROnPlateau", "min_lr", min_lr, at_least=0)
        require_choice("ReduceLROnPlateau", "patience_unit", patience_unit, tuple(WATCHED))
        require_choice("ReduceLROnPlateau", "nan", nan, ("count", "ignore", "stop"))
        self.events = (WATCHED[patience_unit], RunCompleted)
        self.lag = LAGS[patience_unit]
        self.on_error = "fail" if strict else "isolate"
        self._monitor = Monitor(goal, patience, unit=patience_unit, cooldown=cooldown, nan=nan)
        self._metric = monitor
        self._strict = strict
        self._factor = factor
        self._min_lr = min_lr
        self._hyperparam = hyperparam
        self._path = path
        self._label = hyperparam
        self._loaded = False
        self._reader = MetricReader("ReduceLROnPlateau", monitor, strict=strict)

    @property
    def best(self) -> float | None:
        """The best value so far; None before the first."""
        return self._monitor.best

    @property
    def wait(self) -> float:
        """For how long there was neither an improvement nor a cut, in ``patience_unit``."""
        return self._monitor.wait

    @property
    def cooldown_left(self) -> float:
        """For how long nothing counts yet, in ``patience_unit``."""
        return self._monitor.cooldown_left

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded. Raises where the hyperparameter cannot be set."""
        self._label = run.require_hyperparam(self._hyperparam, self._path)
        self._reader = MetricReader(
            self._name,
            self._metric,
            strict=self._strict,
            evaluates=run.can_evaluate and self._monitor.unit in ("epochs", "seconds"),
        )
        lag = self.lag.get(StepCompleted) if isinstance(self.lag, Mapping) else self.lag
        if self._monitor.unit == "steps" and lag is not None:
            self._monitor.lengthen_cooldown(lag + 1)
        if not self._loaded:
            self._monitor.reset()

    async def stop(self) -> None:
        """The next run begins anew."""
        self._loaded = False

    async def handle(
        self, event: EpochCompleted | EvalCompleted | StepCompleted | RunCompleted, control: Control
    ) -> None:
        """Count, and cut when patience is at its end."""
        if isinstance(event, RunCompleted):
            if self._monitor.seen == 0 and event.reason not in TO_BE_CONTINUED:
                self._reader.end()
            return
        value = self._reader.read(event.metrics, unprefixed=isinstance(event, EvalCompleted))
        if value is None:
            return
        verdict = self._monitor.observe(value, epoch=event.epoch, step=event.step, time_s=monotonic())
        if verdict.stop:
            control.stop(reason=f"{self._name}: {self._metric} is NaN")
        elif verdict.exhausted and self._can_be_cut(event, control):
            best = "nothing" if self.best is None else f"{self.best:.6g}"
            control.scale_hyperparam(
                self._hyperparam,
                self._factor,
                minimum=self._min_lr,
                path=self._path,
                reason=f"plateau: {self._metric} {value:.6g} is no improvement on {best} "
                f"({self._monitor.rule})",
            )
            self._monitor.begin_cooldown()

    def _can_be_cut(self, event: EpochCompleted | EvalCompleted | StepCompleted, control: Control) -> bool:
        """Whether the value in effect is above ``min_lr``; as Keras, patience that is at its end waits until it is."""
        if isinstance(event, StepCompleted):
            return True  # the value at the boundary of the effect is not known yet; the command clips it
        values = event.hyperparams if isinstance(event, EpochCompleted) else control.hyperparams
        # In float32, as Keras compares: the device holds 0.001 as 0.0010000000475, which is no reason for a cut.
        return bool(np.float32(values[self._label]) > np.float32(self._min_lr))

    @property
    def _name(self) -> str:
        return self.name or "ReduceLROnPlateau"

    def state_dict(self) -> dict[str, Any]:
        """The count so far, as plain JSON data."""
        return ReduceLROnPlateauState(monitor=self._monitor.state).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count over; the run that follows goes on with it.

        Raises:
            StateError: another version, or broken.
        """
        self._monitor.load(ReduceLROnPlateauState.parse(self._name, state).monitor)
        self._loaded = True
