"""What it means that a metric has improved, and when patience is at its end: shared by every policy that watches one.

Pure: no events, no threads, no clock of its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_number

Mode = Literal["auto", "min", "max"]
Unit = Literal["epochs", "steps", "evaluations", "seconds"]
"""What patience, cooldown and start_from count."""
NaNPolicy = Literal["count", "ignore", "stop"]
"""A NaN counts as no improvement, is not looked at, or is a reason to stop. It is never the best value."""

SMALLER_IS_BETTER = (
    "loss losses error errors err mae mse rmse mape msle nll bce kl perplexity ppl cost regret distance divergence "
    "crossentropy hinge logcosh poisson wer cer fid"
)
"""Words in a metric's name that say smaller is better."""
LARGER_IS_BETTER = (
    "accuracy acc auc auroc auprc precision recall sensitivity specificity f1 f1score fbeta iou miou dice r2 bleu "
    "rouge map ndcg mrr psnr ssim cosinesimilarity correlation reward return score correct"
)
"""Words in a metric's name that say larger is better."""
PAIRS = (("cross", "entropy"), ("cosine", "similarity"), ("io", "u"))
"""Written as two words they are one; Keras makes io_u of IoU."""


@dataclass(frozen=True)
class Goal:
    """What counts as better.

    The comparison is Keras' (``MonitorCallback``): strict, the margin is taken off the new value, and the result is
    rounded to float32. So a step of exactly ``min_delta`` is none (1.0 to 0.9 by 0.1, although 0.9f + 0.1 < 1.0 in
    float64), and neither is a difference that float32 does not show.

    Attributes:
        mode: which direction is better.
        min_delta: by how much at least; at least 0.
        relative: ``min_delta`` is a share of the value to be beaten.
    """

    mode: Literal["min", "max"]
    min_delta: float = 0.0
    relative: bool = False

    def improves(self, value: float, on: float | None) -> bool:
        """Whether ``value`` is better than ``on``; any number is better than None, NaN better than nothing."""
        if math.isnan(value):
            return False
        if on is None:
            return True
        margin = self.min_delta * abs(on) if self.relative and math.isfinite(on) else self.min_delta
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            if self.mode == "min":
                return bool(np.float32(value + margin) < np.float32(on))
            return bool(np.float32(value - margin) > np.float32(on))


@dataclass(frozen=True)
class Verdict:
    """What one observation means.

    Attributes:
        improved: it is the best value so far.
        exhausted: it is not, and patience is at its end.
        stop: it is NaN, and that is a reason to stop.
    """

    improved: bool = False
    exhausted: bool = False
    stop: bool = False


class MonitorState(SavedState):
    """A monitor's memory."""

    version: Literal[1] = 1
    best: float | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    wait: float = 0
    cooldown_left: float = 0
    seen: int = 0
    last_step: int | None = None
    elapsed_s: float = 0
    """In the unit "seconds": from the first observation to the last, without the time between two runs."""


