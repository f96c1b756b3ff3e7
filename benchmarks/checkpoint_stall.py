"""Cost of checkpoints: the steps around a snapshot, and the total time, against a run without checkpoints.

The loop waits for each step, so that its duration shows the cost. All variants run the same steps on the same state:

- ``none``: a Trainer without a Checkpointer;
- ``eventtrain``: with ``Checkpointer(every=10)``;
- ``orbax async``: the bare jitted loop, which calls ``AsyncCheckpointer.save`` every 10 steps;
- ``orbax sync``: the same with ``Checkpointer.save``.

"slowest" is the slowest of the steps around a snapshot (from the one before it to the second after it) over the median
step of the run, as the median and the maximum over the snapshots. "total" is the time of all steps over that of
``none`` in the same pair. It does not include checkpoints that are still being written when the steps end; "afterwards"
is the time that these take, and "ended" is the total with it. "states" is the maximum memory on the device after a
step, in sizes of the state, beyond that of ``none``. The variants alternate within a pair, and the figures are
medians.

On a CPU the step uses all cores but one (``NPROC``), because an accelerator leaves the host free. The amount of
computation grows with the state, as in training.

    python -m benchmarks.checkpoint_stall [--pairs 7] [--megabytes 120] [--steps 100] [--json PATH]
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

os.environ.setdefault("NPROC", str(max(1, (os.cpu_count() or 2) - 1)))  # before XLA creates threads

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json
from eventtrain import subscribers as subs

EVERY = 10
WIDTH = 1024
ROWS_PER_MEGABYTE = 17
"""Rows of the batch per MB: 120 MB and 2,040 rows take about 0.2 s on one core, a hundredth of a real model."""


def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    """A large state that changes completely, with as much arithmetic on the batch as in a typical step."""
    hidden = batch
    for _ in range(8):
        hidden = jnp.tanh(hidden @ state["weight"])
    scale = 1 - 1e-6 * hidden.mean()
    return {name: leaf * scale for name, leaf in state.items()}, {"scale": scale}


def new_state(megabytes: int) -> Any:
    """Returns ``megabytes`` MB of float32: one matrix is used in the computation, the others are only updated.

    The values are random, because Orbax compresses.
    """
    rest = megabytes * 250_000 - WIDTH * WIDTH
    weight, moments = jax.random.split(jax.random.key(0))
    return {
        "weight": jax.random.normal(weight, (WIDTH, WIDTH)) / 64,
        "moments": jax.random.normal(moments, (16, rest // 16)),
    }


class Run:
    """Durations of all steps, and the time that pending checkpoints took afterwards."""

    def __init__(self, durations_s: list[float], afterwards_s: float, most_bytes: int) -> None:
        self.total_s = sum(durations_s)
        self.afterwards_s = afterwards_s
        self.most_bytes = most_bytes
        middle = median(durations_s)
        around = [
            max(durations_s[step - 1 : step + 2]) / middle
            for step in range(EVERY, len(durations_s) - 1, EVERY)
        ]
        self.slowest, self.worst = median(around), max(around)
        self.median_step_ms = middle * 1e3


def live_bytes() -> int:
    """Returns the size of all buffers on the device; several arrays may share one."""
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays()}.values())


def with_trainer(state: Any, batch: Any, steps: int, folder: Path, every: int | None) -> Run:
    """Runs the steps in a session."""
    checkpointer = (
        [] if every is None else [subs.Checkpointer("checkpoints", every=every, max_to_keep=2, at_end=False)]
    )
    trainer = et.Trainer(step_fn, state, subscribers=checkpointer, run_dir=folder, drain_timeout_s=600.0)
    durations_s: list[float] = []
    with trainer.session() as session:
        for _ in range(EVERY):  # compiles, both variants of the step; the first snapshot is a copy
            session.step(batch)
        session.idle(1.0)
        session.block_until_ready()
        most_bytes = 0
        for _ in range(steps):
            began_s = perf_counter()
            session.step(batch)
            session.block_until_ready()
            durations_s.append(perf_counter() - began_s)
            most_bytes = max(most_bytes, live_bytes())
        began_s = perf_counter()
    return Run(durations_s, perf_counter() - began_s, most_bytes)


def with_orbax(state: Any, batch: Any, steps: int, folder: Path, checkpointer: Any) -> Run:
    """Runs the bare loop, which calls ``checkpointer.save``."""
    jitted = jax.jit(step_fn, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)
    durations_s: list[float] = []
    for _ in range(EVERY):
        state, _metrics = jitted(state, batch)
    jax.block_until_ready(state)
    most_bytes = 0
    for step in range(1, steps + 1):
        began_s = perf_counter()
        state, metrics = jitted(state, batch)
        jax.block_until_ready((state, metrics))
        if step % EVERY == 0:
            checkpointer.save(folder / f"step-{step}", state)
        durations_s.append(perf_counter() - began_s)
        most_bytes = max(most_bytes, live_bytes())
    began_s = perf_counter()
    checkpointer.close()
    return Run(durations_s, perf_counter() - began_s, most_bytes)


def main(
    pairs: Annotated[int, typer.Option(help="Number of measurements of each variant.")] = 7,
    megabytes: Annotated[int, typer.Option(help="Size of the state.")] = 120,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 100,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Measures, prints a table, and writes the figures."""
    state = new_state(megabytes)
    batch = jnp.asarray(
        np.random.default_rng(0).normal(size=(ROWS_PER_MEGABYTE * megabytes, WIDTH)), jnp.float32
    )
    handler = ocp.PyTreeCheckpointHandler
    ways: dict[str, Callable[[Path], Run]] = {
        "none": lambda folder: with_trainer(state, batch, steps, folder, None),
        "eventtrain": lambda folder: with_trainer(state, batch, steps, folder, EVERY),
        "orbax async": lambda folder: with_orbax(
            state, batch, steps, folder, ocp.AsyncCheckpointer(handler())
        ),
        "orbax sync": lambda folder: with_orbax(state, batch, steps, folder, ocp.Checkpointer(handler())),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for pair in range(pairs):
        names = list(ways) if pair % 2 == 0 else list(reversed(ways))
        for name in names:
            gc.collect()  # garbage of the previous variant does not count here
            folder = Path(tempfile.mkdtemp())
            try:
                runs[name].append(ways[name](folder))
            finally:
                shutil.rmtree(folder)
    table = Table(title=f"{megabytes} MB of state, {steps} steps, a checkpoint every {EVERY}, {pairs} pairs")
    columns = (
        "", "step (ms)", "slowest / median", "worst", "total / none", "ended / none", "afterwards (s)", "states",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    figures: dict[str, Any] = {"megabytes": megabytes, "steps": steps, "every": EVERY, "pairs": pairs}
    for name, results in runs.items():
        totals = [run.total_s / none.total_s for run, none in zip(results, runs["none"], strict=True)]
        ended = [
            (run.total_s + run.afterwards_s) / none.total_s
            for run, none in zip(results, runs["none"], strict=True)
        ]
        row = {
            "median_step_ms": round(median(run.median_step_ms for run in results), 2),
            "slowest_to_median": round(median(run.slowest for run in results), 3),
            "worst_to_median": round(median(run.worst for run in results), 3),
            "total_to_none": round(median(totals), 3),
            "totals_to_none": [round(total, 3) for total in totals],
            "ended_to_none": round(median(ended), 3),
            "afterwards_s": round(median(run.afterwards_s for run in results), 2),
            "extra_states": round(
                max(run.most_bytes - none.most_bytes for run, none in zip(results, runs["none"], strict=True))
                / (megabytes * 1e6),
                2,
            ),
        }
        figures[name] = row
        table.add_row(
            name,
            *(
                str(row[key])
                for key in ("median_step_ms", "slowest_to_median", "worst_to_median", "total_to_none")
            ),
            *(str(row[key]) for key in ("ended_to_none", "afterwards_s", "extra_states")),
        )
    Console().print(table)
    if json is not None:
        write_json(json, "checkpoint_stall", figures)


if __name__ == "__main__":
    typer.run(main)
