"""``ReduceLROnPlateau``: reduces the learning rate when a metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eventtrain.control.control import Control
from eventtrain.events import EpochCompleted, StepCompleted
from eventtrain.subscribers._shared.metric_goal import Mode, make_goal
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.metric_monitor import (
    MetricMonitor,
    Monitored,
    MonitorPolicy,
    NaNPolicy,
    Unit,
    Verdict,
)
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number


class ReduceLROnPlateau(MonitorPolicy):
    """Multiplies a hyperparameter by ``factor`` before the next epoch begins (``lag=0``), with Keras 3's decisions.

    Args:
        monitor: name of a metric of EpochCompleted; for other units, of that unit's event.
        factor: between 0 and 1.
        patience: cut at the ``patience``-th epoch in a row without an improvement (0 and 1 both: at the first).
        mode: "min", "max", or "auto" by the metric's name.
        min_delta: smallest change that counts as an improvement.
        cooldown: how long nothing counts after a cut; the epoch that ends it counts. By "steps" it lasts at least until
            a step was computed with the smaller value: ``lag + 1`` steps.
        min_lr: the value is never cut below it, nor to 0 because its dtype holds nothing smaller.
        hyperparam: its name in ``optax.inject_hyperparams``.
        path: of the hyperparameter, if several have this name. "*": all of this name that can be set (the groups of
            ``optax.partition``, for example), each by the same factor and down to ``min_lr``.
        patience_unit: of patience and cooldown; the units are those of ``EarlyStopping``.
        min_delta_relative, nan, strict: as of ``EarlyStopping``.

    The count starts from scratch with every ``fit``, unless a saved state was loaded. A run whose optimiser has no such
    hyperparameter fails when it starts.

    Raises:
        ConfigurationError: an argument is invalid, or the metric's name does not tell its direction.
    """

    @checked
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
        require_count("ReduceLROnPlateau", "cooldown", cooldown)
        require_number("ReduceLROnPlateau", "min_lr", min_lr, at_least=0)
        super().__init__(
            monitor,
            MetricMonitor(goal, patience, unit=patience_unit, cooldown=cooldown, nan=nan),
            strict=strict,
        )
        self._factor = factor
        self._min_lr = min_lr
        self.state_about = {**self.state_about, "hyperparam": path or hyperparam}
        self._hyperparam = hyperparam
        self._path = path
        self._targets: dict[str, str | None] = {hyperparam: path}
        """Path, as commands name it, by the key of its value."""

    @property
    def cooldown_left(self) -> float:
        """How long nothing counts yet, in ``patience_unit``."""
        return self._monitor.state.cooldown_left

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded. Raises HyperparamError for an unusable hyperparameter."""
        if self._path == "*":
            self._targets = dict(run.require_hyperparams(self._hyperparam))
        else:
            self._targets = {run.require_hyperparam(self._hyperparam, self._path): self._path}
        lag = self.lag.get(StepCompleted) if isinstance(self.lag, Mapping) else self.lag
        if self._monitor.unit == "steps" and lag is not None:
            self._monitor.cooldown = max(self._monitor.cooldown, lag + 1)
        await super().start(run)

    def _decide(self, event: Monitored, value: float, verdict: Verdict, control: Control) -> None:
        if verdict == "stop":
            control.stop(reason=f"{self._name}: {self._metric} is NaN")
        elif verdict == "exhausted" and self._can_be_cut(event, control):
            best = "nothing" if self.best is None else f"{self.best:.6g}"
            for path in self._targets.values():
                control.scale_hyperparam(
                    self._hyperparam,
                    self._factor,
                    minimum=self._min_lr,
                    path=path,
                    reason=f"plateau: {self._metric} {value:.6g} is not an improvement on {best} "
                    f"({self._monitor.rule})",
                )
            self._monitor.begin_cooldown()

    def _can_be_cut(self, event: Monitored, control: Control) -> bool:
        """Returns whether a value in effect is above ``min_lr``; until then exhausted patience waits, as in Keras.

        A value that ``factor`` would make 0, because float32 holds nothing smaller, is not cut either.
        """
        if isinstance(event, StepCompleted):
            return True  # the value at the boundary of the effect is not known yet; the command clips it
        values = event.hyperparams if isinstance(event, EpochCompleted) else control.hyperparams
        # In float32, as Keras compares: the device holds 0.001 as 0.0010000000475, which must not cause a cut.
        return any(
            np.float32(values[key]) > np.float32(self._min_lr) and np.float32(values[key] * self._factor) != 0
            for key in self._targets
        )
