"""Cost of observing a training loop, against the bare jitted loop.

The bare loop has the same donation, the same batches on the device, no synchronisation per step and one block at the
end. Each case is a trainer with one set of observers. After its runs, the events that the handlers received are
counted, and the files of the loggers are read, because a loop that loses events would be fast.
"""

from __future__ import annotations

import csv
import logging
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.request import urlopen

import anyio

import eventtrain as et
from benchmarks.figures import Budget, Figure, Loop, absent, compared_loops, without_fixed_cost
from benchmarks.machine import Device
from benchmarks.workloads import Workload, calibrated, duration, fits
from eventtrain import subscribers as subs
from eventtrain.device.extensions import StepExtension

EPOCHS = 4
"""Epochs in each run; the plateau policy decides once per epoch, with lag=0."""
SHORT_S = (50e-6, 0.2e-3, 1e-3)
LONG_S = (10e-3, 100e-3)
STEPS_PER_CALL = (1, 4, 16, 64)


@dataclass(frozen=True)
class Observers:
    """One set of observers. ``check`` is given the number of steps, and raises if one of them has missed any."""

    subscribers: Sequence[et.Subscriber] = ()
    handlers: Sequence[tuple[Any, Callable[..., Any], dict[str, Any]]] = ()
    extensions: tuple[StepExtension, ...] = ()
    check: Callable[[Path, int], None] = lambda folder, steps: None
    drain_timeout_s: float = 60.0


def none() -> Observers:
    return Observers()


def counters(number: int) -> Observers:
    """Returns handlers that count every step."""
    received: Counter[int] = Counter()

    def counter(index: int) -> Callable[..., Any]:
        async def count(event: et.StepCompleted) -> None:
            received[index] += 1

        return count

    def check(_: Path, steps: int) -> None:
        require(all(received[index] == steps for index in range(number)), f"{received} of {steps} steps")

    return Observers(handlers=[(et.StepCompleted, counter(n), {}) for n in range(number)], check=check)


def eight() -> Observers:
    """Returns a usual mix: a counter, a line every 100 steps, two log files, a policy, a display, windows, failures."""
    counted, columns = counters(1), Counter[str]()

    async def line(event: et.StepCompleted) -> None:
        _ = f"{event.step}: {event.metrics['loss']:.4f}"

    async def show(event: et.StepCompleted) -> None:
        await anyio.sleep(0.1)

    async def fail(event: et.StepCompleted) -> None:
        raise ValueError("always")

    async def tabulate(event: et.StepsCompleted) -> None:
        columns["rows"] += len(event.metrics["loss"])

    def check(folder: Path, steps: int) -> None:
        counted.check(folder, steps)
        require(columns["rows"] == steps, f"windows with {columns['rows']} of {steps} steps")

    return Observers(
        [
            subs.JSONLLogger("events.jsonl"),
            subs.CSVLogger("steps.csv"),
            subs.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, mode="min"),
        ],
        [
            *counted.handlers,
            (et.StepCompleted, line, {"every": 100}),
            (et.StepCompleted, show, {"queue": et.KeepLatest()}),
            (et.StepCompleted, fail, {"disable_after": None}),
            (et.StepsCompleted, tabulate, {}),
        ],
        check=check,
    )


def slow() -> Observers:
    """Returns a handler that takes ten seconds for an event, and a counter beside it."""

    async def sleep(event: et.StepCompleted) -> None:
        await anyio.sleep(10)

    counted = counters(1)
    return Observers(
        handlers=[*counted.handlers, (et.StepCompleted, sleep, {"queue": et.KeepLatest()})],
        check=counted.check,
        drain_timeout_s=0.5,
    )


def failing() -> Observers:
    """Returns a handler that raises at every event, and a counter beside it."""

    async def fail(event: et.StepCompleted) -> None:
        raise ValueError("always")

    counted = counters(1)
    handlers = [*counted.handlers, (et.StepCompleted, fail, {"disable_after": None})]
    return Observers(handlers=handlers, check=counted.check)