class Monitor:
    """The state machine of Keras' ``EarlyStopping`` and ``ReduceLROnPlateau`` in one, for any unit of patience.

    Args:
        goal: what counts as better.
        patience: how long without an improvement is too long, in ``unit``.
        unit: epochs and evaluations are counted, one an observation; steps and seconds are measured between them.
        baseline: an improvement that does not beat it neither starts the count anew nor ends patience.
        cooldown: after ``begin_cooldown``, for how long nothing counts; the observation that ends it does.
        start_from: what comes before is not looked at: an epoch index, a step, a number of evaluations, or seconds
            after the first observation.
        nan: what a NaN does.
    """

    def __init__(
        self,
        goal: Goal,
        patience: float = 0,
        *,
        unit: Unit = "epochs",
        baseline: float | None = None,
        cooldown: float = 0,
        start_from: float = 0,
        nan: NaNPolicy = "count",
    ) -> None:
        self.goal = goal
        self.patience = patience
        self.unit: Unit = unit
        self._baseline = baseline
        self._cooldown = cooldown
        self._start_from = start_from
        self._nan: NaNPolicy = nan
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.load(MonitorState())

    @property
    def rule(self) -> str:
        """Patience and margin, for messages: without the margin a lower value may stand beside "no improvement"."""
        goal = self.goal
        share = " of the best" if goal.relative else ""
        margin = f", min_delta {goal.min_delta:g}{share}" if goal.min_delta else ""
        return f"patience {self.patience:g}{margin}"

    @property
    def best(self) -> float | None:
        """The best value so far; None before the first."""
        return self._best

    @property
    def best_epoch(self) -> int | None:
        """The epoch index of the best value."""
        return self._best_epoch

    @property
    def seen(self) -> int:
        """How many values were given, those not looked at counted."""
        return self._seen

    @property
    def wait(self) -> float:
        """For how long there was no improvement that counted."""
        return self._wait

    @property
    def cooldown_left(self) -> float:
        """For how long nothing counts yet."""
        return self._cooldown_left

    def observe(self, value: float, *, epoch: int, step: int, time_s: float = 0.0) -> Verdict:
        """Take one value in, in the order of training.

        ``time_s`` matters for the unit "seconds" only, and only its differences: the first observation, also after
        ``load``, has nothing to be measured from.
        """
        passed_s = self._passed_s(time_s)
        place = {"epochs": epoch, "steps": step, "evaluations": self._seen, "seconds": self._elapsed_s}
        self._seen += 1
        if place[self.unit] < self._start_from:
            return Verdict()
        elapsed = self._elapsed(step, passed_s)
        if math.isnan(value) and self._nan != "count":
            return Verdict(stop=self._nan == "stop")
        if self._cooldown_left > 0:
            self._cooldown_left = max(0, self._cooldown_left - elapsed)
            self._wait = 0
        improved = self.goal.improves(value, self._best)
        if improved:
            self._best, self._best_epoch, self._best_step = value, epoch, step
        if improved and (self._baseline is None or self.goal.improves(value, self._baseline)):
            self._wait = 0
        elif self._cooldown_left == 0:
            self._wait += elapsed
        exhausted = not improved and self._cooldown_left == 0 and self._wait >= self.patience
        return Verdict(improved, exhausted)

    def lengthen_cooldown(self, at_least: float) -> None:
        """Make the cooldowns to come no shorter than this."""
        self._cooldown = max(self._cooldown, at_least)

    def begin_cooldown(self) -> None:
        """Something was done about it: count anew, after the cooldown."""
        self._cooldown_left = self._cooldown
        self._wait = 0

    def _passed_s(self, time_s: float) -> float:
        if self.unit != "seconds":
            return 0.0  # a rerun has another time, and the same state
        passed_s = 0.0 if self._last_s is None else max(0.0, time_s - self._last_s)
        self._last_s = time_s
        self._elapsed_s += passed_s
        return passed_s

    def _elapsed(self, step: int, passed_s: float) -> float:
        last_step, self._last_step = self._last_step, step
        if self.unit == "seconds":
            return passed_s
        if self.unit == "steps":
            return 1 if last_step is None else step - last_step
        return 1

    @property
    def state(self) -> MonitorState:
        """What ``load`` takes."""
        return MonitorState(
            best=self._best, best_epoch=self._best_epoch, best_step=self._best_step, wait=self._wait,
            cooldown_left=self._cooldown_left, seen=self._seen, last_step=self._last_step, elapsed_s=self._elapsed_s,
        )  # fmt: skip

    def load(self, state: MonitorState) -> None:
        """Go on from ``state``."""
        self._best, self._best_epoch, self._best_step = state.best, state.best_epoch, state.best_step
        self._wait, self._cooldown_left, self._seen = state.wait, state.cooldown_left, state.seen
        self._last_step, self._elapsed_s = state.last_step, state.elapsed_s
        self._last_s: float | None = None


def make_goal(owner: str, metric: str, mode: Mode, min_delta: float, *, relative: bool = False) -> Goal:
    """Check what a user gave and settle the direction. The sign of ``min_delta`` does not matter, as in Keras.

    Raises:
        ConfigurationError: an unknown mode, a ``min_delta`` that is no finite number, or mode "auto" for a metric whose
            name does not say which direction is better.
    """
    require_choice(owner, "mode", mode, ("auto", "min", "max"))
    require_number(owner, "min_delta", min_delta)
    direction = _direction(owner, metric) if mode == "auto" else mode
    return Goal(direction, abs(min_delta), relative)


def _direction(owner: str, metric: str) -> Literal["min", "max"]:
    words = set(re.split(r"[^a-z0-9]+", metric.lower().removeprefix("val_")))
    words |= {first + second for first, second in PAIRS if {first, second} <= words}
    smaller = not words.isdisjoint(SMALLER_IS_BETTER.split())
    larger = not words.isdisjoint(LARGER_IS_BETTER.split())
    if smaller != larger:
        return "min" if smaller else "max"
    raise ConfigurationError(
        f"{owner}(monitor={metric!r}): the name does not say whether smaller or larger is better. "
        'Pass mode="min" or mode="max".'
    )
