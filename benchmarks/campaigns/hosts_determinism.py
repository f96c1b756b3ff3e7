"""Commands without a lag, from handlers with random delays in both processes: each process applies the same ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.campaign import Campaign
from benchmarks.killing.hosts import START_S, server
from benchmarks.killing.hosts_job import OWN_LOG, RESULT
from benchmarks.killing.jobs import require, rows


def trial(seed: int) -> Mapping[str, int]:
    """Runs the job with delayed commands of both processes.

    Raises:
        AssertionError: the processes ended with different states or logs, or one of them sent no command.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = server().start(folder, delays=True)
        ends = job.wait(START_S)
        require([end.status for end in ends] == [0, 0], f"it ended with {ends} {job.output()}")
        logs, states = [logs_of(folder, index) for index in range(2)], states_of(folder)
    require(states[0] == states[1], f"the states differ: {states}")
    require(logs[0] == logs[1], "the logs differ")
    commands = [row["command"] for row in logs[0] if row["kind"] == "command_applied"]
    free = [command["kind"] for command in commands if command["due"] is None]
    require({"scale_hyperparam", "set_hyperparam"} <= set(free), f"only one process sent commands: {free}")
    return {"commands": len(free)}


def differs_alone() -> bool:
    """Runs the same where each process applies its own commands. Returns whether the states differ, or it hangs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = server().start(folder, delays=True, alone=True)
        try:
            ends = job.wait(START_S)
        except AssertionError:
            return True
        require([end.status for end in ends] == [0, 0], f"it ended with {ends} {job.output()}")
        states = states_of(folder)
    return states[0] != states[1]


def states_of(folder: Path) -> list[Any]:
    """Returns the result of each process."""
    return [json.loads((folder / RESULT.format(index)).read_text()) for index in range(2)]


def logs_of(folder: Path, index: int) -> list[dict[str, Any]]:
    """Returns the training sequence of one process, with every command. Only the owner of a command knows its cause."""
    return [
        row | {"command": {**row["command"], "cause": None}} if "command" in row else {**row, "cause": None}
        for row in rows(folder / OWN_LOG.format(index))
        if row["kind"] not in ("checkpoint_failed", "peer_lost")
    ]


CAMPAIGN = Campaign(name="hosts_determinism", trial=trial, trials=100, slice=1, batch=10)
