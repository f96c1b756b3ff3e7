"""Runs loops in turn, so that other load on the machine affects all of them, and computes the ratios of their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

import eventtrain as et

Loop = Callable[[int], float]
"""Takes a number of steps, runs them, and returns the seconds."""


def session_loop(trainer: et.Trainer, batches: Sequence[Any]) -> Loop:
    """Returns a loop that runs in a session of ``trainer``: compiled before the clock starts, one block at the end."""

    def run(steps: int) -> float:
        with trainer.session() as session:
            session.prepare(batches[0])
            session.step(batches[0])
            session.block_until_ready()
            began_s = perf_counter()
            for index in range(steps):
                session.step(batches[index % len(batches)])
            session.block_until_ready()
            return perf_counter() - began_s

    return run


def in_turn(loops: Mapping[str, Loop], pairs: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds per step of each loop in each of ``pairs`` rounds, in alternating order."""
    took: dict[str, list[float]] = {name: [] for name in loops}
    for pair in range(pairs):
        for name in list(loops) if pair % 2 else reversed(list(loops)):
            took[name].append(loops[name](steps) / steps)
    return took


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, list[float], list[float]]:
    """Returns the median, the two quartiles and all ratios of paired measurements, rounded."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = (round(float(part), 4) for part in np.quantile(each, [0.25, 0.5, 0.75]))
    return middle, [low, high], [round(ratio, 4) for ratio in each]
