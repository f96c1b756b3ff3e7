"""Slowest steps: quantiles of the duration of a step, in the bare loop and in fit with eight subscribers.

Both loops wait for each step before they dispatch the next one, so that a step shows all that delays it: the host's
part of the step, the burst in which a window is handled under the GIL, and the machine. A run is one epoch. The aim: at
a step of 1 ms, the 99.9th percentile is at most 3 ms above the median.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, figure, in_pairs
from benchmarks.machine import Device
from benchmarks.parts.loop import Observers, eight
from benchmarks.workloads import Workload, calibrated, fits
from eventtrain.loop.train_loop import TrainingLoop

TARGETS_S = (0.2e-3, 1e-3)
WARM_UP = 100
"""Steps at the beginning of a run that do not count."""
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
Run = Callable[[int], np.ndarray]
"""Runs a number of steps; returns the microseconds of each."""


def bare(workload: Workload, steps: int) -> np.ndarray:
    """Runs the bare jitted loop, which waits for each step."""
    jitted, batches = jax.jit(workload.step_fn, donate_argnums=0), workload.batches
    state, stamps = jax.tree.map(jnp.copy, workload.state), list[float]()
    for index in range(WARM_UP + steps + 1):
        state, metrics = jitted(state, batches[index % len(batches)])
        jax.block_until_ready(metrics)
        stamps.append(perf_counter())
    return durations_us(stamps)


@contextmanager
def observed(workload: Workload, observers: Observers) -> Generator[Run]:
    """Yields the calls of ``fit`` with ``observers``; checks these after use."""
    steps_run = 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(
            workload.step_fn,
            workload.state,
            subscribers=observers.subscribers,
            run_dir=folder,
            max_in_flight_steps=1,
        )
        for event, handler, how in observers.handlers:
            trainer.on(event, **how)(handler)

        def fit(steps: int) -> np.ndarray:
            nonlocal steps_run
            steps += WARM_UP + 1
            steps_run += steps
            epoch = workload.batches * (steps // len(workload.batches) + 1)
            with stamped() as stamps:
                trainer.fit(epoch, steps=steps, progress=False)
            return durations_us(stamps)

        yield fit
        observers.check(Path(folder), steps_run)
        trainer.close()


@contextmanager
def stamped() -> Generator[list[float]]:
    """Yields a list to which every training loop adds the time at which it has dispatched a step."""
    stamps, step = list[float](), TrainingLoop.step

    def stamping(self: TrainingLoop, *call: object) -> int:
        count = step(self, *call)  # pyright: ignore[reportArgumentType]  # as they come
        if count:
            stamps.append(perf_counter())
        return count

    TrainingLoop.step = stamping
    try:
        yield stamps
    finally:
        TrainingLoop.step = step


def durations_us(stamps: list[float]) -> np.ndarray:
    """Returns the microseconds between the times, without those of the warm-up."""
    return 1e6 * np.diff(stamps)[WARM_UP:]


def compared(workload: Workload, budget_s: float) -> list[Figure]:
    """Returns the quantiles of both loops, each over a run, as medians over the runs."""
    steps = max(1000, int(budget_s / 12 / workload.step_s))
    with observed(workload, eight()) as fit:
        runs = in_pairs(partial(fit, steps), partial(bare, workload, steps), 0.8 * budget_s)
    found: list[Figure] = []
    for name, part in QUANTILES.items():
        ours, theirs = ([float(np.quantile(run, part)) for run in half] for half in runs)
        found += [
            figure(f"bare loop, {name}", theirs, at=workload.name),
            figure(f"fit, 8 subscribers, {name}", ours, theirs, at=workload.name),
        ]
    ours, theirs = ([float(np.quantile(run, 0.999) - np.median(run)) for run in half] for half in runs)
    return [
        *found,
        figure("bare loop, p99.9 above p50", theirs, at=workload.name),
        figure("fit, 8 subscribers, p99.9 above p50", ours, theirs, at=workload.name),
    ]


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the quantiles at two durations of a step."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    targets = TARGETS_S[1:] if quick else TARGETS_S
    for index, target_s in enumerate(targets):
        workload = calibrated(target_s)
        share_s = budget.share(len(targets) - index)
        if fits(workload, target_s):
            found += compared(workload, share_s)
    return found
