"""``EarlyStopping``: end the run when a metric no longer improves."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any, Literal

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events import TO_BE_CONTINUED, EpochCompleted, EvalCompleted, RunCompleted, StepCompleted
from eventtrain.subscribers._shared.metric_goal import (
    Goal,
    Mode,
    Monitor,
    MonitorState,
    NaNPolicy,
    Unit,
    make_goal,
)
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.policies.patience_units import LAGS, WATCHED

logger = logging.getLogger("eventtrain")


class EarlyStoppingState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    monitor: MonitorState


class EarlyStopping(Subscriber):
    """Stops the run before the next epoch begins (``lag=0``), with Keras 3's decisions.

    Args:
        monitor: name of a metric of EpochCompleted; for other units, of the event that they go by.
        min_delta: how much better counts as an improvement.
        patience: stop at the ``patience``-th epoch in a row without one (0 and 1 both: at the first), never at epoch 0.
        mode: "min", "max", or "auto" by the metric's name.
        baseline: an improvement that does not beat it does not start the count anew, and never stops the run itself.
        restore_best_weights: put the params of the best epoch back when the run ends by itself, stopped early or not.
            They are kept on the device until then. Not for "steps" and "seconds".
        start_from_epoch: what comes before is not looked at; counted in ``patience_unit``.
        stopping_threshold: stop as soon as the metric is better than this (Lightning's).
        divergence_threshold: stop as soon as the metric is worse than this (Lightning's).
        patience_unit: "epochs"; "evaluations" (EvalCompleted, also in the middle of an epoch; ``lag=0``); "steps"
            (StepCompleted; ``lag=64``); "seconds" (EpochCompleted by the clock: no lag, so not reproducible).
        min_delta_relative: ``min_delta`` is a share of the value to be beaten.
        nan: a NaN is never best. "count": no improvement; "ignore": not looked at; "stop": stop the run.
        strict: fail the run if the metric is missing, instead of warning once.

    The count begins anew with every ``fit``, unless a saved state was loaded.

    Raises:
        ConfigurationError: a negative patience, an unknown mode, a metric whose direction cannot be told.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0,
        patience: int = 0,
        mode: Mode = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
        *,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        patience_unit: Unit = "epochs",
        min_delta_relative: bool = False,
        nan: NaNPolicy = "count",
        strict: bool = False,
    ) -> None:
        goal = make_goal("EarlyStopping", monitor, mode, min_delta, relative=min_delta_relative)
        require_count("EarlyStopping", "patience", patience)
        require_count("EarlyStopping", "start_from_epoch", start_from_epoch)
        require_choice("EarlyStopping", "patience_unit", patience_unit, tuple(WATCHED))
        require_choice("EarlyStopping", "nan", nan, ("count", "ignore", "stop"))
        for name, value in (
            ("baseline", baseline),
            ("stopping_threshold", stopping_threshold),
            ("divergence_threshold", divergence_threshold),
        ):
            if value is not None:
                require_number("EarlyStopping", name, value)
        if restore_best_weights and LAGS[patience_unit] != 0:
            raise ConfigurationError(
                f"EarlyStopping(restore_best_weights=True, patience_unit={patience_unit!r}): the loop would be some "
                'steps further when the best weights are asked for, and keep later ones. Use patience_unit="epochs", '
                'or "evaluations" with EvaluateEvery(steps=...).'
            )
        self.events = (WATCHED[patience_unit], RunCompleted)
        self.lag = LAGS[patience_unit]
        self.on_error = "fail" if strict else "isolate"
        self._monitor = Monitor(
            goal, patience, unit=patience_unit, baseline=baseline, start_from=start_from_epoch, nan=nan
        )
        self._metric = monitor
        self._strict = strict
        # A threshold is passed without a margin, as Lightning compares.
        self._better = Goal(goal.mode)
        self._stopping_threshold = stopping_threshold
        self._divergence_threshold = divergence_threshold
        self._restores = restore_best_weights
        self._restored = False
        self._loaded = False
        self._reader = MetricReader("EarlyStopping", monitor, strict=strict)

    @property
    def best(self) -> float | None:
        """The best value so far; None before the first."""
        return self._monitor.best

    @property
    def best_epoch(self) -> int | None:
        """The 0-based epoch of the best value."""
        return self._monitor.best_epoch

    @property
    def wait(self) -> float:
        """For how long there was no improvement that counted, in ``patience_unit``."""
        return self._monitor.wait

    async def start(self, run: RunContext) -> None:
        """Begin anew, unless a saved state was loaded. Raises where ``lag`` would keep later weights than the best."""
        self._reader = MetricReader(
            self._name,
            self._metric,
            strict=self._strict,
            evaluates=run.can_evaluate and self._monitor.unit in ("epochs", "seconds"),
        )
        kept = run.control.snapshots.get(self._best_tag)
        if not self._loaded:
            self._monitor.reset()
            if kept is not None:
                kept.release()
        if not self._restores:
            return
        if self.lag != 0:
            raise ConfigurationError(
                f"{self._name}: with restore_best_weights and lag={self.lag!r} the weights of later steps would be "
                "kept as the best. Leave lag alone."
            )
        put_back_before = run.ended is not None and kept is None
        if self._loaded and kept is None and self.best is not None and not put_back_before:
            logger.warning(
                "%s goes on from a state whose best weights (%s %.6g) are not here: only better ones can be restored. "
                "fit(resume=True) has them in its checkpoint.",
                self._name, self._metric, self.best,
            )  # fmt: skip
        self._restored = put_back_before
        run.restore_at_end(self._best_tag, where=self._note_restoring)

    async def stop(self) -> None:
        """The next run begins anew."""
        self._loaded = False

    async def handle(
        self, event: EpochCompleted | EvalCompleted | StepCompleted | RunCompleted, control: Control
    ) -> None:
        """Count, and stop the run when patience is at its end."""
        if isinstance(event, RunCompleted):
            self._end(event)
            return
        value = self._reader.read(event.metrics, unprefixed=isinstance(event, EvalCompleted))
        if value is None:
            return
        first = event.epoch == 0 if isinstance(event, EpochCompleted) else self._monitor.seen == 0
        verdict = self._monitor.observe(value, epoch=event.epoch, step=event.step, time_s=monotonic())
        if verdict.improved and self._restores:
            control.snapshot(self._best_tag, reason=f"best {self._metric}: {value:.6g}")
        reason = self._threshold_passed(value)
        if verdict.stop:
            reason = f"{self._metric} is NaN"
        elif verdict.exhausted and not first:
            reason = reason or self._explain(event.epoch)
        if reason:
            control.stop(reason=f"early stopping: {reason}")

    def _end(self, event: RunCompleted) -> None:
        if event.reason in TO_BE_CONTINUED:
            return
        if self._restores and not self._restored:
            logger.warning(
                "%s restored no weights: %s. The last ones stay.",
                self._name,
                f"{self._metric!r} was never a number, so none were the best"
                if self.best is None
                else f"those of the best {self._metric}, {self.best:.6g}, were not kept on the device",
            )
        if self._monitor.seen == 0:
            self._reader.end()

    def _note_restoring(self) -> bool:
        """Asked on the training thread, where there is something to restore, before RunCompleted is said."""
        self._restored = True
        return True

    def _threshold_passed(self, value: float) -> str:
        limit = self._stopping_threshold
        if limit is not None and self._better.improves(value, limit):
            return f"{self._metric} {value:.6g} is better than the stopping threshold {limit:.6g}"
        limit = self._divergence_threshold
        if limit is not None and self._better.improves(limit, value):
            return f"{self._metric} {value:.6g} is worse than the divergence threshold {limit:.6g}"
        return ""

    def _explain(self, epoch: int) -> str:
        monitor, best_epoch = self._monitor, self.best_epoch
        if self.best is None or best_epoch is None:
            return f"{self._metric} was never a number"
        unit = monitor.unit
        count = epoch - best_epoch if unit == "epochs" else monitor.wait
        return (
            f"{self._metric} has not improved for {count:.6g} {unit} "
            f"(best {self.best:.6g} in epoch {best_epoch + 1}, {monitor.rule})"
        )

    @property
    def _name(self) -> str:
        return self.name or "EarlyStopping"

    @property
    def _best_tag(self) -> str:
        return f"{self._name}/best"

    def state_dict(self) -> dict[str, Any]:
        """The count so far, as plain JSON data."""
        return EarlyStoppingState(monitor=self._monitor.state).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count over; the run that follows goes on with it.

        Raises:
            StateError: another version, or broken.
        """
        self._monitor.load(EarlyStoppingState.parse(self._name, state).monitor)
        self._loaded = True
