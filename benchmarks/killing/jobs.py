"""Runs jobs in separate processes, and compares their results with an undisturbed run."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.killing.job import EPOCHS, RESULT, STEPS

LEFT_OUT = {"run_id", "time", "duration_s", "seq"}
"""Fields that may differ in a rerun."""


class Jobs:
    """The process that forks jobs (``benchmarks.killing.job``)."""

    def __init__(self) -> None:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.killing.job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def start(self, folder: Path, how: str = "fit") -> int:
        """Starts a job; returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{how} {folder}\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Returns the exit status of the job; negative if a signal ended it."""
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks jobs has died")
        return answer


@functools.cache
def jobs() -> Jobs:
    """Returns the one process for all trials."""
    made = Jobs()
    atexit.register(made.close)
    return made


class Undisturbed(NamedTuple):
    """Result of a run that is not killed."""

    result: dict[str, Any]
    rows: list[dict[str, Any]]
    took_s: float
    folder: Path
    """Its folder, which is removed at the end of this process."""


@functools.cache
def undisturbed(how: str = "fit") -> Undisturbed:
    """Returns the undisturbed run."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    folder, began_s = Path(made.name), time.monotonic()
    jobs().start(folder, how)
    require(jobs().wait() == 0, f"the undisturbed run failed: {error_of(folder)}")
    took_s = time.monotonic() - began_s
    return Undisturbed(json.loads((folder / RESULT).read_text()), rows(folder), took_s, folder)


def compare(folder: Path, how: str = "fit") -> None:
    """Lets the job in ``folder`` run to its end, and compares it with the undisturbed one.

    Raises:
        AssertionError: it did not end, or it ended differently.
    """
    expected = undisturbed(how)
    jobs().start(folder, how)
    require(jobs().wait() == 0, f"the resumed run failed: {error_of(folder)}")
    reached, found = json.loads((folder / RESULT).read_text()), rows(folder)
    require(reached == expected.result, f"it reached {reached}, and the undisturbed run {expected.result}")
    steps = [row["step"] for row in found if row["kind"] == "step_completed"]
    require(steps == list(range(1, EPOCHS * STEPS + 1)), f"rows of the steps are {steps}")
    require(found == expected.rows, "the log differs from the undisturbed run's")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the log without the fields that a rerun need not repeat. A torn row is an error."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in LEFT_OUT} for line in lines]


def error_of(folder: Path) -> str:
    """Returns the output of the job."""
    path = folder / "error.txt"
    return path.read_text() if path.exists() else "no message"


def require(holds: bool, message: str) -> None:
    """Raises AssertionError unless the condition holds, also under ``-O``."""
    if not holds:
        raise AssertionError(message)
