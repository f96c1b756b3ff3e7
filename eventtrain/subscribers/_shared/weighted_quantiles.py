"""Quantiles of values that count more than once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def weighted_quantiles(values: Iterable[tuple[float, int]], shares: Sequence[float]) -> list[float]:
    """For each share the smallest value that, with all smaller ones, has at least so much of the weight.

    Args:
        values: pairs of a value and its weight; at least one of a weight above 0.
        shares: each from 0 to 1, in ascending order.
    """
    ordered = sorted(values)
    total = sum(weight for _, weight in ordered)
    found: list[float] = []
    reached = 0
    for value, weight in ordered:
        reached += weight
        while len(found) < len(shares) and reached >= shares[len(found)] * total:
            found.append(value)
    return found
