"""Renders the results in ``benchmarks/results`` as Markdown tables; docs/make_pages.py puts them into the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def section(name: str) -> str:
    """Returns the table of one benchmark with machine, date and versions, or the command that measures it."""
    path = RESULTS / f"{name}-cpu.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks.{name} --json benchmarks/results/{path.name}`."
    document = json.loads(path.read_text())
    return f"{RENDERERS[name](document['figures'])}\n\n{machine(document)}"


def machine(document: dict[str, Any]) -> str:
    """Returns the line that names date, machine and versions of a measurement."""
    found = document["machine"]
    versions = ", ".join(f"{package} {found[package]}" for package in ("jax", "anyio", "pydantic"))
    return (
        f"Measured {document['measured']} on {found['processor']}, {found['cores']} cores, {found['backend']} backend; "
        f"{found['system']}, Python {found['python']}, {versions}."
    )


def loop_overhead(figures: list[dict[str, Any]]) -> str:
    """Returns the time of an observed run over that of the bare loop, for each step duration."""
    lines = [
        "| bare step | subscribers | steps per call | observed / bare loop | pairs |",
        "|---|---|---|---|---|",
    ]
    for figure in figures:
        lowest, highest = min(figure["ratios"]), max(figure["ratios"])
        lines.append(
            f"| {_duration(figure['step_us'])} | {'none' if figure['subscribers'] == 'none' else 'eight'} | "
            f"{figure['steps_per_call']} | **{figure['ratio_median']:.3f}** ({lowest:.3f} to {highest:.3f}) | "
            f"{figure['pairs']} |"
        )
    return "\n".join(lines)


def live(what: str, figures: list[dict[str, Any]]) -> str:
    """Returns the time of a run with these subscribers over that of the bare loop, for each step duration."""
    lines = ["| bare step | subscribers | observed / bare loop | pairs |", "|---|---|---|---|"]
    for figure in figures:
        each = figure.get("ratios") or figure["ratios_to_bare"]
        middle = figure.get("ratio_median") or figure["ratio_to_bare"]
        lines.append(
            f"| {_duration(figure['bare_step_us'])} | {what} | **{middle:.3f}** ({min(each):.3f} to {max(each):.3f}) | "
            f"{figure['pairs']} |"
        )
    return "\n".join(lines)


def sinks(figures: dict[str, dict[str, float]]) -> str:
    """Returns the rows per second of the file loggers."""
    lines = ["| rows of 3 metrics | rows/s | rows/s over writing row by row |", "|---|---|---|"]
    for logger, figure in figures.items():
        ratio = f"**{figure['ratio']:.1f}**" if "ratio" in figure else ""
        lines.append(f"| {logger} | {figure['rows/s']:,.0f} | {ratio} |")
    return "\n".join(lines)


def bus_throughput(figures: dict[str, dict[str, float]]) -> str:
    """Returns the time of publishing, and of delivering an event to handlers by each library."""
    published, one, ten = figures["publish"], figures["1 handler"], figures["10 handlers"]
    ways = [name for name in one if name.endswith(" / direct")]
    lines = [
        "| time / time of awaiting the handlers | 1 handler | 10 handlers |",
        "|---|---|---|",
        *(f"| {way.removesuffix(' / direct')} | {one[way]:.1f} | {ten[way]:.1f} |" for way in ways),
        "",
        f"`publish` from a thread while the event loop is busy: {published['publish, ns']:.0f} ns, "
        f"{published['publish / append and check, in a function']:.1f} times a deque append and a flag check "
        "in a function.",
    ]
    return "\n".join(lines)


def checkpoint_stall(figures: dict[str, Any]) -> str:
    """Returns the steps around a snapshot and the total time, for each way to write checkpoints."""
    ways = {
        "eventtrain": "`Checkpointer`",
        "orbax async": "Orbax, asynchronous",
        "orbax sync": "Orbax, synchronous",
    }
    steps, every = figures["steps"], figures["every"]
    lines = [
        f"| {figures['megabytes']} MB every {every} of {steps} steps of {figures['none']['median_step_ms']:.0f} ms | "
        "slowest step around a snapshot / median | time / without checkpoints | extra states held |",
        "|---|---|---|---|",
    ]
    for way, what in ways.items():
        figure = figures[way]
        lowest, highest = min(figure["totals_to_none"]), max(figure["totals_to_none"])
        lines.append(
            f"| {what} | **{figure['slowest_to_median']:.2f}** | **{figure['total_to_none']:.2f}** "
            f"({lowest:.2f} to {highest:.2f}) | {abs(figure['extra_states']):.0f} |"
        )
    return "\n".join(lines)


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f} ms" if microseconds >= 1000 else f"{microseconds:.0f} us"


RENDERERS: dict[str, Callable[[Any], str]] = {
    "loop_overhead": loop_overhead,
    "checkpoint_stall_120MB": checkpoint_stall,
    "checkpoint_stall_1000MB": checkpoint_stall,
    "bus_throughput": bus_throughput,
    "sinks": sinks,
    "live_sinks": partial(live, "all file loggers, TensorBoard, Prometheus, report and curves"),
    "alert_rules": partial(live, "twenty alert rules on every step"),
}
"""Name of the results -> the function that makes a table of their figures."""
