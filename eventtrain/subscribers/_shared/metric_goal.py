"""``Goal``: when a metric has improved. Pure."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eventtrain.errors import ConfigurationError
from eventtrain.validation.arguments import require_choice, require_number

Mode = Literal["auto", "min", "max"]

SMALLER_IS_BETTER = (
    "loss losses error errors err mae mse rmse mape msle nll bce kl perplexity ppl cost regret distance divergence "
    "crossentropy hinge logcosh poisson wer cer fid"
)
"""Words in the name of a metric that is better when smaller."""
LARGER_IS_BETTER = (
    "accuracy acc auc auroc auprc precision recall sensitivity specificity f1 f1score fbeta iou miou dice r2 bleu "
    "rouge map ndcg mrr psnr ssim cosinesimilarity correlation reward return score correct"
)
"""Words in the name of a metric that is better when larger."""
PAIRS = (("cross", "entropy"), ("cosine", "similarity"), ("io", "u"))
"""Two words that count as one; Keras names IoU io_u."""


@dataclass(frozen=True)
class Goal:
    """Direction and margin of an improvement.

    The comparison is that of Keras' ``MonitorCallback``: strict, the margin is taken off the new value, and the result
    is rounded to float32. So a change of exactly ``min_delta`` is not an improvement (1.0 to 0.9 by 0.1, although
    0.9f + 0.1 < 1.0 in float64), and neither is a difference that float32 does not show.

    Attributes:
        mode: the direction that is better.
        min_delta: smallest change that counts; at least 0.
        relative: ``min_delta`` is a fraction of the value to beat.
    """

    mode: Literal["min", "max"]
    min_delta: float = 0.0
    relative: bool = False

    def improves(self, value: float, on: float | None) -> bool:
        """Returns whether ``value`` is better than ``on``; any number is better than None, NaN is never better."""
        if math.isnan(value):
            return False
        if on is None:
            return True
        margin = self.min_delta * abs(on) if self.relative and math.isfinite(on) else self.min_delta
        with np.errstate(over="ignore"):  # beyond float32 the value is infinite
            if self.mode == "min":
                return bool(np.float32(value + margin) < np.float32(on))
            return bool(np.float32(value - margin) > np.float32(on))


def make_goal(owner: str, metric: str, mode: Mode, min_delta: float, *, relative: bool = False) -> Goal:
    """Returns the goal of a user's arguments, checked. The sign of ``min_delta`` does not matter, as in Keras.

    Raises:
        ConfigurationError: an unknown mode, a ``min_delta`` that is not a finite number, or mode "auto" for a metric
            whose name does not tell which direction is better.
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
        f"{owner}(monitor={metric!r}): the name does not tell whether smaller or larger is better. "
        f'{_correction(metric, words) or "Pass"} mode="min" or mode="max".'
    )


def _correction(metric: str, words: set[str]) -> str:
    """Returns the question whether a word of the name is misspelt, if one is close to a known one."""
    known = [*SMALLER_IS_BETTER.split(), *LARGER_IS_BETTER.split()]
    for word in sorted(words.difference(known)):
        if nearest := difflib.get_close_matches(word, known, n=1, cutoff=0.8):
            return f"Did you mean {metric.lower().replace(word, nearest[0])!r}? If not, pass"
    return ""
