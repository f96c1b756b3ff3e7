"""Runs jobs in separate processes, and compares their results with an undisturbed run."""

from __future__ import annotations

import atexit
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.killing.fork_server import ForkServer
from benchmarks.killing.job import RESULT

LOG = "events.jsonl"
LEFT_OUT = {"run_id", "attempt", "time", "duration_s", "seq"}
"""Fields that may differ in a rerun."""


class Jobs(ForkServer):
    """The process that forks jobs (``benchmarks.killing.job``)."""

    def __init__(self) -> None:
        super().__init__("benchmarks.killing.job", {}, quiet=True)

    def start(self, folder: Path, how: str = "fit") -> int:
        """Starts a job; returns its process id."""
        return self.ask(f"{how} {folder}")

    def wait(self) -> int:
        """Returns the exit status of the job; negative if a signal ended it."""
        return self.answer()


@functools.cache
def jobs() -> Jobs:
    """Returns the one process for all trials."""
    made = Jobs()
    atexit.register(made.close)
    return made


class Undisturbed(NamedTuple):
    """Result of a run to which nothing happens."""

    result: dict[str, Any]
    rows: list[dict[str, Any]]
    took_s: float
    folder: Path
    """Its folder, which is removed at the end of this process."""

    def require_same(self, reached: dict[str, Any], found: list[dict[str, Any]]) -> None:
        """Raises AssertionError unless another run has reached the same result, with the same rows."""
        require(reached == self.result, f"it reached {reached}, and the undisturbed run {self.result}")
        steps = [row["step"] for row in found if row["kind"] == "step_completed"]
        expected = [row["step"] for row in self.rows if row["kind"] == "step_completed"]
        require(steps == expected, f"rows of the steps are {steps}")
        require(found == self.rows, "the log differs from the undisturbed run's")


@functools.cache
def undisturbed(how: str = "fit") -> Undisturbed:
    """Returns the undisturbed run."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    folder, began_s = Path(made.name), time.monotonic()
    jobs().start(folder, how)
    require(jobs().wait() == 0, f"the undisturbed run failed: {error_of(folder)}")
    took_s = time.monotonic() - began_s
    return Undisturbed(json.loads((folder / RESULT).read_text()), rows(folder / LOG), took_s, folder)


def compare(folder: Path, how: str = "fit") -> None:
    """Lets the job in ``folder`` run to its end, and compares it with the undisturbed one.

    Raises:
        AssertionError: it did not end, or it ended differently.
    """
    expected = undisturbed(how)
    jobs().start(folder, how)
    require(jobs().wait() == 0, f"the resumed run failed: {error_of(folder)}")
    expected.require_same(json.loads((folder / RESULT).read_text()), rows(folder / LOG))


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns a log without the fields that a rerun need not repeat. A torn row is an error."""
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in LEFT_OUT} for line in lines]


def error_of(folder: Path) -> str:
    """Returns the output of the job."""
    path = folder / "error.txt"
    return path.read_text() if path.exists() else "no message"


def require(holds: bool, message: str) -> None:
    """Raises AssertionError unless the condition holds, also under ``-O``."""
    if not holds:
        raise AssertionError(message)
