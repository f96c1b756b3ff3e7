"""Cost of observing a training loop, against the bare jitted loop.

Each figure is a ratio of two loops, which run one after the other in this process, in alternating order: the median of
all pairs. The bare loop has the same donation, the same batches on the device, no synchronisation per step and one
block at the end.

    python -m benchmarks.loop_overhead [--pairs 7] [--seconds 3] [--json PATH]
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import anyio
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

SIZES = (("70 us", 70e-6), ("0.7 ms", 0.7e-3), ("10 ms", 10e-3))
EPOCHS = 4
"""Epochs in each observed run; the plateau policy decides once per epoch, with lag=0."""


class Observed:
    """One trainer with its subscribers, and the number of events that they received."""

    def __init__(self, workload: Workload, *, subscribed: bool, steps_per_call: int = 1) -> None:
        self.workload = workload
        self.run_dir = tempfile.TemporaryDirectory()
        self.counted = 0
        self.columns = 0
        self.logged = 0
        self.raised = 0
        subscribers: list[et.Subscriber] = []
        if subscribed:
            subscribers = [
                subs.JSONLLogger("events.jsonl"),
                subs.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, mode="min"),
            ]
        self.trainer = et.Trainer(
            workload.step_fn,
            workload.state,
            subscribers=subscribers,
            run_dir=self.run_dir.name,
            steps_per_call=steps_per_call,
            drain_timeout_s=30.0,
        )
        self.steps_per_call = steps_per_call
        if subscribed:
            self._subscribe()

    def _subscribe(self) -> None:
        on = self.trainer.on

        @on(et.StepCompleted)
        async def count(event: et.StepCompleted) -> None:
            self.counted += 1

        @on(et.StepCompleted, every=100)
        async def log(event: et.StepCompleted) -> None:
            self.logged += 1

        @on(et.StepCompleted, queue=et.KeepLatest())
        async def progress(event: et.StepCompleted) -> None:
            await anyio.sleep(0.1)

        @on(et.StepCompleted, queue=et.KeepLatest(), name="sleeper")
        async def sleep(event: et.StepCompleted) -> None:
            await anyio.sleep(10)

        @on(et.StepCompleted, disable_after=None, name="raiser")
        async def fail(event: et.StepCompleted) -> None:
            self.raised += 1
            raise ValueError("always")

        @on(et.StepsCompleted)
        async def tabulate(event: et.StepsCompleted) -> None:
            self.columns += len(event.metrics["loss"])

    def run(self, steps: int) -> tuple[float, float, np.ndarray]:
        """Returns the seconds of the loop, until every event was handled, and of each step call."""
        batches, size = self.workload.batches, len(self.workload.batches)
        per_epoch = -(-steps // EPOCHS)
        stamps = np.full(steps + 1, np.nan)
        before = (self.counted, self.columns)
        with self.trainer.session() as session:
            if self.steps_per_call == 1:
                session.prepare(batches[0])
                began_s = stamps[0] = perf_counter()
                for index in range(steps):
                    if index % per_epoch == 0:
                        if index:
                            session.end_epoch()
                        session.begin_epoch()
                    session.step(batches[index % size])
                    stamps[index + 1] = perf_counter()
            else:
                group = tuple(batches[index % size] for index in range(self.steps_per_call))
                session.prepare(group)
                began_s = perf_counter()
                session.begin_epoch()
                for _ in range(0, steps, self.steps_per_call):
                    session._run.advance(group, self.steps_per_call)
            session.block_until_ready()
            loop_s = perf_counter() - began_s
            session.end_epoch()
            sleeper = next((s for s in self.trainer.bus.subscriptions if s.name == "sleeper"), None)
            done = perf_counter()
            while self.counted - before[0] < steps and sleeper is not None and perf_counter() - done < 30:
                session.flush()
                session.idle(0.01)
            drained_s = perf_counter() - began_s
            if sleeper is not None:
                assert self.counted - before[0] == steps, (
                    f"the counter received {self.counted - before[0]} of {steps} steps"
                )
                sleeper.cancel()
        if sleeper is not None:
            assert self.columns - before[1] == steps
            assert self.raised == self.counted, "the raising subscriber missed steps"
        return loop_s, drained_s, np.diff(stamps)


def paired(workload: Workload, make: Callable[[], Observed], pairs: int, seconds: float) -> dict[str, Any]:
    """Runs bare and observed loops in turn; returns the ratios, and the percentiles of the observed step call."""
    steps = max(160, int(seconds / workload.step_s / 16) * 16)
    ratios: list[float] = []
    drained: list[float] = []
    calls: list[np.ndarray] = []
    for pair in range(pairs):
        observed = make()
        if pair % 2:
            loop_s, drained_s, call_s = observed.run(steps)
            bare_s = workload.bare_loop(steps)
        else:
            bare_s = workload.bare_loop(steps)
            loop_s, drained_s, call_s = observed.run(steps)
        ratios.append(loop_s / bare_s)
        drained.append(drained_s / loop_s)
        calls.append(call_s)
        observed.run_dir.cleanup()
    all_calls = np.concatenate(calls)

    def percentile(p: int) -> float | None:
        """Percentiles of the step call, in us; None if the calls are not timed one by one."""
        return None if np.isnan(all_calls).any() else round(1e6 * float(np.percentile(all_calls, p)), 1)

    return {
        "step_us": round(1e6 * workload.step_s, 1),
        "steps": steps,
        "pairs": pairs,
        "ratio_median": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "drained_over_loop": round(median(drained), 3),
        "call_p50_us": percentile(50),
        "call_p95_us": percentile(95),
        "call_p99_us": percentile(99),
    }


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of runs per figure.")] = 7,
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 3.0,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
    only: Annotated[str, typer.Option(help="Only step durations that contain this text.")] = "",
) -> None:
    """Measures and prints the table."""
    logging.getLogger("eventtrain").setLevel(logging.CRITICAL)
    table = Table(title="Observed run / bare jitted loop, median of paired runs; step call times in us")
    for heading in ("bare step", "subscribers", "K", "ratio", "drained", "p50", "p95", "p99"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "subscribers" else "right")
    figures: list[dict[str, Any]] = []
    for name, target_s in SIZES:
        if only not in name:
            continue
        workload = calibrated(name, target_s)
        cases: list[tuple[str, bool, int]] = [("none", False, 1), ("eight", True, 1)]
        if target_s < 1e-4:
            cases.append(("eight", True, 16))
        for label, subscribed, per_call in cases:
            found = paired(
                workload,
                lambda w=workload, s=subscribed, k=per_call: Observed(w, subscribed=s, steps_per_call=k),
                pairs,
                seconds,
            )
            figures.append({"step": name, "subscribers": label, "steps_per_call": per_call, **found})
            calls = [str(found[f"call_{percentile}_us"] or "-") for percentile in ("p50", "p95", "p99")]
            ratio, drained = f"{found['ratio_median']:.3f}", f"{found['drained_over_loop']:.2f}"
            table.add_row(f"{found['step_us']} us", label, str(per_call), ratio, drained, *calls)
    Console().print(table)
    if json is not None:
        write_json(json, "loop_overhead", figures)


if __name__ == "__main__":
    typer.run(main)
