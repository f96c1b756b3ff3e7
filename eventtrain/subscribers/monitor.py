"""What it means that a metric has improved: shared by every policy that watches one. Pure; no events, no threads."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eventtrain.errors import ConfigurationError
from eventtrain.frozen import Number

logger = logging.getLogger("eventtrain")

Mode = Literal["auto", "min", "max"]

SMALLER_IS_BETTER = (
    "loss losses error errors err mae mse rmse mape msle nll bce kl perplexity ppl cost regret distance divergence "
    "crossentropy wer cer fid"
)
"""Words in a metric's name that say smaller is better."""
LARGER_IS_BETTER = (
    "accuracy acc auc auroc auprc precision recall sensitivity specificity f1 f1score fbeta iou miou dice r2 bleu "
    "rouge map ndcg mrr psnr ssim reward return score correct"
)
"""Words in a metric's name that say larger is better."""


@dataclass(frozen=True)
class Monitor:
    """One metric, the direction that is better, and how much better counts.

    The comparison is Keras' (``MonitorCallback``): strict, and ``min_delta`` is taken off the new value. Unlike
    there, NaN is never an improvement, so a first NaN does not stay the best value for ever.
    """

    metric: str
    mode: Literal["min", "max"]
    min_delta: float = 0.0

    def improves(self, value: float, on: float | None) -> bool:
        """Whether ``value`` is better than ``on``; any number is better than None, NaN better than nothing."""
        if math.isnan(value):
            return False
        if on is None:
            return True
        return value + self.min_delta < on if self.mode == "min" else value - self.min_delta > on

    def read(self, metrics: Mapping[str, Number]) -> float | None:
        """The monitored value as a float, or None where the metric is missing."""
        value = metrics.get(self.metric)
        return None if value is None else float(value)


def make_monitor(owner: str, metric: str, mode: Mode, min_delta: float) -> Monitor:
    """Check what a user gave and settle the direction.

    Raises:
        ConfigurationError: an unknown mode, a ``min_delta`` that is no finite number, or mode "auto" for a metric whose
            name does not say which direction is better.
    """
    if mode not in ("auto", "min", "max"):
        raise ConfigurationError(f'{owner}(mode={mode!r}): is none of "auto", "min", "max".')
    require_number(owner, "min_delta", min_delta)
    return Monitor(metric, _direction(owner, metric) if mode == "auto" else mode, abs(min_delta))


def _direction(owner: str, metric: str) -> Literal["min", "max"]:
    words = set(re.split(r"[^a-z0-9]+", metric.lower().removeprefix("val_")))
    words |= {"crossentropy"} if {"cross", "entropy"} <= words else set()
    smaller, larger = (
        not words.isdisjoint(SMALLER_IS_BETTER.split()),
        not words.isdisjoint(LARGER_IS_BETTER.split()),
    )
    if smaller != larger:
        return "min" if smaller else "max"
    raise ConfigurationError(
        f"{owner}(monitor={metric!r}): the name does not say whether smaller or larger is better. "
        'Pass mode="min" or mode="max".'
    )


def require_number(owner: str, name: str, value: Any) -> None:
    """Raise ConfigurationError unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a finite number.")


def require_count(owner: str, name: str, value: Any) -> None:
    """Raise ConfigurationError unless ``value`` is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"{owner}({name}={value!r}): needs a whole number of at least 0.")


def warn_missing(owner: str, metric: str, metrics: Mapping[str, Number]) -> None:
    """Say in the log that what should be watched is not there."""
    hint = (
        " Metrics of eval_data start with val_; does fit(...) have eval_data?"
        if metric.startswith("val_")
        else ""
    )
    logger.warning(
        "%s watches %r, which is not among the metrics of this epoch (%s), so it decides nothing.%s",
        owner, metric, ", ".join(metrics) or "none", hint,
    )  # fmt: skip


def best_to_json(best: float | None) -> float | str | None:
    """``best`` as JSON has it: infinities, which JSON lacks, as text."""
    return best if best is None or math.isfinite(best) else str(best)


def check_version(owner: str, state: Mapping[str, Any], known: int) -> None:
    """Raise ConfigurationError for a saved state of another version."""
    if state.get("version") != known:
        raise ConfigurationError(
            f"{owner} cannot take over a state of version {state.get('version')!r}; it knows version {known}. "
            "Resume with the version of eventtrain that wrote it."
        )
