"""``RangeTest``: the arithmetic of a learning rate range test. Pure; no events, no threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class RangeTest:
    """Smith's (2017, arXiv:1506.01186) test as fastai and Lightning's ``lr_find`` do it.

    Args:
        min_lr, max_lr: of the first and the last step; it grows exponentially between them.
        num_steps: at least 2.
        smoothing: weight of the past in the average of the losses, from 0 to below 1.
        divergence: how many times its best value the average may be; None: as much as it likes.
        learning_rates, losses, smoothed: what was observed so far, one entry for each finite loss.
    """

    min_lr: float
    max_lr: float
    num_steps: int
    smoothing: float = 0.98
    divergence: float | None = 4.0
    learning_rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)

    def rate(self, index: int) -> float:
        """The learning rate of the step with this 0-based index."""
        return self.min_lr * (self.max_lr / self.min_lr) ** (index / (self.num_steps - 1))

    def observe(self, index: int, loss: float) -> str:
        """Take the loss of one step, in order. Returns why the test is over; "" while it is not."""
        rate = self.rate(index)
        if not math.isfinite(loss):
            return f"was {loss!r} at {rate:.3g}"
        # The bias-corrected exponential average, in the form that keeps a constant constant.
        before = self.smoothed[-1] if self.smoothed else loss
        weight = (1 - self.smoothing) / (1 - self.smoothing ** (len(self.losses) + 1))
        self.learning_rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(before + weight * (loss - before))
        if self._has_diverged():
            return f"diverged at {rate:.3g}"
        return f"was observed for all {self.num_steps} steps" if index + 1 == self.num_steps else ""

    def _has_diverged(self) -> bool:
        if self.divergence is None:
            return False
        best = min(self.smoothed)
        # Of a positive loss: more than ``divergence`` times the best. A negative one may grow by as much.
        return self.smoothed[-1] - best > (self.divergence - 1) * abs(best)

    @property
    def suggestion(self) -> float | None:
        """The learning rate at the steepest fall of the average over the logarithm; None where it falls nowhere.

        The first tenth, where the average is of few losses, and the last point, where it may have diverged, do not
        count.
        """
        first, last = len(self.losses) // 10, len(self.losses) - 1
        if last - first < 2:
            return None
        slope = np.gradient(np.asarray(self.smoothed[first:last]))  # the logarithms are evenly spaced
        steepest = int(slope.argmin())
        return self.learning_rates[first + steepest] if slope[steepest] < 0 else None
