"""SIGKILL at random moments of a job with every file logger: each step is logged once, and cut-off rows are kept."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.campaign import Campaign
from benchmarks.campaigns.sigkill import SAVING, kill_some
from benchmarks.killing.files import LOGS, PART, UNFINISHED, Kept, check_logs, tails
from benchmarks.killing.jobs import compare

SAVED = "checkpoints/step-*"
AIMS = ((SAVING,), (SAVED, PART), (SAVED,), ())
"""File patterns that must exist at a kill: a quarter should hit a save, a quarter the writing of a part after it."""


def trial(seed: int) -> Mapping[str, int]:
    """Kills a run one to three times, lets it end, and checks its files after each kill and at the end.

    Raises:
        AssertionError: a row is lost, duplicated or torn, or differs from that of the undisturbed run.
    """
    counts: Counter[str] = Counter()

    def look(folder: Path, earlier: list[Kept]) -> Kept:
        counts["in_write"] += any(path for pattern in UNFINISHED for path in folder.glob(pattern))
        for last in earlier[-1:]:
            last.check(folder)
        return Kept(folder)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = kill_some(folder, random.Random(seed), counts, "files", look, AIMS)
        compare(folder, "files")
        kept[-1].check(folder)
        check_logs(folder)
        for log in LOGS:
            counts[f"tails_kept {log}"] = len(tails(folder, log))
            counts[f"torn {log}"] = len(list(folder.glob(f"{log}.torn")))
    return counts


CAMPAIGN = Campaign(
    name="sigkill_files",
    trial=trial,
    trials=60,
    slice=2,
    batch=10,
    least={"in_save": 0.2, "in_write": 0.2},
    packages=("orbax-checkpoint", "pyarrow", "tensorboard", "tensorboardX"),
)
