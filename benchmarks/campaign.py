"""``Campaign``: ``benchmarks/campaigns/NAME.py`` defines one as ``CAMPAIGN``, and ``benchmarks/faults.py`` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Campaign:
    """Many random trials of one claim.

    Attributes:
        name: name of its module and of its results file.
        trial: takes a seed, which determines everything random in the trial. Raises if the claim does not hold; else
            returns counts (name -> number, summed over the trials).
        trials: number of trials in the complete campaign.
        slice: number of trials in CI.
        batch: number of trials in one line of the results; an interruption loses at most one batch.
        least: name of a count -> the share of trials that it must reach, from ten trials on. A campaign below that
            share tests nothing.
        packages: further packages whose versions the results name.
    """

    name: str
    trial: Callable[[int], Mapping[str, int]]
    trials: int
    slice: int
    batch: int = 100
    least: Mapping[str, float] = field(default_factory=dict[str, float])
    packages: tuple[str, ...] = ()
