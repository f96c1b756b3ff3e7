"""``LRFinder``: an exponential learning rate range test, with the state put back afterwards."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import FiniteFloat

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError, SnapshotError, StateError
from eventtrain.events import RunStarted, StepCompleted
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.policies.patience_units import STEP_LAG
from eventtrain.subscribers.policies.range_test import RangeTest

logger = logging.getLogger("eventtrain")


class LRFinderState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    first_step: int | None = None
    """Completed when the test began; None before."""
    back_at: int | None = None
    """Where the state before the test is put back; None while it goes on."""
    learning_rates: tuple[FiniteFloat, ...] = ()
    losses: tuple[FiniteFloat, ...] = ()
    smoothed: tuple[FiniteFloat, ...] = ()


NOTHING = LRFinderState()


class LRFinder(Subscriber):
    """Trains the first steps of a run with a growing learning rate, says which is good, and puts the state back.

    The test is Smith's (2017, arXiv:1506.01186) as fastai and Lightning's ``lr_find`` do it: the learning rate grows
    exponentially from step to step, the losses are averaged exponentially (with bias correction), and the suggestion is
    where the average falls fastest over the logarithm of the learning rate (the first tenth and the last point left
    out).

    Args:
        min_lr, max_lr: of the first and the last step of the test.
        num_steps: its length.
        monitor: name of a metric of StepCompleted, the smaller the better.
        hyperparam: its name in ``optax.inject_hyperparams``, built with a number and not with a schedule.
        path: of the hyperparameter, where the name stands in several places.
        smoothing: weight of the past in the average, from 0 (none) to below 1.
        divergence: the test ends early once the average is this many times its best value; None: never. A loss that
            is NaN or infinite always ends it.
        then: when the test is over, "stop" the run; "continue" from the state before the test; or "apply": continue
            so, with the suggestion as learning rate.
        lag: the test ends so many steps after the event that says so, in every rerun.

    Every ``fit`` begins with a test, unless a saved state was loaded. The state of the first boundary is kept on the
    device meanwhile; parameters, optimiser state, hyperparameters and step extensions are put back bit for bit. The
    step count, the epoch and the position in the data are not. A run that ends before its test has the state put back
    at its end. One that is interrupted keeps both states: the next ``fit`` puts the first one back and tests anew.

    Other policies see the losses of the test, so a run of its own, ``then="stop"``, is best: ``fit(data,
    steps=num_steps)``. With "continue" and "apply" it goes on to get every step, as any policy by step.

    Raises:
        ConfigurationError: values out of their range; when a run starts, one that is too short for the test.
    """

    events = (RunStarted, StepCompleted)
    on_error = "fail"

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
        require_number("LRFinder", "min_lr", min_lr)
        require_number("LRFinder", "max_lr", max_lr)
        require_count("LRFinder", "num_steps", num_steps, at_least=4)
        require_number("LRFinder", "smoothing", smoothing, at_least=0)
        require_count("LRFinder", "lag", lag)
        require_choice("LRFinder", "then", then, ("stop", "continue", "apply"))
        if not 0 < min_lr < max_lr:
            raise ConfigurationError(
                f"LRFinder(min_lr={min_lr!r}, max_lr={max_lr!r}): the learning rate grows exponentially from one to "
                "the other, so 0 < min_lr < max_lr has to hold."
            )
        if smoothing >= 1:
            raise ConfigurationError(
                f"LRFinder(smoothing={smoothing!r}): with a weight of 1 or more for the past no loss would count. Give "
                "less, say 0.98."
            )
        if divergence is not None:
            require_number("LRFinder", "divergence", divergence)
            if divergence <= 1:
                raise ConfigurationError(
                    f"LRFinder(divergence={divergence!r}): how many times its best value the loss has to be; more than "
                    "1, or None for never."
                )
        self.lag = {RunStarted: 0, StepCompleted: lag}
        self._test = RangeTest(min_lr, max_lr, num_steps, smoothing, divergence)
        self._num_steps = num_steps
        self._metric = monitor
        self._hyperparam = hyperparam
        self._path = path
        self._then = then
        self._lag = lag
        self._reader = MetricReader("LRFinder", monitor, strict=True)
        self._first_step: int | None = None
        self._back_at: int | None = None
        self._loaded = False

    @property
    def suggestion(self) -> float | None:
        """The learning rate at the steepest fall of the smoothed loss; None where it falls nowhere."""
        return self._test.suggestion

    @property
    def learning_rates(self) -> list[float]:
        """Of each step of the test with a finite loss."""
        return list(self._test.learning_rates)

    @property
    def losses(self) -> list[float]:
        """Of the same steps, to be drawn over ``learning_rates``."""
        return list(self._test.losses)

    @property
    def smoothed(self) -> list[float]:
        """The averages of ``losses``."""
        return list(self._test.smoothed)

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded. Raises where the run cannot hold the test."""
        run.require_hyperparam(self._hyperparam, self._path)
        self._reader = MetricReader(self._name, self._metric, strict=True)
        if self.every != 1:
            raise ConfigurationError(
                f"{self._name}: every={self.every!r} would leave out steps of the test. Leave it at 1."
            )
        if run.resumed and not self._loaded:
            raise ConfigurationError(
                f"{self._name} tests at the beginning of a run, and this one resumes in its middle. Leave it out."
            )
        if not self._loaded:
            self._take(NOTHING)
            self._check_length(run)
        elif self._is_under_way and self._tag not in run.control.snapshots:
            raise StateError(
                f"{self._name} cannot go on with a test that was cut short: the state before it is lost, and the "
                "present one was trained with the rates of the test. Begin anew, or resume from an earlier checkpoint."
            )
        run.restore_at_end(self._tag, "all")  # where the state is not back and released by then

    async def stop(self) -> None:
        """Say what was found, if the run ended before the test was over."""
        self._loaded = False
        if self._is_under_way:
            logger.warning(
                "The run ended after %d of the %d steps of the test of %s.",
                len(self.losses), self._num_steps, self._name,
            )  # fmt: skip
            self._say_suggestion()

    async def handle(self, event: RunStarted | StepCompleted, control: Control) -> None:
        """Begin the test, or take one step's loss."""
        if isinstance(event, RunStarted):
            if self._back_at is None:
                self._begin(event, control)
        elif self._back_at is None:
            self._observe(event, control)
        elif event.step > self._back_at and self._tag in control.snapshots:
            control.snapshots[self._tag].release()

    def _begin(self, event: RunStarted, control: Control) -> None:
        self._take(NOTHING.model_copy(update={"first_step": event.step}))
        if self._tag in control.snapshots:
            control.restore(self._tag, reason="an earlier test was interrupted")
        else:
            control.snapshot(self._tag, reason="state before the test")
        for index in range(min(self._num_steps, self._lag + 1)):
            self._set_rate(index, control)

    def _observe(self, event: StepCompleted, control: Control) -> None:
        assert self._first_step is not None
        if self._tag not in control.snapshots:
            raise SnapshotError(
                f"{self._name} cannot put the state back: the device had no room to keep it. Use "
                'Trainer(snapshot="host"), or a smaller model or batch.'
            )
        loss = self._reader.read(event.metrics)
        assert loss is not None
        index = event.step - self._first_step - 1
        why = self._test.observe(index, loss)
        if why:
            self._end(event.step, control, f"{self._metric} {why}")
        elif index + 1 + self._lag < self._num_steps:
            self._set_rate(index + 1 + self._lag, control)

    def _end(self, step: int, control: Control, why: str) -> None:
        self._back_at = step + self._lag
        suggestion = self._say_suggestion()
        if self._then == "stop":
            control.stop(reason=f"lr finder: {why}")  # the state is put back when the run has ended
            return
        control.restore(self._tag, reason=f"lr finder: {why}")
        if self._then == "apply" and suggestion is not None:
            control.set_hyperparam(
                self._hyperparam, suggestion, path=self._path, reason="lr finder: suggestion"
            )

    def _say_suggestion(self) -> float | None:
        suggestion = self.suggestion
        if suggestion is None:
            logger.warning(
                "%s has no suggestion: %s fell nowhere between the learning rates tested.", self._name, self._metric
            )  # fmt: skip
        else:
            logger.info("%s suggests a learning rate of %.3g.", self._name, suggestion)
        return suggestion

    def _check_length(self, run: RunContext) -> None:
        steps = run.total_steps
        needed = self._num_steps if self._then == "stop" else self._num_steps + self._lag + 1
        if steps is not None and steps < needed:
            raise ConfigurationError(
                f"{self._name}(num_steps={self._num_steps}, then={self._then!r}, lag={self._lag}) needs a run of at "
                f"least {needed} steps, and this one has {steps}. Train longer, or test with fewer steps."
            )

    def _set_rate(self, index: int, control: Control) -> None:
        assert self._first_step is not None
        control.set_hyperparam(
            self._hyperparam,
            self._test.rate(index),
            path=self._path,
            at_step=self._first_step + index,
            reason=f"lr finder: {index + 1} of {self._num_steps}",
        )

    @property
    def _is_under_way(self) -> bool:
        return self._first_step is not None and self._back_at is None

    @property
    def _name(self) -> str:
        return self.name or "LRFinder"

    @property
    def _tag(self) -> str:
        return f"{self._name}/start"

    def state_dict(self) -> dict[str, Any]:
        """The test so far, as plain JSON data."""
        return LRFinderState(
            first_step=self._first_step,
            back_at=self._back_at,
            learning_rates=tuple(self._test.learning_rates),
            losses=tuple(self._test.losses),
            smoothed=tuple(self._test.smoothed),
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the test over: one that is over is not repeated, one that was cut short by a checkpoint goes on.

        Raises:
            StateError: another version, or broken.
        """
        self._take(LRFinderState.parse(self._name, state))
        self._loaded = True

    def _take(self, state: LRFinderState) -> None:
        self._first_step, self._back_at = state.first_step, state.back_at
        self._test.learning_rates = list(state.learning_rates)
        self._test.losses = list(state.losses)
        self._test.smoothed = list(state.smoothed)
