"""What is compared of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """One run, by Keras' objects or by ours.

    Attributes:
        epochs: how many were begun and completed.
        stopped: whether a policy stopped the run.
        rates: bits of the float32 learning rate that the steps of each epoch used.
        rates_after: the same, after the decisions at the end of each epoch.
        policies: for each policy its memory at the end: best value, best epoch, how long it has waited.
        weight: after the run, restored or not.
        last_weight: what it would be if nothing was restored.
    """

    epochs: int
    stopped: bool
    rates: tuple[int, ...]
    rates_after: tuple[int, ...]
    policies: tuple[Mapping[str, Any], ...]
    weight: float
    last_weight: float

    @property
    def cuts(self) -> int:
        """At how many epochs' ends the learning rate was changed."""
        return sum(before != after for before, after in zip(self.rates, self.rates_after, strict=True))

    @property
    def restored(self) -> bool:
        """Whether weights other than the last ones were put back."""
        return self.weight != self.last_weight

    @property
    def fired(self) -> bool:
        """Whether any policy that watches a metric did anything."""
        return self.stopped or self.cuts > 0 or self.restored

    def differences(self, other: Record) -> dict[str, tuple[Any, Any]]:
        """Name -> the value here and there, of what is not equal."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def bits(rate: Any) -> int:
    """The bits of a learning rate in float32, as the device holds it."""
    return int(np.asarray(rate, np.float32).view(np.uint32))
