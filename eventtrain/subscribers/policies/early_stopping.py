"""``EarlyStopping``: stops the run when a metric no longer improves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, EvalCompleted, RunCompleted
from eventtrain.subscribers._shared.metric_goal import Goal, Mode, make_goal
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.metric_monitor import (
    UNITS,
    MetricMonitor,
    Monitored,
    MonitorPolicy,
    MonitorPolicyState,
    MonitorState,
    NaNPolicy,
    Unit,
    Verdict,
)
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number

logger = logging.getLogger("eventtrain")


class EarlyStoppingState(MonitorPolicyState):
    """State of an ``EarlyStopping``; ``others``: of the metrics after the first, in their order."""

    others: tuple[MonitorState, ...] = ()


@dataclass(eq=False)
class _Watched:
    """One of the metrics after the first."""

    monitor: MetricMonitor
    reader: MetricReader


class EarlyStopping(MonitorPolicy):
    """Stops the run before the next epoch begins (``lag=0``), with Keras 3's decisions.

    Args:
        monitor: name of a metric of EpochCompleted; for other units, of that unit's event. A list of names watches
            several, each with its own best value and count.
        min_delta: smallest change that counts as an improvement.
        patience: stop at the ``patience``-th epoch in a row without one (0 and 1 both: at the first), never at epoch 0.
        mode: "min", "max", or "auto" by the metric's name.
        baseline: an improvement that does not beat it does not restart the count, and never stops the run itself.
        restore_best_weights: restore the params of the best epoch when the run ends by itself, stopped early or not.
            They are kept on the device until then. Not for "steps" and "seconds".
        start_from_epoch: earlier values are skipped; counted in ``patience_unit``.
        stopping_threshold: stop as soon as the metric is better than this (as Lightning does).
        divergence_threshold: stop as soon as the metric is worse than this (as Lightning does).
        patience_unit: "epochs"; "evaluations" (EvalCompleted, also in the middle of an epoch; ``lag=0``); "steps"
            (StepCompleted; ``lag=64``); "seconds" (EpochCompleted, by the clock: no lag, so not reproducible).
        min_delta_relative: ``min_delta`` is a fraction of the value to beat.
        nan: a NaN is never the best. "count": no improvement; "ignore": skipped; "stop": stop the run.
        strict: fail the run if an event lacks the metric, instead of warning once. A metric that no event can have
            fails it before the first step.
        when: with several metrics: stop when patience is exhausted for "all" of them at one event, or for "any".

    Of several metrics the first decides which weights are the best. ``best``, ``best_epoch`` and ``wait`` are its own.
    ``baseline`` and the thresholds are for one metric. The count starts from scratch with every ``fit``, unless a saved
    state was loaded.

    Raises:
        ConfigurationError: an argument is invalid, or the metric's name does not tell its direction.
    """

    _initial = EarlyStoppingState(monitor=MonitorState())

    @checked
    def __init__(
        self,
        monitor: str | Sequence[str] = "val_loss",
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
        when: Literal["all", "any"] = "all",
    ) -> None:
        metrics = (monitor,) if isinstance(monitor, str) else tuple(monitor)
        _require_distinct(metrics)
        require_choice("EarlyStopping", "when", when, ("all", "any"))
        goal, *goals = [
            make_goal("EarlyStopping", metric, mode, min_delta, relative=min_delta_relative)
            for metric in metrics
        ]
        require_count("EarlyStopping", "start_from_epoch", start_from_epoch)
        require_number("EarlyStopping", "baseline", baseline, optional=True)
        require_number("EarlyStopping", "stopping_threshold", stopping_threshold, optional=True)
        require_number("EarlyStopping", "divergence_threshold", divergence_threshold, optional=True)
        if goals and (baseline, stopping_threshold, divergence_threshold) != (None, None, None):
            raise ConfigurationError(
                f"EarlyStopping(monitor={list(metrics)!r}): baseline, stopping_threshold and divergence_threshold are "
                "for one metric. Use another EarlyStopping for them."
            )
        super().__init__(
            metrics[0],
            MetricMonitor(
                goal, patience, unit=patience_unit, baseline=baseline, start_from=start_from_epoch, nan=nan
            ),
            strict=strict,
        )
        self._others = [
            _Watched(
                MetricMonitor(other, patience, unit=patience_unit, start_from=start_from_epoch, nan=nan),
                MetricReader("EarlyStopping", metric, strict=strict),
            )
            for metric, other in zip(metrics[1:], goals, strict=True)
        ]
        if goals:
            about = {"monitor": ", ".join(metrics), "mode": ", ".join(one.mode for one in (goal, *goals))}
            self.state_about = {**self.state_about, **about}
        self._needed = 1 if when == "any" else len(metrics)
        self._exhausted: list[str] = []
        self._stop_now = ""
        if restore_best_weights and self.lag != 0:
            raise ConfigurationError(
                f"EarlyStopping(restore_best_weights=True, patience_unit={patience_unit!r}): the loop would be some "
                "steps further when it is asked to keep the best weights, and keep later ones. Use "
                'patience_unit="epochs", or "evaluations" with EvaluateEvery(steps=...).'
            )
        # Thresholds have no margin, as in Lightning.
        self._better = Goal(goal.mode)
        self._stopping_threshold = stopping_threshold
        self._divergence_threshold = divergence_threshold
        self._restores = restore_best_weights
        self._restored = False

    @property
    def best_epoch(self) -> int | None:
        """The 0-based epoch of the best value; None before the first."""
        return self._monitor.state.best_epoch

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded.

        Raises:
            ConfigurationError: ``lag`` was changed, or the weights to be restored are unknown.
        """
        await super().start(run)
        for other in self._others:
            other.reader = other.reader.for_run(self._name, evaluates=self._evaluates(run))
            event = UNITS[other.monitor.unit][0]
            other.reader.look_up_in(run, event, unprefixed=event is EvalCompleted)
        kept = run.control.snapshots.get(self._best_tag)
        if not self._loaded and kept is not None:
            kept.release()
        if not self._restores:
            return
        if self.lag != 0:
            raise ConfigurationError(
                f"{self._name}: with restore_best_weights and lag={self.lag!r} the weights of later steps would be "
                "kept as the best. Leave lag alone."
            )
        run.require_params(f"{self._name}(restore_best_weights=True)")
        self._restored = run.ended is not None and kept is None
        if self._loaded and kept is None and self.best is not None and not self._restored:
            logger.warning(
                "%s continues from a state whose best weights (%s %.6g) are missing: only better ones can be restored. "
                "fit(resume=True) reads them from its checkpoint.",
                self._name, self._metric, self.best,
            )  # fmt: skip
        run.restore_at_end(self._best_tag, where=self._note_restoring)

    async def handle(self, event: Monitored | RunCompleted, control: Control) -> None:
        """Counts for each metric, and stops the run when patience is exhausted for enough of them."""
        self._exhausted.clear()
        self._stop_now = ""
        await super().handle(event, control)
        if isinstance(event, RunCompleted):
            return
        for other in self._others:
            value = other.reader.read(event.metrics, unprefixed=isinstance(event, EvalCompleted))
            if value is not None:
                verdict = other.monitor.observe(value, epoch=event.epoch, step=event.step, time_s=monotonic())
                self._note(event, verdict, other.reader.metric, other.monitor)
        reason = self._stop_now
        if not reason and len(self._exhausted) >= self._needed:
            reason = "; ".join(self._exhausted)
        if reason:
            control.stop(reason=f"early stopping: {reason}")

    def _decide(self, event: Monitored, value: float, verdict: Verdict, control: Control) -> None:
        if verdict == "improved" and self._restores:
            control.snapshot(self._best_tag, reason=f"best {self._metric}: {value:.6g}")
        self._stop_now = self._threshold_passed(value)
        self._note(event, verdict, self._metric, self._monitor)

    def _note(self, event: Monitored, verdict: Verdict, metric: str, monitor: MetricMonitor) -> None:
        first = event.epoch == 0 if isinstance(event, EpochCompleted) else monitor.state.seen == 1
        if verdict == "stop":
            self._stop_now = f"{metric} is NaN"
        elif verdict == "exhausted" and not first:
            self._exhausted.append(_explanation(metric, monitor, event.epoch))

    def _get_state(self) -> MonitorPolicyState:
        others = tuple(other.monitor.state for other in self._others)
        if not others:
            return MonitorPolicyState(monitor=self._monitor.state)
        return EarlyStoppingState(monitor=self._monitor.state, others=others)

    def _set_state(self, state: MonitorPolicyState) -> None:
        super()._set_state(state)
        saved = state.others if isinstance(state, EarlyStoppingState) else ()
        for index, other in enumerate(self._others):
            other.monitor.load(saved[index] if index < len(saved) else MonitorState())

    def _end(self) -> None:
        for other in self._others:
            if other.monitor.state.seen == 0:
                other.reader.end()
        if self._restores and not self._restored:
            logger.warning(
                "%s restored no weights: %s. The last ones remain.",
                self._name,
                f"{self._metric!r} was never a number, so there are no best ones"
                if self.best is None
                else f"those of the best {self._metric}, {self.best:.6g}, were not kept on the device",
            )
        super()._end()

    def _note_restoring(self) -> bool:
        """Called on the training thread before RunCompleted, if there is a snapshot to restore."""
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

    @property
    def _best_tag(self) -> str:
        return f"{self._name}/best"


def _explanation(metric: str, monitor: MetricMonitor, epoch: int) -> str:
    best, best_epoch, unit = monitor.state.best, monitor.state.best_epoch, monitor.unit
    if best is None or best_epoch is None:
        return f"{metric} was never a number"
    count = epoch - best_epoch if unit == "epochs" else monitor.state.wait
    return (
        f"{metric} has not improved for {count:.6g} {unit} "
        f"(best {best:.6g} in epoch {best_epoch + 1}, {monitor.rule})"
    )


def _require_distinct(metrics: tuple[str, ...]) -> None:
    if not metrics or len(set(metrics)) < len(metrics):
        raise ConfigurationError(
            f"EarlyStopping(monitor={list(metrics)!r}): monitor must be the name of a metric, or a list of different "
            "names."
        )
