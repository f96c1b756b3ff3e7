"""What a campaign is: ``benchmarks/campaigns/NAME.py`` holds one as ``CAMPAIGN``; ``benchmarks/faults.py`` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Campaign:
    """Many random trials of one claim.

    Attributes:
        name: of its module, and of its file of results.
        trial: takes a seed, from which everything random about the trial follows. Raises where the claim does not hold;
            else returns what is to be counted (name -> number, summed over the trials).
        trials: how many make the whole campaign.
        slice: how many CI runs.
        batch: how many share one line of the results; an interruption loses at most so many.
        least: name of a count -> the share that it has to reach of ten or more trials, lest they test nothing.
        packages: whose versions the results name, besides those that every result names.
    """

    name: str
    trial: Callable[[int], Mapping[str, int]]
    trials: int
    slice: int
    batch: int = 100
    least: Mapping[str, float] = field(default_factory=dict[str, float])
    packages: tuple[str, ...] = ()
