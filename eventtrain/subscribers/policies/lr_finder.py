"""``LRFinder``: an exponential learning rate range test, after which the state is restored."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError, SnapshotError, StateError
from eventtrain.events import RunStarted, StepCompleted
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import STEP_LAG, Policy
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number

logger = logging.getLogger("eventtrain")


class LRFinderState(SavedState):
    """State of an ``LRFinder``; the observations have one entry for each finite loss.

    Attributes:
        first_step: steps completed when the test began; None before.
        back_at: the boundary at which the state before the test is restored; None while the test runs.
    """

    model_config = ConfigDict(frozen=False)

    version: Literal[1] = 1
    first_step: int | None = None
    back_at: int | None = None
    learning_rates: list[FiniteFloat] = Field(default_factory=list[float])
    losses: list[FiniteFloat] = Field(default_factory=list[float])
    smoothed: list[FiniteFloat] = Field(default_factory=list[float])

    @property
    def is_under_way(self) -> bool:
        """Whether the test has begun and is not over."""
        return self.first_step is not None and self.back_at is None


@dataclass
class RangeTest:
    """Arithmetic of the test, pure; the arguments are those of ``LRFinder``."""

    min_lr: float
    max_lr: float
    num_steps: int
    smoothing: float = 0.98
    divergence: float | None = 4.0
    state: LRFinderState = field(default_factory=LRFinderState)

    def rate(self, index: int) -> float:
        """Returns the learning rate of the step with this 0-based index."""
        return self.min_lr * (self.max_lr / self.min_lr) ** (index / (self.num_steps - 1))

    def observe(self, index: int, loss: float) -> str:
        """Adds the loss of one step, in order. Returns why the test is over; "" while it is not."""
        rate = self.rate(index)
        if not math.isfinite(loss):
            return f"was {loss!r} at {rate:.3g}"
        # The bias-corrected exponential average, in the form that keeps a constant constant.
        seen = self.state
        before = seen.smoothed[-1] if seen.smoothed else loss
        weight = (1 - self.smoothing) / (1 - self.smoothing ** (len(seen.losses) + 1))
        seen.learning_rates.append(rate)
        seen.losses.append(loss)
        seen.smoothed.append(before + weight * (loss - before))
        if self._has_diverged():
            return f"diverged at {rate:.3g}"
        return f"was observed for all {self.num_steps} steps" if index + 1 == self.num_steps else ""

    def _has_diverged(self) -> bool:
        if self.divergence is None:
            return False
        last, best = self.state.smoothed[-1], min(self.state.smoothed)
        # A positive loss: more than ``divergence`` times the best. A negative one may grow by as much.
        return last - best > (self.divergence - 1) * abs(best)

    @property
    def suggestion(self) -> float | None:
        """The learning rate at the steepest fall of the average over the logarithm; None if it never falls.

        The first tenth, where the average is of few losses, and the last point, where it may have diverged, do not
        count.
        """
        seen = self.state
        first, last = len(seen.losses) // 10, len(seen.losses) - 1
        if last - first < 2:
            return None
        slope = np.gradient(np.asarray(seen.smoothed[first:last]))  # the logarithms are evenly spaced
        steepest = int(slope.argmin())
        return seen.learning_rates[first + steepest] if slope[steepest] < 0 else None


class LRFinder(Policy[LRFinderState]):
    """Trains the first steps of a run with a growing learning rate, suggests a good one, and restores the state.

    The test is that of Smith (2017, arXiv:1506.01186) as in fastai and Lightning's ``lr_find``: the learning rate grows
    exponentially from step to step, the losses are averaged exponentially (with bias correction), and the suggestion is
    where the average falls fastest over the logarithm of the learning rate (without the first tenth and the last
    point).

    Args:
        min_lr, max_lr: of the first and the last step of the test.
        num_steps: its length.
        monitor: name of a metric of StepCompleted, the smaller the better.
        hyperparam: its name in ``optax.inject_hyperparams``, built with a number and not with a schedule.
        path: of the hyperparameter, if several have this name.
        smoothing: weight of the past in the average, from 0 (none) to below 1.
        divergence: the test ends early once the average is this many times its best value; None: never. A loss that
            is NaN or infinite always ends it.
        then: after the test, "stop" the run; "continue" from the state before the test; or "apply": continue with the
            suggestion as learning rate.
        lag: the test ends this many steps after the event that ends it, in every rerun.

    Every ``fit`` begins with a test, unless a saved state was loaded. The state of the first boundary is kept on the
    device meanwhile; parameters, optimiser state, hyperparameters and step extensions are restored bit for bit. The
    step count, the epoch and the position in the data are not. If a run ends before its test, the state is restored at
    its end. A run that is interrupted keeps both states: the next ``fit`` restores the first one and tests again.

    Other policies see the losses of the test, so a run of its own, ``then="stop"``, is best: ``fit(data,
    steps=num_steps)``. With "continue" and "apply" this policy still receives every step after the test.

    A saved test that is over is not repeated; one that was cut short by a checkpoint continues.

    Raises:
        ConfigurationError: an argument is invalid; when a run starts, it is too short for the test.
    """

    _initial = LRFinderState()
    events = (RunStarted, StepCompleted)
    on_error = "fail"

    @checked
    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        *,
        monitor: str = "loss",
        hyperparam: str = "learning_rate",
        path: str | None = None,
        smoothing: float = 0.98,
        divergence: float | None = 4.0,
        then: Literal["stop", "continue", "apply"] = "stop",
        lag: int = STEP_LAG,
    ) -> None:
        require_number("LRFinder", "min_lr", min_lr, above=0)
        require_number("LRFinder", "max_lr", max_lr)
        if max_lr <= min_lr:
            raise ConfigurationError(
                f"LRFinder(min_lr={min_lr!r}, max_lr={max_lr!r}): min_lr must be < max_lr."
            )
        require_count("LRFinder", "num_steps", num_steps, at_least=4)
        require_number("LRFinder", "smoothing", smoothing, at_least=0, below=1)
        require_number("LRFinder", "divergence", divergence, above=1, optional=True)
        require_count("LRFinder", "lag", lag)
        require_choice("LRFinder", "then", then, ("stop", "continue", "apply"))
        self.lag = {RunStarted: 0, StepCompleted: lag}
        self._test = RangeTest(min_lr, max_lr, num_steps, smoothing, divergence)
        self._num_steps = num_steps
        self.state_about = {"monitor": monitor, "hyperparam": path or hyperparam}
        self._metric = monitor
        self._hyperparam = hyperparam
        self._path = path
        self._then = then
        self._lag = lag
        self._reader = MetricReader("LRFinder", monitor, strict=True)

    @property
    def suggestion(self) -> float | None:
        """The learning rate at the steepest fall of the smoothed loss; None if it never falls."""
        return self._test.suggestion

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each step of the test with a finite loss."""
        return list(self._test.state.learning_rates)

    @property
    def losses(self) -> list[float]:
        """Losses of the same steps, for a plot over ``learning_rates``."""
        return list(self._test.state.losses)

    @property
    def smoothed(self) -> list[float]:
        """Averages of ``losses``."""
        return list(self._test.state.smoothed)

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded.

        Raises ConfigurationError if the run is too short or resumes without a state of the test, StateError if the
        state before the test is lost, HyperparamError if the hyperparameter cannot be set.
        """
        run.require_hyperparam(self._hyperparam, self._path)
        self._reader = self._reader.for_run(self._name)
        self._reader.look_up_in(run, StepCompleted)
        if self.every != 1:
            raise ConfigurationError(
                f"{self._name}: every={self.every!r} would leave out steps of the test. Leave it at 1."
            )
        if run.resumed and not self._loaded:
            raise ConfigurationError(
                f"{self._name} tests at the beginning of a run, and this run resumes from a later step. Leave it out."
            )
        await super().start(run)
        if not self._loaded:
            self._check_length(run)
        elif self._test.state.is_under_way and self._tag not in run.control.snapshots:
            raise StateError(
                f"{self._name} cannot continue a test that was cut short: the state before it is lost, and the current "
                "one was trained with the rates of the test. Start again, or resume from an earlier checkpoint."
            )
        run.restore_at_end(self._tag, "all")  # unless the state was restored and released before

    async def stop(self) -> None:
        """Logs the suggestion, if the run ended before the test was over."""
        await super().stop()
        if self._test.state.is_under_way:
            logger.warning(
                "The run ended after %d of the %d steps of the test of %s.",
                len(self.losses), self._num_steps, self._name,
            )  # fmt: skip
            self._log_suggestion()

    async def handle(self, event: RunStarted | StepCompleted, control: Control) -> None:
        """Begins the test, or adds one step's loss."""
        back_at = self._test.state.back_at
        if isinstance(event, RunStarted):
            if back_at is None:
                self._begin(event, control)
        elif back_at is None:
            self._observe(event, control)
        elif event.step > back_at and self._tag in control.snapshots:
            control.snapshots[self._tag].release()

    def _begin(self, event: RunStarted, control: Control) -> None:
        self._set_state(LRFinderState(first_step=event.step))
        if self._tag in control.snapshots:
            control.restore(self._tag, reason="an earlier test was interrupted")
        else:
            control.snapshot(self._tag, reason="state before the test")
        for index in range(min(self._num_steps, self._lag + 1)):
            self._set_rate(event.step, index, control)

    def _observe(self, event: StepCompleted, control: Control) -> None:
        first_step = self._test.state.first_step
        assert first_step is not None
        if self._tag not in control.snapshots:
            raise SnapshotError(
                f"{self._name} cannot restore the state: the device had no room to keep it. Use "
                'Trainer(snapshot="host"), or a smaller model or batch.'
            )
        loss = self._reader.read(event.metrics)
        assert loss is not None
        index = event.step - first_step - 1
        why = self._test.observe(index, loss)
        if why:
            self._end(event.step, control, f"{self._metric} {why}")
        elif index + 1 + self._lag < self._num_steps:
            self._set_rate(first_step, index + 1 + self._lag, control)

    def _end(self, step: int, control: Control, why: str) -> None:
        self._test.state.back_at = step + self._lag
        self._log_suggestion()
        if self._then == "stop":
            control.stop(reason=f"lr finder: {why}")  # the state is restored when the run has ended
            return
        control.restore(self._tag, reason=f"lr finder: {why}")
        if self._then == "apply" and self.suggestion is not None:
            control.set_hyperparam(
                self._hyperparam, self.suggestion, path=self._path, reason="lr finder: suggestion"
            )

    def _log_suggestion(self) -> None:
        if self.suggestion is None:
            logger.warning(
                "%s has no suggestion: %s never fell between the learning rates tested.", self._name, self._metric
            )  # fmt: skip
        else:
            logger.info("%s suggests a learning rate of %.3g.", self._name, self.suggestion)

    def _check_length(self, run: RunContext) -> None:
        steps = run.total_steps
        needed = self._num_steps if self._then == "stop" else self._num_steps + self._lag + 1
        if steps is not None and steps < needed:
            raise ConfigurationError(
                f"{self._name}(num_steps={self._num_steps}, then={self._then!r}, lag={self._lag}) requires a run of at "
                f"least {needed} steps, and this one has {steps}. Train longer, or test with fewer steps."
            )

    def _set_rate(self, first_step: int, index: int, control: Control) -> None:
        control.set_hyperparam(
            self._hyperparam,
            self._test.rate(index),
            path=self._path,
            at_step=first_step + index,
            reason=f"lr finder: {index + 1} of {self._num_steps}",
        )

    @property
    def _tag(self) -> str:
        return f"{self._name}/start"

    def _get_state(self) -> LRFinderState:
        return self._test.state

    def _set_state(self, state: LRFinderState) -> None:
        self._test.state = state.model_copy(deep=True)
