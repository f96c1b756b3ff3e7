"""Which checkpoints to keep. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar


@dataclass(frozen=True)
class Kept:
    """What counts of one checkpoint.

    Attributes:
        step: of its state.
        value: of the monitor at that step; None where it was not measured there.
        named: it was asked for by a tag.
    """

    step: int
    value: float | None = None
    named: bool = False


K = TypeVar("K", bound=Kept)


@dataclass(frozen=True)
class Retention:
    """The rules; what any of them keeps is kept.

    Attributes:
        newest: as many of those committed last; None keeps all.
        best: as many with the best values.
        every: those of steps that this divides.
        mode: which direction is better.
    """

    newest: int | None = None
    best: int | None = None
    every: int | None = None
    mode: Literal["min", "max"] = "min"

    def surplus(self, committed: Sequence[K]) -> list[K]:
        """Those of ``committed``, in the order of their commits, that no rule keeps. Named ones are always kept."""
        if self.newest is None:
            return []
        sign = 1.0 if self.mode == "min" else -1.0
        ranked = sorted(
            (index for index, one in enumerate(committed) if _is_number(one.value)),
            key=lambda index: sign * (committed[index].value or 0.0),
        )
        keep = {*range(len(committed) - self.newest, len(committed)), *ranked[: self.best or 0]}
        return [
            one
            for index, one in enumerate(committed)
            if index not in keep and not one.named and not (self.every and one.step % self.every == 0)
        ]


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
