"""``Figure``, the record of one measurement, and the pairs of runs that a ratio is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import monotonic, perf_counter
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Loop = Callable[[int], float]
"""Runs a number of steps, and returns the seconds that they took."""


@dataclass(frozen=True)
class Figure:
    """One measured number, or the reason why it is missing."""

    case: str
    at: str = ""
    """Size at which the case was measured: a column of the table."""
    unit: str = ""
    value: float | None = None
    """Median over the runs."""
    quartiles: tuple[float, float] | None = None
    baseline: str = ""
    """Name of the other half of each pair; empty if there is none."""
    ratio: float | None = None
    """Median of value / baseline over the pairs."""
    ratio_quartiles: tuple[float, float] | None = None
    pairs: int = 0
    """Number of pairs, or of runs if there is no baseline."""
    missing: str = ""
    part: str = ""
    """Filled in by the suite."""


class Budget:
    """Divides ``seconds`` among the cases of a part: what one of them does not use, the later ones get."""

    def __init__(self, seconds: float) -> None:
        self._ends_s = monotonic() + seconds

    def share(self, cases_left: int) -> float:
        """Returns the seconds for the next of ``cases_left`` cases."""
        return max(0.0, self._ends_s - monotonic()) / max(1, cases_left)


def in_pairs(
    ours: Callable[[], T], baseline: Callable[[], T], budget_s: float, *, least: int = 3, most: int = 15
) -> tuple[list[T], list[T]]:
    """Calls both in turn, changing which goes first, until ``budget_s`` is used; returns what they returned.

    The first pair warms up and does not count. At least ``least`` pairs count, whatever they take.
    """
    found: tuple[list[T], list[T]] = ([], [])
    ends_s, pair_s = monotonic() + budget_s, 0.0
    for pair in range(most + 1):
        began_s = monotonic()
        if pair > least and began_s + pair_s > ends_s:
            break
        for half in (0, 1) if pair % 2 else (1, 0):
            result = (ours, baseline)[half]()
            if pair:
                found[half].append(result)
        pair_s = monotonic() - began_s
    return found


def figure(
    case: str,
    values: Sequence[float],
    against: Sequence[float] | None = None,
    *,
    at: str = "",
    unit: str = "us",
    baseline: str = "bare loop",
) -> Figure:
    """Returns the figure of paired ``values`` and ``against``; without ``against``, one without a ratio."""
    value, quartiles = spread(values)
    if against is None:
        return Figure(case, at, unit, value, quartiles, pairs=len(values))
    ratio, ratio_quartiles = spread([ours / theirs for ours, theirs in zip(values, against, strict=True)])
    return Figure(case, at, unit, value, quartiles, baseline, ratio, ratio_quartiles, len(values))


def compared(
    case: str,
    ours: Callable[[], float],
    other: Callable[[], float],
    budget_s: float,
    *,
    at: str = "",
    unit: str = "us",
    baseline: str = "bare loop",
    least: int = 3,
) -> Figure:
    """Runs both in pairs for ``budget_s``; both return their number in ``unit``."""
    return figure(case, *in_pairs(ours, other, budget_s, least=least), at=at, unit=unit, baseline=baseline)


def compared_loops(
    case: str,
    ours: Loop,
    bare: Loop,
    step_s: float,
    budget_s: float,
    *,
    at: str = "",
    baseline: str = "bare loop",
) -> Figure:
    """Returns the microseconds per step of ``ours``, paired with ``bare``.

    A run takes a sixteenth of ``budget_s``, within 0.2 and 3 s, so that five pairs fit in with compiling.
    """
    steps = max(16, int(min(3.0, max(0.2, budget_s / 16)) / step_s))

    def per_step(loop: Loop) -> Callable[[], float]:
        return lambda: 1e6 * loop(steps) / steps

    return compared(case, per_step(ours), per_step(bare), budget_s, at=at, baseline=baseline)


def without_fixed_cost(call: Callable[[int], object], few: int) -> Loop:
    """Returns the loop that times ``call(few + steps)`` without the median time of ``call(few)``."""
    fixed_s: list[float] = []

    def timed(steps: int) -> float:
        began_s = perf_counter()
        call(steps)
        return perf_counter() - began_s

    def run(steps: int) -> float:
        fixed_s.extend(timed(few) for _ in range(1 if fixed_s else 4))
        return timed(few + steps) - median(fixed_s[1:])

    return run


def spread(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Returns the median and the two quartiles, to five digits."""
    low, middle, high = (float(f"{part:.5g}") for part in np.quantile(values, [0.25, 0.5, 0.75]))
    return middle, (low, high)


def absent(case: str, reason: object, **rest: Any) -> Figure:
    """Returns a figure that was not measured."""
    return Figure(case, missing=str(reason), **rest)
