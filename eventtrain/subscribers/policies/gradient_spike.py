"""``GradientSpike``: reduces the learning rate when the gradient norm jumps far above its usual values."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import FiniteFloat

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events import StepCompleted
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import STEP_LAG, Policy
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number


class GradientSpikeState(SavedState):
    """State of a ``GradientSpike``: its window, and the step until which no spike counts."""

    version: Literal[1] = 1
    values: list[FiniteFloat]
    quiet_until: int


class GradientSpike(Policy[GradientSpikeState]):
    """Multiplies a hyperparameter by ``factor`` when a metric of the steps jumps.

    A spike is a value above ``threshold`` times the exact quantile of the ``window`` values before it, or one that is
    NaN or infinite. Values that are not finite never enter the window; finite spikes do. The comparison with a quantile
    of past gradient norms is AutoClip's idea (Seetharaman et al., 2020), which clips the gradient instead.

    Args:
        monitor: name of a metric of StepCompleted that is never negative, such as the norm of the gradient.
        window: number of values that define what is usual.
        quantile: of them, between 0 and 1.
        threshold: multiple of the quantile above which a value is a spike; at least 1.
        factor: between 0 and 1.
        min_lr: the value is never cut below it.
        cooldown: after a spike that counted, none counts for this many steps. ``window`` if None; never fewer than
            ``lag``, since the steps until the cut takes effect still use the old value.
        warmup: values that the window must hold before one is compared with it. A full window if None.
        hyperparam: its name in ``optax.inject_hyperparams``.
        path: of the hyperparameter, if several have this name.
        lag: the cut takes effect this many steps after the spike, in every rerun; None: as soon as it arrives.
        strict: fail the run if a step lacks the metric, instead of warning once. A metric that no step has fails it
            before the first one.

    It starts from scratch with every ``fit``, unless a saved state was loaded; of a longer saved window the newest
    values are used. A run whose optimiser has no such hyperparameter fails when it starts.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    _initial = GradientSpikeState(values=[], quiet_until=0)
    events = StepCompleted

    @checked
    def __init__(
        self,
        monitor: str = "grad_norm",
        *,
        window: int = 200,
        quantile: float = 0.95,
        threshold: float = 2.0,
        factor: float = 0.5,
        min_lr: float = 0.0,
        cooldown: int | None = None,
        warmup: int | None = None,
        hyperparam: str = "learning_rate",
        path: str | None = None,
        lag: int | None = STEP_LAG,
        strict: bool = False,
    ) -> None:
        require_count("GradientSpike", "window", window, at_least=1)
        warmup = window if warmup is None else warmup
        cooldown = window if cooldown is None else cooldown
        require_count("GradientSpike", "cooldown", cooldown)
        require_count("GradientSpike", "warmup", warmup, at_least=1)
        require_number("GradientSpike", "quantile", quantile, at_least=0, at_most=1)
        require_number("GradientSpike", "threshold", threshold, at_least=1)
        require_number("GradientSpike", "factor", factor, above=0, below=1)
        require_number("GradientSpike", "min_lr", min_lr, at_least=0)
        if warmup > window:
            raise ConfigurationError(
                f"GradientSpike(warmup={warmup!r}, window={window!r}): the window never holds that many values."
            )
        self.lag = lag
        self.on_error = "fail" if strict else "isolate"
        self.state_about = {"monitor": monitor, "hyperparam": path or hyperparam}
        self._metric = monitor
        self._window = window
        self._quantile = quantile
        self._threshold = threshold
        self._factor = factor
        self._min_lr = min_lr
        self._cooldown = max(cooldown, lag or 0)
        self._warmup = warmup
        self._hyperparam = hyperparam
        self._path = path
        self._reader = MetricReader("GradientSpike", monitor, strict=strict)
        self._set_state(self._initial)

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded. Raises HyperparamError for an unusable hyperparameter."""
        run.require_hyperparam(self._hyperparam, self._path)
        self._reader = self._reader.for_run(self._name)
        self._reader.look_up_in(run, StepCompleted)
        await super().start(run)

    async def handle(self, event: StepCompleted, control: Control) -> None:
        """Compares the value with those before it, and cuts the hyperparameter if it is a spike."""
        value = self._reader.read(event.metrics)
        if value is None:
            return
        reason = self._judge(value)
        if math.isfinite(value):
            self._usual.push(value)
        if reason and event.step > self._quiet_until:
            self._quiet_until = event.step + self._cooldown
            control.scale_hyperparam(
                self._hyperparam,
                self._factor,
                minimum=self._min_lr,
                path=self._path,
                reason=f"spike: {self._metric} {value:.6g} {reason}",
            )

    def _judge(self, value: float) -> str:
        """Returns why ``value`` is a spike; "" if it is not."""
        if not math.isfinite(value):
            return "is not finite"
        if len(self._usual) < self._warmup:
            return ""
        usual = self._usual.quantile(self._quantile)
        if value <= self._threshold * usual:
            return ""
        return (
            f"is more than {self._threshold:g} times {usual:.6g}, the {self._quantile:g} quantile of the last "
            f"{len(self._usual)} steps"
        )

    def _get_state(self) -> GradientSpikeState:
        return GradientSpikeState(values=list(self._usual), quiet_until=self._quiet_until)

    def _set_state(self, state: GradientSpikeState) -> None:
        self._usual = RollingQuantile(self._window, state.values)
        self._quiet_until = state.quiet_until
