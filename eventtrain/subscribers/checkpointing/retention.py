"""``Retention``: which committed checkpoints are deleted. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class OwnCheckpoint:
    """A committed checkpoint of the run."""

    step: int
    value: float | None = None
    """Of the monitored metric at that step; None if it was not measured there."""
    named: bool = False
    """It was requested with a tag."""
    path: Path = Path()


@dataclass(frozen=True)
class Retention:
    """Rules; a checkpoint that meets any of them is retained, and so is one that is named."""

    newest: int | None = None
    """As many of those committed last; None retains all."""
    best: int | None = None
    """As many with the best values of ``monitor``; ``mode`` is the direction that is better."""
    every: int | None = None
    """Those of steps that are a multiple of it."""
    mode: Literal["min", "max"] = "min"
    monitor: str | None = None

    def surplus(self, committed: Sequence[OwnCheckpoint]) -> list[OwnCheckpoint]:
        """Returns those of ``committed``, given in the order of their commits, that no rule retains."""
        if self.newest is None:
            return []
        sign = 1.0 if self.mode == "min" else -1.0
        ranked = sorted(
            (sign * one.value, index)
            for index, one in enumerate(committed)
            if one.value is not None and not math.isnan(one.value)
        )
        retained = {
            *range(len(committed) - self.newest, len(committed)),
            *(index for _, index in ranked[: self.best or 0]),
        }
        return [
            one
            for index, one in enumerate(committed)
            if index not in retained and not one.named and not (self.every and one.step % self.every == 0)
        ]
