"""Random cases: metrics, and policies with arguments. A seed determines its case."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

PolicyName = Literal["EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler"]
Column = tuple[float | None, ...]
"""One value per epoch; None if the metric is missing."""

METRICS = ("loss", "val_loss", "accuracy", "val_accuracy", "val_mae")
FIT_EVERY = 10
"""One case in this many runs through a real ``Trainer.fit``."""


@dataclass(frozen=True)
class Policy:
    """A policy and its arguments, which Keras' class and ours share."""

    name: PolicyName
    options: Mapping[str, Any]

    @property
    def monitor(self) -> str | None:
        """The metric that it monitors."""
        return self.options.get("monitor", "val_loss") if self.name != "LearningRateScheduler" else None

    @property
    def min_delta(self) -> float:
        """Minimum improvement; the sign does not matter."""
        return abs(self.options.get("min_delta", 1e-4 if self.name == "ReduceLROnPlateau" else 0))


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        seed: determines the case.
        through_fit: whether ours is a real run; its metrics are float32, as on a device.
        learning_rate: at the start.
        steps_per_epoch: each step increases the weight by 1.
        evaluate_every: number of epochs between the values of metrics with ``val_``.
        metrics: name -> values; at least one name, all of one length.
        characters: name -> pattern of its values, for the counts.
        policies: in the order of subscription.
    """

    seed: int
    through_fit: bool
    learning_rate: float
    steps_per_epoch: int
    evaluate_every: int
    metrics: Mapping[str, Column]
    characters: Mapping[str, str]
    policies: tuple[Policy, ...]

    @property
    def epochs(self) -> int:
        """Number of epochs if no policy stops the run."""
        return len(next(iter(self.metrics.values())))

    def metrics_of(self, epoch: int) -> dict[str, float]:
        """The values that are not missing."""
        columns = self.metrics.items()
        return {name: value for name, column in columns if (value := column[epoch]) is not None}


def make_case(seed: int) -> Case:
    """Returns the case of this seed."""
    rng = random.Random(seed)
    through_fit = seed % FIT_EVERY == 0
    evaluate_every = rng.choice((1, 1, 1, 2, 3)) if through_fit else 1
    policies = _policies(rng)
    epochs = rng.randint(1, 30)
    metrics: dict[str, Column] = {}
    characters: dict[str, str] = {}
    for policy in policies:
        name = policy.monitor
        if name is None or name in metrics:
            continue
        characters[name] = rng.choice(tuple(CHARACTERS))
        values = CHARACTERS[characters[name]](rng, epochs, policy.min_delta)
        if "accuracy" in name or policy.options.get("mode") == "max":
            values = [-value for value in values]
        values = _sprinkled(rng, values)
        if through_fit or rng.random() < 0.5:
            values = [float(np.float32(value)) for value in values]
        metrics[name] = _with_gaps(rng, name, values, through_fit, evaluate_every)
    metrics = metrics or {"loss": (1.0,) * epochs}
    for policy in policies:
        if policy.monitor is not None:
            metrics[policy.monitor] = _number_first(policy, metrics[policy.monitor])
    learning_rate = rng.choice((0.5, 0.1, 1e-2, 1e-3))
    return Case(
        seed, through_fit, learning_rate, rng.randint(1, 3), evaluate_every, metrics, characters, policies
    )


# --- patterns of a metric; smaller is better ---------------------------------------------------------------


def improving(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    return [3.0 * rng.choice((0.7, 0.9, 0.99)) ** epoch for epoch in range(epochs)]


def noisy(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    return [3.0 * 0.9**epoch + rng.gauss(0, 0.3) for epoch in range(epochs)]


def plateaus(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    level, values = 3.0, []
    for _ in range(epochs):
        level -= rng.choice((0, 0, 0, 0, 1, 3)) * (min_delta or 0.1)
        values.append(level)
    return values


def ties(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    return [rng.choice((1.0, 1.5, 2.0)) for _ in range(epochs)]


def steps_of_min_delta(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    """Decimal numbers at distances of min_delta, which in binary are slightly more or less."""
    level, values = rng.choice((3, 8, 10, 30)), []
    for _ in range(epochs):
        level += rng.choice((-1, -1, -1, 0, 1, 2))
        values.append(round(level * (min_delta or 0.1), 6))
    return values


def last_bits(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    """Better than the best by min_delta, plus or minus one bit of float32, and float64 numbers in between."""
    best = 0.7
    values = [best]
    while len(values) < epochs:
        bit = float(np.spacing(np.float32(best)))
        value = best - min_delta + rng.choice((-2, -1, -0.6, -0.4, 0, 0.4, 0.6, 1)) * bit
        values.append(value if rng.random() < 0.8 else best + 0.1)
        if np.float32(values[-1] + min_delta) < np.float32(best):
            best = values[-1]
    return values


def constant(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    return [0.7] * epochs


def walk(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    level, values, scale = 1.0, [], rng.choice((1e-6, 1.0, 1e4))
    for _ in range(epochs):
        level += rng.uniform(-0.3, 0.3)
        values.append(level * scale)
    return values


def worsening(rng: random.Random, epochs: int, min_delta: float) -> list[float]:
    return [1.0 + 0.1 * epoch + rng.uniform(0, 0.15) for epoch in range(epochs)]


CHARACTERS: dict[str, Callable[[random.Random, int, float], list[float]]] = {
    function.__name__.replace("_", " "): function
    for function in (
        improving, noisy, plateaus, ties, steps_of_min_delta, last_bits, constant, walk, worsening
    )
}  # fmt: skip


def _sprinkled(rng: random.Random, values: list[float]) -> list[float]:
    """Makes some values NaN or infinite in every third case."""
    if rng.random() > 1 / 3:
        return values
    odd = (math.nan, math.nan, math.inf, -math.inf)
    return [rng.choice(odd) if rng.random() < 0.15 else value for value in values]


def _with_gaps(
    rng: random.Random, name: str, values: list[float], through_fit: bool, evaluate_every: int
) -> Column:
    """Removes the values of epochs without an evaluation or, without a real run, of random epochs."""
    if through_fit:
        gaps = name.startswith("val_")
        return tuple(
            None if gaps and (epoch + 1) % evaluate_every else value for epoch, value in enumerate(values)
        )
    share = rng.choice((0.0, 0.0, 0.2))
    return tuple(None if rng.random() < share else value for value in values)


def _number_first(policy: Policy, column: Column) -> Column:
    """Replaces a first NaN by a number, because eventtrain and Keras treat it differently on purpose."""
    for epoch in range(policy.options.get("start_from_epoch", 0), len(column)):
        value = column[epoch]
        if value is not None:
            return (*column[:epoch], 1.0, *column[epoch + 1 :]) if math.isnan(value) else column
    return column


# --- policies ---------------------------------------------------------------------------------------------------


def decay(epoch: int, rate: float) -> float:
    return rate * 0.9


def hold_then_decay(epoch: int, rate: float) -> float:
    return rate if epoch < 5 else rate * math.exp(-0.1)


def warm_up(epoch: int) -> float:
    return 0.3 * min(1.0, (epoch + 1) / 7)


def halves(epoch: int) -> np.float32:
    return np.float32(0.7) * np.float32(0.5) ** (epoch // 4)


SETS: tuple[tuple[PolicyName, ...], ...] = (
    ("EarlyStopping",),
    ("ReduceLROnPlateau",),
    ("LearningRateScheduler",),
    ("EarlyStopping", "ReduceLROnPlateau"),
    ("EarlyStopping", "ReduceLROnPlateau"),
    ("EarlyStopping", "EarlyStopping"),
    ("ReduceLROnPlateau", "ReduceLROnPlateau"),
    ("ReduceLROnPlateau", "LearningRateScheduler"),
    ("EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler"),
)


def _policies(rng: random.Random) -> tuple[Policy, ...]:
    names = list(rng.choice(SETS))
    rng.shuffle(names)
    policies = tuple(Policy(name, OPTIONS[name](rng)) for name in names)
    if names.count("ReduceLROnPlateau") < 2:
        return policies
    # Without a minimum rate: the second policy of Keras compares it with the rate after the first cut. The factor is
    # not that cuts by both end below float32.
    return tuple(
        Policy(policy.name, {**policy.options, "min_lr": 0, "factor": rng.uniform(0.5, 0.99)})
        for policy in policies
    )


def _early_stopping(rng: random.Random) -> dict[str, Any]:
    return _some(
        rng,
        monitor=rng.choice(METRICS),
        min_delta=rng.choice((0, 0.1, -0.1, 0.01, 1e-4, 1.0)),
        patience=rng.randint(0, 6),
        mode=rng.choice(("auto", "auto", "min", "max")),
        baseline=rng.choice((None, None, 0.0, 1.0, round(rng.uniform(-3, 3), 1))),
        restore_best_weights=rng.random() < 0.7,
        start_from_epoch=rng.choice((0, 0, 0, 1, 3, 6)),
    )


def _reduce_lr_on_plateau(rng: random.Random) -> dict[str, Any]:
    return _some(
        rng,
        monitor=rng.choice(METRICS),
        factor=rng.choice((0.1, 0.5, 0.9, 1 / 3, rng.uniform(0.1, 0.99))),
        patience=rng.randint(0, 5),
        mode=rng.choice(("auto", "auto", "min", "max")),
        min_delta=rng.choice((0, 0.1, -0.1, 0.01, 1e-4, 1.0)),
        cooldown=rng.choice((0, 0, 1, 2, 5)),
        min_lr=rng.choice((0, 1e-5, 1e-3, 0.05, 0.1)),
    )


def _learning_rate_scheduler(rng: random.Random) -> dict[str, Any]:
    return {"schedule": rng.choice((decay, hold_then_decay, warm_up, halves))}


def _some(rng: random.Random, **options: Any) -> dict[str, Any]:
    """Returns most of the arguments; the others keep their defaults, which must equal those of Keras."""
    return {name: value for name, value in options.items() if rng.random() < 0.85}


OPTIONS: dict[PolicyName, Callable[[random.Random], dict[str, Any]]] = {
    "EarlyStopping": _early_stopping,
    "ReduceLROnPlateau": _reduce_lr_on_plateau,
    "LearningRateScheduler": _learning_rate_scheduler,
}
