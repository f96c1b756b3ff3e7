"""``Retention``: which committed checkpoints are deleted. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class OwnCheckpoint:
    """A committed checkpoint of the run.

    Attributes:
        step: of its state.
        value: of the monitored metric at that step; None if it was not measured there.
        named: it was requested with a tag.
        path: its folder.
    """

    step: int
    value: float | None = None
    named: bool = False
    path: Path = Path()


@dataclass(frozen=True)
class Retention:
    """Rules; a checkpoint that meets any of them is retained, and so is one that is named.

    Attributes:
        newest: as many of those committed last; None retains all.
        best: as many with the best values of ``monitor``.
        every: those of steps that are a multiple of it.
        mode: which direction is better.
        monitor: a metric.
    """

    newest: int | None = None
    best: int | None = None
    every: int | None = None
    mode: Literal["min", "max"] = "min"
    monitor: str | None = None

    def surplus(self, committed: Sequence[OwnCheckpoint]) -> list[OwnCheckpoint]:
        """Returns those of ``committed``, given in the order of their commits, that no rule retains."""
        if self.newest is None:
            return []
        sign = 1.0 if self.mode == "min" else -1.0
        values = {index: one.value for index, one in enumerate(committed) if one.value is not None}
        ranked = sorted(
            (index for index, value in values.items() if not math.isnan(value)),
            key=lambda index: sign * values[index],
        )
        retained = {*range(len(committed) - self.newest, len(committed)), *ranked[: self.best or 0]}
        return [
            one
            for index, one in enumerate(committed)
            if index not in retained and not one.named and not (self.every and one.step % self.every == 0)
        ]
