"""Cost of twenty alert rules that check every step.

Each figure is a ratio of two loops, which run one after the other in this process, in alternating order: the median of
all pairs, with the quartiles. "bare" is the jitted loop with the same donation, the same batches on the device, no
synchronisation per step and one block at the end; "trainer" is a session without subscribers. The rules check each of
the three metrics at each step: thresholds, spikes, no improvement, forecasts, and rules about time. None of them is
    met.

    python -m benchmarks.alert_rules [--pairs 21] [--seconds 1] [--json PATH]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json
from benchmarks.paired import Loop, in_turn, ratios, session_loop
from benchmarks.workloads import Workload, calibrated
from eventtrain import subscribers as subs

SIZES = (("70 us", 70e-6), ("0.7 ms", 0.7e-3))


def rules() -> list[Any]:
    """Returns twenty rules; those about a metric check every step."""
    step = et.StepCompleted
    thresholds = [
        subs.Rule(metric, above=1e9, name=f"{metric} high {number}", event=step)
        for metric in ("loss", "grad_norm")
        for number in range(3)
    ]
    return [
        *thresholds,
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


def trained(workload: Workload, run_dir: str, subscribers: list[et.Subscriber], seen: list[et.Event]) -> Loop:
    """Returns a session of a trainer that appends raised alerts to ``seen``."""
    trainer = et.Trainer(workload.step_fn, workload.state, subscribers=subscribers, run_dir=run_dir)

    @trainer.on(et.AlertRaised)
    async def see(event: et.AlertRaised) -> None:
        seen.append(event)

    return session_loop(trainer, workload.batches)


def compared(loops: dict[str, Loop], pairs: int, seconds: float) -> dict[str, Any]:
    """Runs all loops in alternating order; returns the ratios of "alerts" to the others."""
    for loop in loops.values():
        loop(50)  # compiles
    steps = max(200, int(seconds / (loops["bare"](200) / 200)))
    took = in_turn(loops, pairs, steps)
    found: dict[str, Any] = {"steps": steps, "pairs": pairs}
    for other in ("bare", "trainer"):
        middle, quartiles, each = ratios(took["alerts"], took[other])
        found |= {f"ratio_to_{other}": middle, f"quartiles_to_{other}": quartiles, f"ratios_to_{other}": each}
    return found | {f"{name}_step_us": round(1e6 * median(each), 1) for name, each in took.items()}


def main(
    pairs: Annotated[int, typer.Option(help="Rounds; each loop runs once per round.")] = 21,
    seconds: Annotated[float, typer.Option(help="Seconds of each run.")] = 1.0,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Measures and prints the table."""
    table = Table(title="Time per step with 20 alert rules / without, median of paired runs")
    for heading in ("step", "bare", "with rules", "to bare", "quartiles", "to trainer", "quartiles"):
        table.add_column(heading, no_wrap=True, justify="right")
    figures: list[dict[str, Any]] = []
    for name, target_s in SIZES:
        workload = calibrated(name, target_s)
        seen: list[et.Event] = []
        with tempfile.TemporaryDirectory() as run_dir:
            loops = {
                "bare": workload.bare_loop,
                "trainer": trained(workload, run_dir, [], seen),
                "alerts": trained(workload, run_dir, [subs.Alerts(rules())], seen),
            }
            found = {"step": name, "rules": len(rules())} | compared(loops, pairs, seconds)
        if seen:
            raise SystemExit(f"{len(seen)} alerts were raised, expected none: the figures are not valid")
        figures.append(found)
        table.add_row(
            name,
            f"{found['bare_step_us']:.0f} us",
            f"{found['alerts_step_us']:.0f} us",
            f"{found['ratio_to_bare']:.3f}",
            " to ".join(f"{share:.3f}" for share in found["quartiles_to_bare"]),
            f"{found['ratio_to_trainer']:.3f}",
            " to ".join(f"{share:.3f}" for share in found["quartiles_to_trainer"]),
        )
    Console(width=120).print(table)
    if json is not None:
        write_json(json, "alert_rules", figures)


if __name__ == "__main__":
    typer.run(main)
