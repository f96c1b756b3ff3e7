"""Growth of time and memory with subscribers, metrics, leaves of the state and events.

The first three are times per step over the bare jitted loop of the same step. Events are published to one handler, and
to one that hangs in its first event, for each kind of queue: the memory must not grow with their number. Nor with the
steps of a run that a page shows: a tiny step, a hundred in one dispatch, with a dashboard and one reader.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, compared_loops
from benchmarks.machine import Device
from benchmarks.parts.dashboard import readers
from benchmarks.parts.loop import counters, none, observed
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

TARGET_S = 1e-3
SUBSCRIBERS = (1, 8, 64, 256)
METRICS = (1, 10, 100, 1000)
LEAVES = (10, 100, 1000, 3000)
EVENTS = (10**4, 10**5, 10**6, 10**7)
PUBLISHED_TOGETHER = 100
HELD = 10_000
QUEUES: dict[str, et.Queue] = {
    "Lossless": et.Lossless(limit=HELD),
    "KeepLatest": et.KeepLatest(),
    "DropOldest": et.DropOldest(HELD),
    "DropNewest": et.DropNewest(HELD),
}


class Ping(et.Event):
    number: int = 0


def resident_mib() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # other systems report only the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def with_metrics(workload: Workload, number: int) -> Workload:
    """Returns the same step with ``number`` metrics."""

    def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, metrics = workload.step_fn(state, batch)
        return state, {f"m{index}": metrics["loss"] + index for index in range(number)}

    return replace(workload, step_fn=step_fn)


def with_leaves(workload: Workload, number: int) -> Workload:
    """Returns a step over a state of ``number`` scalars, all of which change."""

    def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        return [leaf + 1 for leaf in state], {"loss": state[0]}

    state = [jnp.float32(0) for _ in range(number)]
    new = replace(workload, step_fn=step_fn, state=state)
    return replace(new, step_s=new.bare_loop(20) / 20)


async def handled(events: int) -> tuple[float, float]:
    """Returns the microseconds per event that one handler receives, and the growth of the memory."""
    received = 0

    async def count(event: Ping) -> None:
        nonlocal received
        received += 1

    async with et.EventBus() as bus:
        bus.subscribe(Ping, count)
        for _ in range(PUBLISHED_TOGETHER):
            bus.publish(Ping())
        await bus.drain()
        before_mib, began_s = resident_mib(), time.perf_counter()
        for number in range(1, events + 1):
            bus.publish(Ping(number=number))
            if number % PUBLISHED_TOGETHER == 0:
                await anyio.lowlevel.checkpoint()
        await bus.drain()
        took_us = 1e6 * (time.perf_counter() - began_s) / events
    if received != PUBLISHED_TOGETHER + events:
        raise AssertionError(f"Of {events} events {received - PUBLISHED_TOGETHER} arrived.")
    return took_us, resident_mib() - before_mib


async def stalled(queue: et.Queue, first: int, second: int) -> float:
    """Returns the MiB by which memory grows from ``first`` to ``second`` events behind a handler that hangs."""
    refused, first_mib, growth_mib = 0, 0.0, 0.0
    bus = et.EventBus()
    async with anyio.create_task_group() as tasks:
        stop = anyio.Event()

        async def serve() -> None:
            async with bus.serve():
                await stop.wait()

        tasks.start_soon(serve)
        while not bus.running:
            await anyio.lowlevel.checkpoint()

        async def hang(event: Ping) -> None:
            await anyio.sleep_forever()

        subscription = bus.subscribe(Ping, hang, queue=queue)
        for number in range(1, second + 1):
            try:
                bus.publish(Ping(number=number))
            except et.QueueFull:
                refused += 1
            if number % PUBLISHED_TOGETHER == 0:
                await anyio.lowlevel.checkpoint()
            if number == first:
                first_mib = resident_mib()
        growth_mib = resident_mib() - first_mib
        statistics = subscription.statistics()
        accounted = refused + statistics.dropped + statistics.pending + statistics.delivered
        if accounted != second:
            raise AssertionError(f"{second - accounted} events are unaccounted for.")
        stop.set()
    return growth_mib


def shown(first: int, second: int) -> float:
    """Returns the MiB by which memory grows from step ``first`` to ``second`` of a run that a page shows."""

    def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        return state + 1, {"loss": jnp.sin(state), "batch": batch}

    dashboard, data = subs.Dashboard(), [np.float32(0)] * 10_000
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        trainer = et.Trainer(
            step_fn, jnp.float32(0), subscribers=[dashboard], run_dir=folder, steps_per_call=100
        )
        trainer.fit(data, steps=100, progress=False)  # starts the server
        with readers(dashboard, 1, "read"):
            trainer.fit(data, epochs=first // len(data), progress=False)
            first_mib = resident_mib()
            trainer.fit(data, epochs=(second - first) // len(data), progress=False)
            growth_mib = resident_mib() - first_mib
        trainer.close()
        dashboard.close()
    return growth_mib


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns time and memory for each number of subscribers, metrics, leaves and events."""
    logging.disable(logging.CRITICAL)
    budget, found, workload = Budget(budget_s), list[Figure](), calibrated(TARGET_S)

    def some(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (numbers[0], numbers[2]) if quick else numbers

    events_us = dict[int, float]()
    for number in some(EVENTS):  # first: their time does not depend on the budget
        events_us[number], growth_mib = anyio.run(handled, number)
        found.append(Figure("events to one handler", f"{number:,}", "us", round(events_us[number], 3)))
        found.append(Figure("events to one handler: memory", f"{number:,}", "MiB", round(growth_mib, 2)))
    second = 10**5 if quick else 10**6
    for name, queue in QUEUES.items():
        growth_mib = anyio.run(stalled, queue, second // 5, second)
        found.append(
            Figure(
                f"events behind a stalled handler, {name}: memory", f"{second:,}", "MiB", round(growth_mib, 2)
            )
        )
    steps = 10**5 if quick else 10**6
    growth_mib = round(shown(steps // 5, steps), 2)
    found.append(Figure("steps with a dashboard: memory", f"{steps:,}", "MiB", growth_mib))
    cases = [
        *(("subscribers", number, workload, counters(number)) for number in some(SUBSCRIBERS)),
        *(("metrics", number, with_metrics(workload, number), counters(1)) for number in some(METRICS)),
        *(("leaves", number, with_leaves(workload, number), none()) for number in some(LEAVES)),
    ]
    for index, (name, number, its_workload, observers) in enumerate(cases):
        share_s, before_mib = budget.share(len(cases) - index), resident_mib()
        at = f"{number:,}"
        with observed(its_workload, observers) as loop:
            found.append(
                compared_loops(name, loop, its_workload.bare_loop, its_workload.step_s, share_s, at=at)
            )
            found.append(Figure(f"{name}: memory", at, "MiB", round(resident_mib() - before_mib, 1)))
    return found