def all_sinks() -> Observers:
    """Returns every logger, each with every step, one scrape per second, and curves and a report at the end."""
    history, exporter = subs.History(steps=True, max_steps=10**8), subs.PrometheusExporter(port=0)

    def check(folder: Path, steps: int) -> None:
        import pyarrow.parquet
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with open(folder / "steps.csv", newline="") as file:
            rows = [int(row["step"]) for row in csv.DictReader(file)]
        curves = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        curves.Reload()
        lines = (folder / "events.jsonl").read_text().splitlines()
        found = {
            "CSV": rows,
            "JSON Lines": [et.parse_event(line).step for line in lines if '"step_completed"' in line],
            "Parquet": pyarrow.parquet.read_table(folder / "parts")["step"].to_pylist(),
            "History": list(history.steps["step"]),
            "TensorBoard": [point.step for point in curves.Scalars("step/loss")],
        }
        for sink, its_steps in found.items():
            require(its_steps == list(range(1, steps + 1)), f"{sink} with {len(its_steps)} of {steps} steps")
        for name in ("curves.png", "report.html", "report.md"):
            require((folder / name).stat().st_size > 0, f"an empty {name}")

    return Observers(
        [
            subs.CSVLogger("steps.csv"),
            subs.JSONLLogger("events.jsonl", by="window"),
            subs.ParquetLogger("parts"),
            history,
            subs.PlotCurves("curves.png"),
            subs.TensorBoardLogger(),
            exporter,
            subs.Report(),
        ],
        check=check,
        drain_timeout_s=120.0,
    )


def alert_rules() -> Observers:
    """Returns twenty rules that are not met; those about a metric check every step."""
    step = et.StepCompleted
    rules = [
        *(
            subs.Rule(metric, above=1e9, name=f"{metric} high {number}", event=step)
            for metric in ("loss", "grad_norm")
            for number in range(3)
        ),
        *(subs.Rule(metric, non_finite=True, event=step) for metric in ("loss", "grad_norm")),
        subs.Rule("examples", below=1, event=step),
        *(subs.SpikeRule(metric, window=200, times=1e6, event=step) for metric in ("loss", "grad_norm")),
        subs.SpikeRule("loss", window=1000, times=1e6, name="spike of a thousand", event=step),
        subs.NoImprovementRule("loss", patience=10**9, event=step),
        subs.NoImprovementRule("grad_norm", patience=10**9, mode="min", event=step),
        subs.ForecastRule("loss", above=1e9, within=1000, window=100, event=step),
        subs.ForecastRule("grad_norm", above=1e9, within=1000, window=100, event=step),
        subs.StallRule(after_s=600),
        subs.SlowSubscriberRule(backlog=10**9),
        subs.LowDiskRule(below_bytes=1, every_s=1.0),
        subs.StallRule(after_s=3600, name="long stall"),
    ]
    seen: list[et.Event] = []

    async def see(event: et.AlertRaised) -> None:
        seen.append(event)

    return Observers(
        [subs.Alerts(rules)],
        [(et.AlertRaised, see, {})],
        check=lambda folder, steps: require(not seen, f"{len(seen)} alerts instead of none"),
    )


def averaged(extension: StepExtension) -> Observers:
    return Observers(extensions=(extension,))


CASES: dict[str, Callable[[], Observers]] = {
    "no subscriber": none,
    "8 subscribers": eight,
    "all sinks": all_sinks,
    "64 subscribers": partial(counters, 64),
    "a slow subscriber": slow,
    "a failing subscriber": failing,
    "20 alert rules": alert_rules,
    "EMA of the weights": partial(averaged, et.EMA(0.999)),
    "SWA of the weights": partial(averaged, et.SWA(1, 100)),
}
OF_EVERY_SIZE = tuple(CASES)[:3]
FIT_EPOCH = 1024
"""Batches in an epoch of ``fit``: the end of an epoch takes as long as several short steps."""


