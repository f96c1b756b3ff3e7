"""Cost of averaging the weights inside the step.

Each figure is a ratio of two loops, which run one after the other in this process, in alternating order: the median of
all pairs, with the quartiles. There are many pairs of short runs, so that other load on the machine affects both. The
ratio of the two fastest runs, which were disturbed least, is shown too. "bare" compares jitted loops with the same
donation, "trainer" compares two sessions without subscribers, each with and without the extension. "alone" is the time
of the extension's update alone, including its dispatch, as the best of many runs.

    python -m benchmarks.step_extensions [--pairs 41] [--seconds 0.2] [--json PATH]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json
from benchmarks.paired import Loop, in_turn, ratios, session_loop
from benchmarks.workloads import Workload, network
from eventtrain.device.extensions import StepExtension

NETWORKS = ((512, 64, 3), (256, 128, 2), (16, 256, 3))
"""Batch size, width and layers. The first two take 0.5 to 0.7 ms. The last is the worst case: 16 examples per batch for
200,000 parameters."""
EXTENSIONS: tuple[StepExtension, ...] = (et.EMA(0.999), et.SWA(1, 100))


def bare(workload: Workload, extension: StepExtension | None) -> Loop:
    """Returns the jitted loop: donation, batches on the device, no synchronisation per step, one block at the end."""

    def step(state: Any, averaged: Any, batch: Any) -> Any:
        state, metrics = workload.step_fn(state, batch)
        if extension is not None:
            count, average = averaged
            averaged = count + 1, extension.update(average, state["params"], count + 1)
        return state, averaged, metrics

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def run(steps: int) -> float:
        state = jax.tree.map(jnp.copy, workload.state)
        averaged: Any = None if extension is None else (jnp.int32(0), extension.init(state["params"]))
        averaged = jax.tree.map(jnp.copy, averaged)
        batches = workload.batches
        state, averaged, metrics = jitted(state, averaged, batches[0])
        jax.block_until_ready((state, averaged, metrics))
        began_s = perf_counter()
        for index in range(steps):
            state, averaged, metrics = jitted(state, averaged, batches[index % len(batches)])
        jax.block_until_ready((state, averaged, metrics))
        return perf_counter() - began_s

    return run


def trained(workload: Workload, extension: StepExtension | None, run_dir: str) -> Loop:
    """Returns a loop in a session of a trainer without subscribers."""
    extensions = () if extension is None else (extension,)
    trainer = et.Trainer(workload.step_fn, workload.state, step_extensions=extensions, run_dir=run_dir)

    return session_loop(trainer, workload.batches)


def alone_s(workload: Workload, extension: StepExtension, repeats: int = 200) -> float:
    """Returns the seconds of `extension.update` alone, as the best of 20 runs."""
    jitted, params = jax.jit(extension.update, donate_argnums=0), workload.state["params"]
    average, step = jax.tree.map(jnp.copy, extension.init(params)), jnp.int32(2)
    best_s = float("inf")
    for _ in range(20):
        began_s = perf_counter()
        for _ in range(repeats):
            average = jitted(average, params, step)
        jax.block_until_ready(average)
        best_s = min(best_s, (perf_counter() - began_s) / repeats)
    return best_s


def paired(with_extension: Loop, without: Loop, pairs: int, seconds: float) -> dict[str, Any]:
    """Runs both in alternating order; returns the quantiles of the ratios."""
    for loop in (without, with_extension):
        loop(20)  # compiles
    steps = max(50, int(seconds / (without(100) / 100)))
    took = in_turn({"plain": without, "extended": with_extension}, pairs, steps)
    plain, extended = took["plain"], took["extended"]
    middle, quartiles, each = ratios(extended, plain)
    return {
        "step_us": round(1e6 * median(plain), 1),
        "steps": steps,
        "pairs": pairs,
        "ratio_median": middle,
        "ratio_of_fastest": round(min(extended) / min(plain), 4),
        "fastest_step_us": round(1e6 * min(plain), 1),
        "ratio_quartiles": quartiles,
        "ratios": each,
    }


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of runs per figure.")] = 41,
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 0.2,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Measures and prints the table."""
    table = Table(title="With the extension / without, median of paired runs")
    for heading in (
        "step",
        "batch",
        "parameters",
        "extension",
        "alone",
        "loop",
        "ratio",
        "quartiles",
        "fastest",
    ):
        table.add_column(
            heading, no_wrap=True, justify="left" if heading in ("extension", "loop") else "right"
        )
    figures: list[dict[str, Any]] = []
    for batch_size, width, layers in NETWORKS:
        workload = network(batch_size, width, layers, "")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(workload.state["params"]))
        for extension in EXTENSIONS:
            name, alone_us = repr(extension), round(1e6 * alone_s(workload, extension), 1)
            with tempfile.TemporaryDirectory() as run_dir:
                loops = {
                    "bare": (bare(workload, extension), bare(workload, None)),
                    "trainer": (trained(workload, extension, run_dir), trained(workload, None, run_dir)),
                }
                for label, (extended, plain) in loops.items():
                    found = paired(extended, plain, pairs, seconds)
                    kind = {
                        "batch_size": batch_size,
                        "parameters": parameters,
                        "extension": name,
                        "loop": label,
                    }
                    figures.append(kind | found)
                    low, high = found["ratio_quartiles"]
                    table.add_row(
                        f"{found['step_us']:.0f} us",
                        str(batch_size),
                        f"{parameters:,}",
                        name,
                        f"{alone_us} us",
                        label,
                        f"{found['ratio_median']:.3f}",
                        f"{low:.3f} to {high:.3f}",
                        f"{found['ratio_of_fastest']:.3f}",
                    )
    Console(width=120).print(table)
    if json is not None:
        write_json(json, "step_extensions", figures)


if __name__ == "__main__":
    typer.run(main)
