"""Record of a run, for the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """One run, in Keras or in eventtrain.

    Attributes:
        epochs: number of epochs begun and completed.
        stopped: whether a policy stopped the run.
        rates: bits of the float32 learning rate that the steps of each epoch used.
        rates_after: the same, after the decisions at the end of each epoch.
        policies: state of each policy at the end: best value, best epoch, waiting time so far.
        weight: the weight after the run, restored or not.
        last_weight: the weight without a restore.
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
        """Number of epochs at whose end the learning rate was changed."""
        return sum(before != after for before, after in zip(self.rates, self.rates_after, strict=True))

    @property
    def restored(self) -> bool:
        """Whether weights other than the last ones were restored."""
        return self.weight != self.last_weight

    @property
    def fired(self) -> bool:
        """Whether any policy that monitors a metric acted."""
        return self.stopped or self.cuts > 0 or self.restored

    def differences(self, other: Record) -> dict[str, tuple[Any, Any]]:
        """Returns name -> both values, for each field that differs."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def bits(rate: Any) -> int:
    """Returns the bits of a learning rate in float32, as on the device."""
    return int(np.asarray(rate, np.float32).view(np.uint32))
