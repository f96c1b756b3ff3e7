"""Writes the measured table of README.md from ``benchmarks/results``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- loop_overhead:begin -->", "<!-- loop_overhead:end -->"

SUBSCRIBERS = {"none": "none"}
"""What the benchmark calls a case -> what the table does; all other cases run with eight."""


def tables() -> str:
    """All tables with their machines; for what was not measured yet, how to do it."""
    parts = [
        section(name, render)
        for name, render in (
            ("loop_overhead", loop_overhead),
            ("live_sinks", partial(live, "every file sink, TensorBoard, Prometheus, report and curves")),
            ("alert_rules", partial(live, "twenty alert rules on every step")),
            ("sinks", sinks),
            ("bus_throughput", bus_throughput),
            ("checkpoint_stall_120MB", checkpoint_stall),
            ("checkpoint_stall_1000MB", checkpoint_stall),
        )
    ]
    return "\n".join(parts)


def section(name: str, render: Any) -> str:
    """One benchmark's table, and below it machine, date and versions."""
    path = RESULTS / f"{name}-cpu.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks.{name} --json benchmarks/results/{path.name}`.\n"
    document = json.loads(path.read_text())
    return f"{render(document['figures'])}\n\n{machine(document)}\n"


def machine(document: dict[str, Any]) -> str:
    """On what, with what and when it was measured."""
    found = document["machine"]
    versions = ", ".join(f"{package} {found[package]}" for package in ("jax", "anyio", "pydantic"))
    return (
        f"Measured {document['measured']} on {found['processor']}, {found['cores']} cores, {found['backend']} backend; "
        f"{found['system']}, Python {found['python']}, {versions}."
    )


def loop_overhead(figures: list[dict[str, Any]]) -> str:
    """Observed run over bare loop, for each size of step."""
    lines = [
        "| bare step | subscribers | steps per call | observed / bare loop | pairs |",
        "|---|---|---|---|---|",
    ]
    for figure in figures:
        lowest, highest = min(figure["ratios"]), max(figure["ratios"])
        lines.append(
            f"| {_duration(figure['step_us'])} | {SUBSCRIBERS.get(figure['subscribers'], 'eight')} | "
            f"{figure['steps_per_call']} | **{figure['ratio_median']:.3f}** ({lowest:.3f} to {highest:.3f}) | "
            f"{figure['pairs']} |"
        )
    return "\n".join(lines)


def live(what: str, figures: list[dict[str, Any]]) -> str:
    """A run with these subscribers over the bare loop, for each size of step."""
    lines = ["| bare step | live | observed / bare loop | pairs |", "|---|---|---|---|"]
    for figure in figures:
        each = figure.get("ratios") or figure["ratios_to_bare"]
        middle = figure.get("ratio_median") or figure["ratio_to_bare"]
        lines.append(
            f"| {_duration(figure['bare_step_us'])} | {what} | **{middle:.3f}** ({min(each):.3f} to {max(each):.3f}) | "
            f"{figure['pairs']} |"
        )
    return "\n".join(lines)


def sinks(figures: dict[str, dict[str, float]]) -> str:
    """Rows a second of the file loggers."""
    lines = ["| rows of 3 metrics | rows/s | over writing them row by row |", "|---|---|---|"]
    for logger, figure in figures.items():
        ratio = f"**{figure['ratio']:.1f}**" if "ratio" in figure else ""
        lines.append(f"| {logger} | {figure['rows/s']:,.0f} | {ratio} |")
    return "\n".join(lines)


def bus_throughput(figures: dict[str, dict[str, float]]) -> str:
    """Time over that of the plain thing, for publishing and for each way of handing events out."""
    published, one, ten = figures["publish"], figures["1 handler"], figures["10 handlers"]
    ways = [name for name in one if name.endswith(" / direct")]
    lines = [
        "| time over awaiting the handlers directly | 1 handler | 10 handlers |",
        "|---|---|---|",
        *(f"| {way.removesuffix(' / direct')} | {one[way]:.1f} | {ten[way]:.1f} |" for way in ways),
        "",
        f"`publish` from a thread while the event loop is busy: {published['publish, ns']:.0f} ns, "
        f"{published['publish / append and check, in a function']:.1f} times a deque append and a flag check "
        "in a function.",
    ]
    return "\n".join(lines)


def checkpoint_stall(figures: dict[str, Any]) -> str:
    """The steps around a snapshot, and the whole time, for each way to write checkpoints."""
    ways = {
        "eventtrain": "`Checkpointer`",
        "orbax async": "Orbax, asynchronous",
        "orbax sync": "Orbax, synchronous",
    }
    steps, every = figures["steps"], figures["every"]
    lines = [
        f"| {figures['megabytes']} MB every {every} of {steps} steps of {figures['none']['median_step_ms']:.0f} ms | "
        "slowest step around a snapshot / median | time / without checkpoints | states held besides |",
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


def filled(page: str) -> str:
    """The page with the tables between the markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> None:
    """Write the page."""
    README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
