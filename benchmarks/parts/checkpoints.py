"""Checkpoints of 0.1, 1 and 8 GB: the stall of the steps around them, their commit, and the total time.

``benchmarks/checkpoint_stall.py`` measures each size: a run without checkpoints, one with a ``Checkpointer``, and the
bare loop that calls Orbax, asynchronously and synchronously, in alternating order. ``benchmarks/checkpoint_commit.py``
measures how long each takes until its checkpoint is committed, while nothing is trained.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import (  # before JAX starts its backend: sets the number of its threads
    checkpoint_commit,
    checkpoint_stall,
)
from benchmarks.figures import Budget, Figure, absent, spread
from benchmarks.machine import Device, host_memory_bytes

MEGABYTES = (100, 1000, 8000)
STATES_ON_DEVICE = 4
"""States held at once: the given one, that of the run, the kept one, and one that is being computed."""
STATES_ON_HOST = 2
"""Copies of the state that are being written."""
WAYS = {
    "eventtrain": "Checkpointer",
    "orbax async": "Orbax, asynchronous",
    "orbax sync": "Orbax, synchronous",
}


def too_large(device: Device, megabytes: int) -> str:
    """Returns why this size cannot be measured here; empty if it can."""
    on_device, on_host = STATES_ON_DEVICE * megabytes * 10**6, STATES_ON_HOST * megabytes * 10**6
    if not device.accelerator:
        on_device, on_host = 0, on_device + on_host
    needs = {
        "memory of the device": (on_device, device.memory_bytes),
        "memory of the host": (on_host, host_memory_bytes()),
        "room in the temporary folder": (
            4 * megabytes * 10**6,
            shutil.disk_usage(tempfile.gettempdir()).free,
        ),
    }
    short = [
        f"needs {needed / 1e9:.0f} GB {what}, {there / 1e9:.0f} GB are free"
        for what, (needed, there) in needs.items()
        if needed > there
    ]
    return "; ".join(short)


def written_by(measure: Callable[..., None], **options: Any) -> dict[str, Any]:
    """Returns the figures that ``main`` of one of the two modules writes."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder) / "figures.json"
        measure(**options, json=path)
        return json.loads(path.read_text())["figures"]


def of_size(at: str, found: dict[str, Any]) -> Iterator[Figure]:
    """Yields the figures of one size, each way against the run without checkpoints."""

    def plain(case: str, unit: str, value: float) -> Figure:
        return Figure(case, at, unit, value, pairs=found["pairs"])

    yield plain("step without checkpoints", "ms", found["none"]["median_step_ms"])
    for way, name in WAYS.items():
        row = found[way]
        total, quartiles = spread(row["totals_to_none"])
        yield replace(
            plain(f"{name}: all steps", "x", total),
            quartiles=quartiles,
            baseline="no checkpoints",
            ratio=total,
            ratio_quartiles=quartiles,
        )
        yield plain(f"{name}: slowest step / median step", "x", row["slowest_to_median"])
        for key, value in row.items():
            if key.endswith("_s") and isinstance(value, int | float):
                what = (
                    "still writing after the last step" if key == "afterwards_s" else key.removesuffix("_s")
                )
                yield plain(f"{name}: {what.replace('_', ' ')}", "s", value)


def commits(at: str, found: dict[str, Any]) -> Iterator[Figure]:
    """Yields the time of a commit of one size, against each way of Orbax."""
    for way, name in WAYS.items():
        row, rounds = found[way], found["rounds"]
        yield Figure(f"{name}: commit", at, "s", row["seconds"], pairs=rounds)
        if way != "eventtrain":
            ratio, quartiles = row["eventtrain_to_this"], row["quartiles"]
            case = f"commit of Checkpointer / {name}"
            yield Figure(case, at, "x", ratio, quartiles, name, ratio, quartiles, rounds)


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the stall and the time of checkpoints of each size that has room here."""
    budget, found = Budget(budget_s), list[Figure]()
    sizes = MEGABYTES[:1] if quick else MEGABYTES
    steps, took_s = (12 if quick else 20), 0.0
    for index, megabytes in enumerate(sizes):
        at = f"{megabytes / 1000:g} GB"
        reason = too_large(device, megabytes)
        left_s = budget.share(1)
        if not reason and took_s * megabytes / sizes[index - 1] > left_s:
            reason = (
                f"would take about {took_s * megabytes / sizes[index - 1]:.0f} s of the {left_s:.0f} s left"
            )
        if reason:
            found.append(absent("all of this size", reason, at=at))
            continue
        began_s = monotonic()
        stalls = written_by(checkpoint_stall.main, megabytes=megabytes, steps=steps, pairs=1)
        took_s = monotonic() - began_s
        pairs = min(7, int(budget.share(len(sizes) - index) / 2 / took_s))
        if pairs > 1:
            stalls = written_by(checkpoint_stall.main, megabytes=megabytes, steps=steps, pairs=pairs)
        found += of_size(at, stalls)
        found += commits(at, written_by(checkpoint_commit.main, megabytes=megabytes, rounds=3))
    return found
