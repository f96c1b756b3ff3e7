"""SIGKILL at random moments: the job resumes from its newest checkpoint and ends like an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.campaign import Campaign
from benchmarks.killing.job import RESULT
from benchmarks.killing.jobs import compare, error_of, jobs, require, undisturbed

Look: TypeAlias = Callable[[Path, list[Any]], Any]
Aims: TypeAlias = tuple[tuple[str, ...], ...]
SAVING = "checkpoints/.tmp-*"
AIMS: Aims = ((SAVING,), ())
"""File patterns that must exist at a kill, one chosen at random: every second kill should hit a save."""


def trial(seed: int) -> Mapping[str, int]:
    """Kills a run one to three times, lets it end, and compares it with the undisturbed run.

    Raises:
        AssertionError: it did not end, or it ended differently.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kill_some(folder, random.Random(seed), counts)
        compare(folder)
        counts["tails_kept"] = len(list(folder.glob("events.jsonl.cut-*")))
        counts["torn_rows"] = len(list(folder.glob("events.jsonl.torn")))
    return counts


def kill_some(
    folder: Path,
    rng: random.Random,
    counts: Counter[str],
    how: str = "fit",
    look: Look | None = None,
    aims: Aims = AIMS,
) -> list[Any]:
    """Starts the job and kills it, one to three times. Counts the phases in which it was killed.

    Returns:
        The results of ``look`` after each kill; it is called with the folder and its previous results.
    """
    took_s, seen = undisturbed(how).took_s, list[Any]()
    for _ in range(rng.choice([1, 1, 2, 3])):
        while (
            phase := kill(folder, rng, took_s, how, aims)
        ) == "too_late":  # start again from scratch, and kill sooner
            counts["too_late"] += 1
            took_s *= 0.7
            shutil.rmtree(folder)
            folder.mkdir()
            seen.clear()
        counts[phase] += 1
        counts["kills"] += 1
        if look is not None:
            seen.append(look(folder, seen))
    return seen


def kill(folder: Path, rng: random.Random, took_s: float, how: str = "fit", aims: Aims = AIMS) -> str:
    """Starts the job and kills it at a random moment after the files of an aim exist; returns the phase."""
    process, began_s = jobs().start(folder, how), time.monotonic()
    wanted_s = rng.uniform(0.2, 1.0) * took_s
    aim = aims[int(rng.random() * len(aims))]
    while time.monotonic() - began_s < 3 * took_s:
        hit = all(any(folder.glob(pattern)) for pattern in aim)
        if (folder / RESULT).exists() or (time.monotonic() - began_s >= wanted_s and hit):
            break
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.003) if aim in AIMS else 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    status = jobs().wait()
    if status == 0:
        return "too_late"
    require(status == -signal.SIGKILL, f"the job failed before it was killed: {error_of(folder)}")
    if any(folder.glob(SAVING)):
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
