"""Cost of all file loggers, TensorBoard and Prometheus together.

Each figure is a ratio of two loops, which run one after the other in this process, in alternating order: the median of
all pairs. "bare" is the jitted loop with the same donation, the same batches on the device, no synchronisation per step
and one block at the end. Each observed run has its own trainer and folder, epochs, and every step in each of its logs:
CSV, JSON Lines, Parquet, the history, TensorBoard. There is one scrape per second, and curves and a report at the end.
"drained" includes the work after training. Afterwards the files are read and checked, because a logger that loses rows
would be fast.

    python -m benchmarks.live_sinks [--pairs 9] [--seconds 4] [--json PATH]
"""

from __future__ import annotations

import csv
import tempfile
import threading
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any
from urllib.request import urlopen

import pyarrow.parquet
import typer
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eventtrain as et
from benchmarks.machine import write_json
from benchmarks.paired import ratios
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

SIZES = (("70 us", 70e-6), ("0.7 ms", 0.7e-3))
EPOCHS = 4
SCRAPE_S = 1.0
"""The default of Prometheus is a minute."""
TARGETS = {"0.7 ms": 1.05}


class Observed:
    """One run with every logger."""

    def __init__(self, workload: Workload, run_dir: str) -> None:
        self.workload = workload
        self.run_dir = Path(run_dir)
        self.history = subs.History(steps=True, max_steps=10_000_000)
        self.exporter = subs.PrometheusExporter(port=0)
        self.trainer = et.Trainer(
            workload.step_fn,
            workload.state,
            subscribers=[
                subs.CSVLogger("steps.csv"),
                subs.JSONLLogger("events.jsonl", by="window"),
                subs.ParquetLogger("parts"),
                self.history,
                subs.PlotCurves("curves.png"),
                subs.TensorBoardLogger(),
                self.exporter,
                subs.Report(),
            ],
            run_dir=run_dir,
            drain_timeout_s=120.0,
        )

    def run(self, steps: int) -> tuple[float, float]:
        """Returns the seconds of the loop, and the seconds until every logger has finished."""
        batches, per_epoch = self.workload.batches, -(-steps // EPOCHS)
        scraper = Scraper(self.exporter)
        with self.trainer.session() as session:
            session.prepare(batches[0])
            scraper.start()
            began_s = perf_counter()
            for index in range(steps):
                if index % per_epoch == 0:
                    if index:
                        session.end_epoch()
                    session.begin_epoch()
                session.step(batches[index % len(batches)])
            session.block_until_ready()
            loop_s = perf_counter() - began_s
            session.end_epoch()
            scraper.stop()
        drained_s = perf_counter() - began_s
        self._check(steps, scraper.scrapes)
        return loop_s, drained_s

    def _check(self, steps: int, scrapes: int) -> None:
        expected = list(range(1, steps + 1))
        with open(self.run_dir / "steps.csv", newline="") as file:
            rows = [int(row["step"]) for row in csv.DictReader(file)]
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        events = [et.parse_event(line) for line in lines]
        curves = EventAccumulator(str(self.run_dir / "tensorboard"), size_guidance={"scalars": 0})
        curves.Reload()
        shown = {
            tag: [point.step for point in curves.Scalars(tag)] for tag in ("step/loss", "step/grad_norm")
        }
        found = {
            "CSV": rows,
            "JSON lines": [event.step for event in events if isinstance(event, et.StepCompleted)],
            "Parquet": pyarrow.parquet.read_table(self.run_dir / "parts")["step"].to_pylist(),
            "history": list(self.history.steps["step"]),
            **{f"TensorBoard's {tag}": steps_of_tag for tag, steps_of_tag in shown.items()},
        }
        for sink, its_steps in found.items():
            if its_steps != expected:
                raise SystemExit(f"{sink} has {len(its_steps)} steps of {steps}: the figures are not valid")
        if scrapes == 0:
            raise SystemExit("there was no scrape: the figures are not valid")
        for name in ("curves.png", "report.html", "report.md"):
            if not (self.run_dir / name).stat().st_size:
                raise SystemExit(f"{name} is empty")


class Scraper(threading.Thread):
    """Scrapes the metrics once per second, as a Prometheus server would."""

    def __init__(self, exporter: subs.PrometheusExporter) -> None:
        super().__init__(daemon=True)
        self.scrapes = 0
        self._exporter = exporter
        self._ended = threading.Event()

    def run(self) -> None:
        """Scrapes until ``stop``."""
        while not self._ended.wait(SCRAPE_S if self.scrapes else 0.1):
            with urlopen(f"http://127.0.0.1:{self._exporter.port}/metrics", timeout=10) as page:
                self.scrapes += b"grad_norm" in page.read()

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self.join()


def paired(workload: Workload, pairs: int, seconds: float) -> dict[str, Any]:
    """Runs bare and observed loops in alternating order."""
    steps = max(EPOCHS * 50, int(seconds / workload.step_s))
    bare: list[float] = []
    observed: list[float] = []
    drained: list[float] = []
    for pair in range(pairs + 1):
        with tempfile.TemporaryDirectory() as run_dir:
            run = Observed(workload, run_dir)
            bare_first_s = workload.bare_loop(steps) if pair % 2 else None
            loop_s, drained_s = run.run(steps)
            bare_s = workload.bare_loop(steps) if bare_first_s is None else bare_first_s
        if pair:  # the first one is the warm-up
            bare.append(bare_s)
            observed.append(loop_s)
            drained.append(drained_s)
    middle, quartiles, each = ratios(observed, bare)
    return {
        "bare_step_us": round(1e6 * median(bare) / steps, 1),
        "observed_step_us": round(1e6 * median(observed) / steps, 1),
        "steps": steps,
        "pairs": pairs,
        "ratio_median": middle,
        "ratio_quartiles": quartiles,
        "ratios": each,
        "drained_over_loop": ratios(drained, observed)[0],
    }


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of runs per figure.")] = 9,
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
    only: Annotated[str, typer.Option(help="Only step durations that contain this text.")] = "",
) -> None:
    """Measures and prints the table."""
    table = Table(
        title="Run with all file loggers, TensorBoard and Prometheus / bare loop, median of paired runs"
    )
    for heading in ("step", "bare", "observed", "ratio", "quartiles", "target", "drained"):
        table.add_column(heading, no_wrap=True, justify="right")
    figures: list[dict[str, Any]] = []
    for name, target_s in SIZES:
        if only not in name:
            continue
        found = paired(calibrated(name, target_s), pairs, seconds)
        figures.append({"step": name, **found})
        table.add_row(
            name,
            f"{found['bare_step_us']:.0f} us",
            f"{found['observed_step_us']:.0f} us",
            f"{found['ratio_median']:.3f}",
            " to ".join(f"{ratio:.3f}" for ratio in found["ratio_quartiles"]),
            f"<= {TARGETS[name]}" if name in TARGETS else "",
            f"{found['drained_over_loop']:.2f}",
        )
    Console(width=120).print(table)
    if json is not None:
        write_json(json, "live_sinks", figures)


if __name__ == "__main__":
    typer.run(main)
