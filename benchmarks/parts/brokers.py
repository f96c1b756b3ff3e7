"""Cost of sending events to NATS: CPU time per event, and the loop beside it. With a server on this machine.

The CPU time is that of the training process: of its event loop, and of the thread that sends. The server is another
process; on the cores that are left, it does not slow the loop.
"""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any, Literal

import anyio

import eventtrain as et
from benchmarks.figures import Budget, Figure, absent, compared_loops, figure
from benchmarks.machine import Device
from benchmarks.parts.log_files import ROWS, make_windows
from benchmarks.parts.loop import Observers, observed
from benchmarks.workloads import calibrated, fits
from eventtrain import subscribers as subs
from eventtrain.bus.step_series import StepColumns, StepSeries

TARGET_S = 0.7e-3
STEPS: tuple[Literal["each", "windows"], ...] = ("each", "windows")
CPU = {
    "each": "CPU time to send each step",
    "windows": "CPU time to send windows of 512 steps",
}


@contextmanager
def server() -> Generator[str]:
    """Yields the URL of a nats-server with JetStream. Raises FileNotFoundError if there is no such program."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        program = shutil.which("nats-server")
        if program is None:
            raise FileNotFoundError("nats-server is not installed")
        command = [program, "--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                ends_s = monotonic() + 20
                while monotonic() < ends_s:
                    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                        break
                    sleep(0.02)
                yield f"nats://127.0.0.1:{port}"
            finally:
                process.terminate()


async def send(
    url: str, steps: Literal["each", "windows"], stream: str, folder: Path, windows: list[Any]
) -> float:
    """Returns the CPU seconds of this process until the server has every event of ``windows``."""
    logger = subs.NATSEvents(url, steps=steps, limit=10**7, stream=stream, finish_timeout_s=60.0)
    control: Any = None
    await logger.start(et.RunContext("run", folder, control, lambda event: None))
    began_s = process_time()
    for window in windows:
        if steps == "each":
            await logger.handle_series(window)
        else:
            await logger.handle(window)
        await anyio.lowlevel.checkpoint()
    await logger.stop()
    took_s = process_time() - began_s
    if logger.statistics.sent != ROWS:
        raise AssertionError(f"The server has {logger.statistics.sent} of {ROWS} events.")
    return took_s


def series_of(window: et.StepsCompleted) -> StepSeries:
    """Returns the events of the steps of ``window``, as the bus hands them to a subscriber that takes them whole."""
    steps = range(window.first_step, window.last_step + 1)
    columns = StepColumns(window.first_step, window.first_batch, window.epoch, window.metrics)
    return StepSeries(
        columns, steps, steps, window.time, window.run_id, window.attempt, build=lambda steps: []
    )


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the microseconds of CPU per event, and the time per step in the loop."""
    logging.disable(logging.CRITICAL)
    budget, found = Budget(budget_s), list[Figure]()
    windows = make_windows()
    try:
        with server() as url, tempfile.TemporaryDirectory() as folder:
            for steps in STEPS:
                given = [series_of(window) for window in windows] if steps == "each" else windows
                took_s = [
                    anyio.run(send, url, steps, f"{steps}-{run}", Path(folder), given)
                    for run in range(2 if quick else 6)
                ]
                found.append(figure(CPU[steps], [1e6 * s / ROWS for s in took_s[1:]], unit="us/step"))
            workload = calibrated(TARGET_S)
            if fits(workload, TARGET_S):
                sending = Observers([subs.NATSEvents(url, steps="each", limit=10**7, stream="loop")])
                with observed(workload, sending) as ours, observed(workload, Observers()) as without:
                    found.append(
                        compared_loops(
                            "loop with NATSEvents, each step",
                            ours,
                            without,
                            workload.step_s,
                            budget.share(1),
                            at=workload.name,
                            baseline="no subscriber",
                        )
                    )
    except (FileNotFoundError, ImportError) as error:
        found.append(absent("NATSEvents", error))
    return found
