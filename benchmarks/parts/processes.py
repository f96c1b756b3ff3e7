"""Cost of the agreement of several processes, and how long a command takes there: two processes on the CPU.

The loop with the agreement is compared with the same loop without it, in which nothing has to be agreed on, and with
the bare jitted step. All three run in the same two processes, in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import on_processes
from benchmarks.figures import Budget, Figure, figure
from benchmarks.machine import Device

COUNT = 2


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the ratios and the latencies of two processes with a CPU device each, whatever ``device`` is."""
    seconds = Budget(budget_s).share(1) * 0.7
    program = [str(Path(on_processes.__file__)), f"{seconds:.0f}"]
    launch = ["-c", "from eventtrain.cli import app; app()", "launch", "-n", str(COUNT)]
    command = [sys.executable, *launch, *program]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=240
    )
    line = next(line for line in ended.stdout.splitlines() if line.startswith("[0] {"))
    found = json.loads(line.removeprefix("[0] "))
    step_ms = 1e3 * sorted(found["bare_s"])[len(found["bare_s"]) // 2]
    at = f"{COUNT} processes, {step_ms:.2g} ms"
    apart_us, agreed_us = ([1e6 * step_s for step_s, _ in found[loop]] for loop in ("apart", "agreed"))
    asked_us = [1e6 * asked_s for _, asked_s in found["agreed"]]
    return [
        figure("session", agreed_us, [1e6 * step_s for step_s in found["bare_s"]], at=at),
        figure("session, to one without agreement", agreed_us, apart_us, at=at, baseline="no agreement"),
        figure("CPU time of the agreement on the training thread", asked_us, at=at, unit="us/step"),
        figure("command to effect", found["command_ms"], at=at, unit="ms"),
        figure("command to effect, in steps", found["command_steps"], at=at, unit="steps"),
    ]
