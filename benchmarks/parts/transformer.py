"""A bfloat16 transformer that fills the device, with all sinks and with checkpoints, against the bare jitted loop."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax

from benchmarks.figures import Budget, Figure, compared_loops
from benchmarks.machine import Device
from benchmarks.parts.loop import CASES, Observers, observed
from benchmarks.workloads import TRANSFORMERS, Workload, calibrated, transformer
from eventtrain import subscribers as subs

EVERY = 20
"""Steps between two checkpoints."""


def with_checkpoints() -> Observers:
    sinks = CASES["all sinks"]()
    checkpointer = subs.Checkpointer("checkpoints", every=EVERY, max_to_keep=1, at_end=False)
    return replace(sinks, subscribers=[*sinks.subscribers, checkpointer])


def tera_operations(workload: Workload) -> float:
    """Returns 10^12 floating-point operations per second of the bare step, as XLA counts them."""
    compiled = jax.jit(workload.step_fn).lower(workload.state, workload.batches[0]).compile()
    return (compiled.cost_analysis() or {}).get("flops", 0.0) / workload.step_s / 1e12


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the time per step without subscribers, with all sinks, and with checkpoints as well."""
    logging.disable(logging.CRITICAL)
    budget = Budget(budget_s)
    target_s = 0.02 if quick and not device.accelerator else 0.1
    workload = calibrated(target_s, transformer, TRANSFORMERS)
    at = f"{sum(leaf.size for leaf in jax.tree.leaves(workload.state['params'])) / 1e6:.3g} M parameters"
    found = [Figure("bare loop", at, "us", round(1e6 * workload.step_s, 1))]
    if not quick:
        found.append(Figure("bare loop: speed", at, "TFLOP/s", float(f"{tera_operations(workload):.3g}")))
    cases = {
        "no subscriber": CASES["no subscriber"],
        **({} if quick else {"all sinks": CASES["all sinks"]}),
        f"all sinks, a checkpoint every {EVERY} steps": with_checkpoints,
    }
    for index, (name, make) in enumerate(cases.items()):
        share_s = budget.share(len(cases) - index)
        with observed(workload, make()) as loop:
            found.append(compared_loops(name, loop, workload.bare_loop, workload.step_s, share_s, at=at))
    return found
