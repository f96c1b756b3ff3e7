"""``GradientSpike``: a smaller learning rate when the gradient norm jumps far above what was usual."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import FiniteFloat

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events import StepCompleted
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.rolling_quantile import RollingQuantile
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.policies.patience_units import STEP_LAG


class GradientSpikeState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    values: list[FiniteFloat]
    quiet_until: int


class GradientSpike(Subscriber):
    """Multiplies a hyperparameter by ``factor`` when a metric of the steps jumps.

    A spike is a value above ``threshold`` times the exact quantile of the ``window`` values before it, or one that is
    NaN or infinite. Values that are not finite never enter the window; spikes that are do. To compare with a quantile
    of past gradient norms is AutoClip's idea (Seetharaman et al., 2020), which clips the gradient instead.

    Args:
        monitor: name of a metric of StepCompleted that is never negative, such as the norm of the gradient.
        window: how many values say what is usual.
        quantile: of them, between 0 and 1.
        threshold: how many times the quantile is too much; at least 1.
        factor: between 0 and 1.
        min_lr: the value is never cut below it.
        cooldown: for so many steps after a spike that counted, none counts. As many as ``window`` if None; never
            fewer than ``lag``, since the steps until the cut takes effect still use the old value.
        warmup: so many values have to be in the window before one is compared with it. A full window if None.
        hyperparam: its name in ``optax.inject_hyperparams``.
        path: of the hyperparameter, where the name stands in several places.
        lag: the cut takes effect so many steps after the spike, in every rerun; None: as soon as it arrives.
        strict: fail the run if the metric is missing, instead of warning once.

    It begins anew with every ``fit``, unless a saved state was loaded. A run whose optimiser has no such
    hyperparameter fails when it starts.

    Raises:
        ConfigurationError: values out of the ranges above.
    """

    events = StepCompleted

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
        require_number("GradientSpike", "quantile", quantile, at_least=0)
        require_number("GradientSpike", "threshold", threshold, at_least=1)
        require_number("GradientSpike", "factor", factor, above=0, below=1)
        require_number("GradientSpike", "min_lr", min_lr, at_least=0)
        if quantile > 1:
            raise ConfigurationError(
                f"GradientSpike(quantile={quantile!r}): needs a number between 0 and 1, say 0.95."
            )
        if warmup > window:
            raise ConfigurationError(
                f"GradientSpike(warmup={warmup!r}, window={window!r}): the window never holds so many values."
            )
        self.lag = lag
        self.on_error = "fail" if strict else "isolate"
        self._metric = monitor
        self._strict = strict
        self._window = window
        self._quantile = quantile
        self._threshold = threshold
        self._factor = factor
        self._min_lr = min_lr
        self._cooldown = max(cooldown, lag or 0)
        self._warmup = warmup
        self._hyperparam = hyperparam
        self._path = path
        self._usual = RollingQuantile(window)
        self._quiet_until = 0
        self._loaded = False
        self._reader = MetricReader("GradientSpike", monitor, strict=strict)

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded. Raises where the hyperparameter cannot be set."""
        run.require_hyperparam(self._hyperparam, self._path)
        self._reader = MetricReader(self._name, self._metric, strict=self._strict)
        if not self._loaded:
            self._usual = RollingQuantile(self._window)
            self._quiet_until = 0

    async def stop(self) -> None:
        """The next run begins anew."""
        self._loaded = False

    async def handle(self, event: StepCompleted, control: Control) -> None:
        """Compare the value with those before it, and cut where it is a spike."""
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
        """Why ``value`` is a spike; "" where it is none."""
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

    @property
    def _name(self) -> str:
        return self.name or "GradientSpike"

    def state_dict(self) -> dict[str, Any]:
        """The window and the cooldown, as plain JSON data."""
        return GradientSpikeState(values=list(self._usual), quiet_until=self._quiet_until).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over; the run that follows goes on with them. Of a longer window the newest values count.

        Raises:
            StateError: another version, or broken.
        """
        saved = GradientSpikeState.parse(self._name, state)
        self._usual = RollingQuantile(self._window, saved.values)
        self._quiet_until = saved.quiet_until
        self._loaded = True
