"""Growth of memory behind a stalled subscriber: RSS after 10^6 events minus RSS after 10^5.

Each kind of queue is measured in a separate process, with a subscriber that hangs in its first event. At the limit of a
Lossless queue the publisher receives QueueFull, which is counted.

    python -m benchmarks.memory [--json PATH]
"""

from __future__ import annotations

import json as json_module
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json

FIRST, SECOND = 100_000, 1_000_000
LIMIT_MIB = 5.0
QUEUES: dict[str, et.Queue] = {
    "Lossless": et.Lossless(limit=10_000),
    "KeepLatest": et.KeepLatest(),
    "DropOldest": et.DropOldest(10_000),
    "DropNewest": et.DropNewest(10_000),
}
PUBLISHED_TOGETHER = 100


class Ping(et.Event):
    number: int = 0


def resident_mib() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # other systems report only the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


async def measure(queue: et.Queue) -> dict[str, Any]:
    """Publishes to a stalled subscriber; returns the resident memory, and the refused, dropped and waiting events."""
    refused = 0
    figures: dict[str, Any] = {}
    bus = et.EventBus()
    async with anyio.create_task_group() as tasks:
        stop = anyio.Event()

        async def serve() -> None:
            async with bus.serve():
                await stop.wait()

        tasks.start_soon(serve)
        while not bus.running:
            await anyio.lowlevel.checkpoint()

        async def hang(event: Ping) -> None:
            await anyio.sleep_forever()

        stalled = bus.subscribe(Ping, hang, queue=queue)
        for number in range(1, SECOND + 1):
            try:
                bus.publish(Ping(number=number))
            except et.QueueFull:
                refused += 1
            if number % PUBLISHED_TOGETHER == 0:
                await anyio.lowlevel.checkpoint()
            if number == FIRST:
                figures["rss_first_mib"] = resident_mib()
        figures["rss_growth_mib"] = resident_mib() - figures["rss_first_mib"]
        statistics = stalled.statistics()
        figures |= {"refused": refused, "dropped": statistics.dropped, "pending": statistics.pending}
        figures["accounted"] = refused + statistics.dropped + statistics.pending + statistics.delivered
        stop.set()
    return figures


def measure_apart(name: str) -> dict[str, Any]:
    """Measures one kind of queue in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--only", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json_module.loads(done.stdout)


def main(
    json: Annotated[Path | None, typer.Option(help="file to write the figures to")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every kind of queue and prints the table."""
    if only is not None:
        print(json_module.dumps(anyio.run(measure, QUEUES[only])))
        return
    figures = {name: measure_apart(name) for name in QUEUES}
    table = Table(
        title=f"RSS({SECOND:,} events) - RSS({FIRST:,}) behind a stalled subscriber, limit {LIMIT_MIB:g} MiB"
    )
    for column in ("queue", "growth, MiB", "refused", "dropped", "pending"):
        table.add_column(column, justify="left" if column == "queue" else "right")
    for name, row in figures.items():
        assert row["accounted"] == SECOND, f"{name}: {SECOND - row['accounted']} events are unaccounted for"
        table.add_row(
            name,
            f"{row['rss_growth_mib']:.2f}",
            *(f"{row[key]:,}" for key in ("refused", "dropped", "pending")),
        )
    Console().print(table)
    if json is not None:
        write_json(json, "memory", figures)
    worst = max(row["rss_growth_mib"] for row in figures.values())
    raise typer.Exit(code=int(worst > LIMIT_MIB))


if __name__ == "__main__":
    typer.run(main)