@contextmanager
def observed(
    workload: Workload, observers: Observers, *, through_fit: bool = False, **options: Any
) -> Generator[Loop]:
    """Yields the loop of a trainer with ``observers``, in sessions or in calls of ``fit``; checks it after use."""
    steps_run = 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(
            workload.step_fn,
            workload.state,
            subscribers=observers.subscribers,
            step_extensions=observers.extensions,
            run_dir=folder,
            drain_timeout_s=observers.drain_timeout_s,
            **options,
        )
        for event, handler, how in observers.handlers:
            trainer.on(event, **how)(handler)
        batches, count = workload.batches, len(workload.batches)

        def in_session(steps: int) -> float:
            nonlocal steps_run
            steps_run += steps
            per_epoch = -(-steps // EPOCHS)
            with trainer.session() as session, scraping(observers.subscribers):
                session.prepare(batches[0])
                began_s = perf_counter()
                for index in range(steps):
                    if index % per_epoch == 0:
                        if index:
                            session.end_epoch()
                        session.begin_epoch()
                    session.step(batches[index % count])
                session.block_until_ready()
                loop_s = perf_counter() - began_s
                session.end_epoch()
            return loop_s

        epoch = batches * max(1, FIT_EPOCH // count)

        def fit(steps: int) -> None:
            nonlocal steps_run
            steps_run += steps
            trainer.fit(epoch, steps=steps, progress=False)

        yield without_fixed_cost(fit, count) if through_fit else in_session
        observers.check(Path(folder), steps_run)
        trainer.close()


@contextmanager
def scraping(subscribers: Sequence[et.Subscriber]) -> Generator[None]:
    """Scrapes the metrics once per second, far more often than a Prometheus server."""
    exporter = next((one for one in subscribers if isinstance(one, subs.PrometheusExporter)), None)
    if exporter is None:
        yield
        return
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10).read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def require(holds: bool, found: str) -> None:
    """Raises if the figures are not valid."""
    if not holds:
        raise AssertionError(f"The figures are not valid: found {found}.")


def measured(
    workload: Workload, name: str, make: Callable[[], Observers], share_s: float, **options: Any
) -> Figure:
    """Returns the figure of one case, or its absence if a logger or a reader is not installed."""
    try:
        with observed(workload, make(), **options) as loop:
            return compared_loops(name, loop, workload.bare_loop, workload.step_s, share_s, at=workload.name)
    except ImportError as error:
        return absent(name, error, at=workload.name)


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the time per step with each set of observers, and with several steps per call."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    several = {
        f"fit, 8 counters, {k} step{'s' * (k > 1)} per call": {"through_fit": True, "steps_per_call": k}
        for k in ((16,) if quick else STEPS_PER_CALL)
    }
    short = SHORT_S[1:] if quick else SHORT_S
    targets = short if quick else short + LONG_S
    cases = [
        (target_s, name, make, options)
        for target_s in targets
        for name, make, options in (
            *((name, CASES[name], {}) for name in CASES if name in OF_EVERY_SIZE or target_s in short),
            *((name, partial(counters, 8), several[name]) for name in several if target_s in short),
        )
        if not quick or name in OF_EVERY_SIZE or options
    ]
    workloads: dict[float, Workload] = {}
    for index, (target_s, name, make, options) in enumerate(cases):
        if target_s not in workloads:
            workloads = {target_s: calibrated(target_s)}
            at, step_s = duration(target_s), workloads[target_s].step_s
            found.append(Figure("bare loop", at, "us", round(1e6 * step_s, 1)))
        workload = workloads[target_s]
        if fits(workload, target_s):
            found.append(measured(workload, name, make, budget.share(len(cases) - index), **options))
        else:
            reason = f"the nearest network takes {duration(workload.step_s)}"
            found.append(absent(name, reason, at=workload.name))
    return found
