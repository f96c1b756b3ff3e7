"""SIGTERM while compiling, in an epoch, in an evaluation, in a service: commit, clean exit, exact resume."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.campaign import Campaign
from benchmarks.killing.jobs import LOG, compare, error_of, jobs, require, rows

PHASES = ("compile", "epoch", "eval", "service")
GRACE_S = 15.0
"""Grace period, at most that of a typical cluster."""


def trial(seed: int) -> Mapping[str, int]:
    """Terminates one run.

    Raises:
        AssertionError: it did not exit cleanly in time, saved no checkpoint, or did not resume exactly.
    """
    phase, rng = PHASES[seed % len(PHASES)], random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = jobs().start(folder, "service" if phase == "service" else "fit")
        mark = folder / f"reached-{'epoch' if phase == 'service' else phase}"
        deadline_s = time.monotonic() + 60
        while not mark.exists():
            require(time.monotonic() < deadline_s, f"the job never reached {mark.name}: {error_of(folder)}")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process, signal.SIGTERM)
        began_s = time.monotonic()
        status = jobs().wait()
        took_s = time.monotonic() - began_s
        wanted = {0, -signal.SIGTERM} if phase == "service" else {128 + signal.SIGTERM}
        require(status in wanted, f"in {phase} it ended with {status}: {error_of(folder)}")
        require(took_s < GRACE_S, f"in {phase} it took {took_s:.1f} s to end")
        last = rows(folder / LOG)[-1]
        require(
            (last["kind"], last["reason"]) == ("run_completed", "preempted"),
            f"in {phase} it ended with {last}",
        )
        saved = sorted((folder / "checkpoints").glob("step-*"))
        require(
            bool(saved) and int(saved[-1].name.split("-")[1]) == last["step"], f"in {phase} it saved {saved}"
        )
        compare(folder)
    return {phase: 1}


CAMPAIGN = Campaign(
    name="sigterm", trial=trial, trials=80, slice=4, batch=20, packages=("orbax-checkpoint", "uvicorn")
)
