"""Metrics with state, in the shape that clu.metrics and metrax have: F1, ROC AUC in bins, a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 3
BINS = 11


@jax.tree_util.register_dataclass
@dataclass
class Summed:
    """States that add up."""

    def merge(self, other: Any) -> Any:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclass
class F1(Summed):
    hits: Any
    errors: Any

    @classmethod
    def of(cls, predicted: Any, labels: Any) -> F1:
        return cls(jnp.sum(predicted & labels), jnp.sum(predicted ^ labels))

    def compute(self) -> Any:
        return 2 * self.hits / (2 * self.hits + self.errors)


@jax.tree_util.register_dataclass
@dataclass
class Confusion(Summed):
    counts: Any

    @classmethod
    def of(cls, predicted: Any, labels: Any) -> Confusion:
        return cls(jnp.zeros((CLASSES, CLASSES), jnp.int32).at[labels, predicted].add(1))

    def compute(self) -> Any:
        return self.counts


@jax.tree_util.register_dataclass
@dataclass
class AUC(Summed):
    """Exact for scores that are multiples of 1 / (BINS - 1)."""

    positives: Any
    negatives: Any

    @classmethod
    def of(cls, scores: Any, labels: Any) -> AUC:
        bins = jnp.round(scores * (BINS - 1)).astype(jnp.int32)
        zeros = jnp.zeros(BINS, jnp.int32)
        return cls(zeros.at[bins].add(labels), zeros.at[bins].add(1 - labels))

    def compute(self) -> Any:
        below = jnp.cumsum(self.negatives) - self.negatives
        pairs = jnp.sum(self.positives * (below + self.negatives / 2))
        return pairs / (self.positives.sum() * self.negatives.sum())


def scored(count: int = 20) -> dict[str, np.ndarray]:
    """Examples with a binary label and a score, and with a class and a prediction of it."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, count)
    return {
        "score": (np.clip(label + rng.integers(-7, 7, count) / 10, 0, 1)).astype(np.float32),
        "label": label.astype(np.int32),
        "predicted": rng.integers(0, CLASSES, count).astype(np.int32),
        "class": rng.integers(0, CLASSES, count).astype(np.int32),
    }


def uneven(
    examples: dict[str, np.ndarray], sizes: tuple[int, ...] = (7, 5, 7, 1)
) -> list[dict[str, np.ndarray]]:
    """The examples in batches of these sizes."""
    ends = np.cumsum(sizes)
    return [
        {k: v[end - size : end] for k, v in examples.items()} for size, end in zip(sizes, ends, strict=True)
    ]


def measured(state: Any, batch: Any) -> dict[str, Any]:
    """An ``eval_fn``."""
    label = batch["label"]
    return {
        "score": jnp.mean(batch["score"]),
        "examples": label.shape[0],
        "f1": F1.of(batch["score"] > 0.5, label == 1),
        "auc": AUC.of(batch["score"], label),
        "confusion": Confusion.of(batch["predicted"], batch["class"]),
    }
