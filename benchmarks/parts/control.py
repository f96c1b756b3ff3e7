"""Latency of control: from the event that a decision is based on, and from the command, to its effect.

A handler without a lag sets the learning rate at every 50th event or so that reaches it, and waits for the answer. The
effect is the boundary that CommandApplied names; the time runs from the command to that event.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from time import perf_counter

import anyio

import eventtrain as et
from benchmarks.figures import Budget, Figure, figure
from benchmarks.machine import Device
from benchmarks.workloads import Workload, calibrated, fits

TARGETS_S = (50e-6, 1e-3, 10e-3)


class Latencies:
    """Latencies of commands during one session."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.handler_ms: list[float] = []
        self.thread_ms: list[float] = []

    async def decide(self, event: et.StepCompleted, control: et.Control) -> None:
        """Sends a command, and waits for its effect."""
        began_s = perf_counter()
        applied = await control.set_hyperparam("learning_rate", 1e-3 + 1e-9 * event.step).result()
        self.handler_ms.append(1e3 * (perf_counter() - began_s))
        self.steps.append(applied.step - event.step)
        await anyio.sleep(0.005)

    async def ask(self, control: et.Control, ended: threading.Event) -> None:
        """Sends commands from another thread, as a service does, until the run has ended."""
        while not ended.is_set():
            began_s = perf_counter()
            try:
                await control.scale_hyperparam("learning_rate", 1.0).result()
            except et.CommandRejectedError:
                return
            self.thread_ms.append(1e3 * (perf_counter() - began_s))
            await anyio.sleep(0.005)


def measured(workload: Workload, seconds: float) -> Latencies:
    """Trains for ``seconds``, with a handler and a thread that send commands."""
    found, ended = Latencies(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(workload.step_fn, workload.state, run_dir=folder)
        trainer.on(et.StepCompleted, queue=et.KeepLatest())(found.decide)
        with trainer.session() as session:
            session.prepare(workload.batches[0])
            asking = threading.Thread(target=anyio.run, args=(found.ask, session.control, ended))
            asking.start()
            ends_s = perf_counter() + seconds
            while perf_counter() < ends_s:
                session.step(workload.batches[0])
            ended.set()
            session.idle(0.05)
        asking.join()
    return found


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the latencies at several durations of a step."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    targets = TARGETS_S[1:2] if quick else TARGETS_S
    for index, target_s in enumerate(targets):
        share_s = budget.share(len(targets) - index)
        workload = calibrated(target_s)
        if not fits(workload, target_s):
            continue
        at, latencies = workload.name, measured(workload, min(20.0, max(1.0, share_s / 2)))
        found += [
            figure("event to effect, from a handler", latencies.steps, at=at, unit="steps"),
            figure("command to effect, from a handler", latencies.handler_ms, at=at, unit="ms"),
            figure("command to effect, from another thread", latencies.thread_ms, at=at, unit="ms"),
        ]
    return found
