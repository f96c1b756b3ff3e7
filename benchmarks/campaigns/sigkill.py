"""SIGKILL at random moments: the job resumes from its newest checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.campaign import Campaign
from benchmarks.killing.job import RESULT
from benchmarks.killing.jobs import compare, error_of, jobs, require, undisturbed


def trial(seed: int) -> Mapping[str, int]:
    """Kill a run one to three times, let it end, compare.

    Raises:
        AssertionError: it did not end, or not as the undisturbed one.
    """
    took_s = undisturbed()[2]
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rng.choice([1, 1, 2, 3])):
            while (
                phase := kill(folder, rng, took_s)
            ) == "too_late":  # it had ended: begin anew, and kill sooner
                counts["too_late"] += 1
                took_s *= 0.7
                shutil.rmtree(folder)
                folder.mkdir()
            counts[phase] += 1
        compare(folder)
        counts["tails_kept"] = len(list(folder.glob("events.jsonl.cut-*")))
        counts["torn_rows"] = len(list(folder.glob("events.jsonl.torn")))
    counts["kills"] = counts["in_save"] + counts["between_saves"] + counts["before_first_save"]
    return counts


def kill(folder: Path, rng: random.Random, took_s: float) -> str:
    """Start the job, kill it at a random moment, every other time inside a save; the phase that was hit."""
    process, began_s = jobs().start(folder), time.monotonic()
    wanted_s = rng.uniform(0.2, 1.0) * took_s
    in_save = rng.random() < 0.5
    while time.monotonic() - began_s < 3 * took_s:
        saving = any((folder / "checkpoints").glob(".tmp-*"))
        if (folder / RESULT).exists() or (time.monotonic() - began_s >= wanted_s and (saving or not in_save)):
            break
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.003))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = jobs().wait()
    if status == 0:
        return "too_late"
    require(status == -signal.SIGKILL, f"the job failed before it was killed: {error_of(folder)}")
    if any((folder / "checkpoints").glob(".tmp-*")):
        return "in_save"
    return "between_saves" if any((folder / "checkpoints").glob("step-*")) else "before_first_save"


CAMPAIGN = Campaign(
    name="sigkill",
    trial=trial,
    trials=500,
    slice=4,
    batch=25,
    least={"in_save": 0.2},
    packages=("orbax-checkpoint",),
)
