"""Campaigns of many random trials: ``python -m benchmarks.faults [NAME ...] [--trials N]``.

Every trial follows from its seed. Each batch of trials appends one line to ``benchmarks/results/faults/NAME.jsonl``:
the seeds, what failed, counts, the machine and the versions. Seeds that stand there without a failure are not run
again, so an interrupted campaign goes on where it was, and failures are tried anew once they are mended. Ends with 1 if
the last trial of any seed failed, or if too few trials tested what they were meant to.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import pkgutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import campaigns, machine
from benchmarks.campaign import Campaign

RESULTS = Path(__file__).parent / "results" / "faults"
SLICE_FROM = 1_000_000
"""First seed of a slice: other trials than those of the whole campaign and of the test suite."""


def names() -> list[str]:
    """Every campaign: the modules of ``benchmarks.campaigns``."""
    return [module.name for module in pkgutil.iter_modules(campaigns.__path__)]


def load(name: str) -> Campaign:
    """The campaign of this name; imports what only that one needs."""
    return importlib.import_module(f"{campaigns.__name__}.{name}").CAMPAIGN


class Ledger:
    """What was tried so far, one line for each batch.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def append(self, line: dict[str, Any]) -> None:
        """Keep one batch, at once: an interruption costs no more than the batch it hits."""
        self.lines.append(line)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def failures(self) -> dict[int, str]:
        """Seed -> what failed, of those whose last trial failed."""
        failed: dict[int, str] = {}
        for line in self.lines:
            for seed in range(line["first_seed"], line["last_seed"] + 1):
                failed.pop(seed, None)
            failed |= {failure["seed"]: failure["what"] for failure in line["failures"]}
        return failed

    def missing(self, seeds: range) -> list[int]:
        """Those of ``seeds`` that were not tried, or failed."""
        tried = {seed for line in self.lines for seed in range(line["first_seed"], line["last_seed"] + 1)}
        return sorted(set(seeds) - (tried - self.failures().keys()))

    def counts(self) -> Counter[str]:
        """The counts of all batches, ``trials`` among them."""
        total: Counter[str] = Counter()
        for line in self.lines:
            total.update(line["counts"])
        return total


FEWEST_JUDGED = 10
"""Trials below which a share is chance, and no least share is asked for."""


def run(campaign: Campaign, seeds: range, ledger: Ledger) -> bool:
    """Run the trials that ``ledger`` lacks; true if no seed fails and every least share is reached."""
    missing = ledger.missing(seeds)
    print(f"{campaign.name}: {len(missing)} of {len(seeds)} trials to run", flush=True)
    began_s, done = time.monotonic(), 0
    for batch in batches(missing, campaign.batch):
        ledger.append(run_batch(campaign, batch))
        done += len(batch)
        took_s = time.monotonic() - began_s
        print(f"{campaign.name}: {done} done, {len(ledger.failures())} fail, {took_s:.0f} s", flush=True)
    failures = {seed: what for seed, what in ledger.failures().items() if seed in seeds}
    for seed, what in failures.items():
        print(f"{campaign.name}: seed {seed}: {what}")
    counts = ledger.counts()
    judged = campaign.least if counts["trials"] >= FEWEST_JUDGED else {}
    short = {name: share for name, share in judged.items() if counts[name] < share * counts["trials"]}
    for name, share in short.items():
        print(
            f"{campaign.name}: {name} in {counts[name]} of {counts['trials']} trials, less than {share:.0%}"
        )
    print(f"{campaign.name}: {dict(counts)}, {len(failures)} fail")
    return not failures and not short


def run_batch(campaign: Campaign, seeds: range) -> dict[str, Any]:
    """Run the trials of ``seeds``; their line."""
    began_s = time.monotonic()
    counts: Counter[str] = Counter(trials=len(seeds))
    failures: list[dict[str, Any]] = []
    for seed in seeds:
        try:
            counts.update(campaign.trial(seed))
        except Exception as error:
            failures.append({"seed": seed, "what": f"{type(error).__name__}: {error}"})
    return {
        "campaign": campaign.name,
        "first_seed": seeds[0],
        "last_seed": seeds[-1],
        "failures": failures,
        "counts": dict(counts),
        "duration_s": round(time.monotonic() - began_s, 2),
        "date": datetime.now(UTC).date().isoformat(),
        "revision": revision(),
        "machine": machine.describe() | {package: version(package) for package in campaign.packages},
    }


def batches(seeds: Sequence[int], size: int) -> Iterator[range]:
    """Seeds in order, in runs without a gap, of at most ``size``."""
    first = 0
    for index in range(1, len(seeds) + 1):
        if index == len(seeds) or index - first == size or seeds[index] != seeds[index - 1] + 1:
            yield range(seeds[first], seeds[index - 1] + 1)
            first = index


def revision() -> str:
    """The commit that was tested; ``-dirty`` behind it where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "no checkout"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all of them by default: {', '.join(names())}"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="seeds 0 to N - 1; else as many as it is defined with"
    )
    parser.add_argument(
        "--slice", action="store_true", help="a few other trials, of which nothing is kept: for CI"
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"There is no campaign {', '.join(unknown)}; there are {', '.join(names())}.")
    logger = logging.getLogger("eventtrain")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # faults are what these are about
    passed = True
    try:
        for name in options.names or names():
            campaign = load(name)
            if options.slice:
                seeds = range(SLICE_FROM, SLICE_FROM + (options.trials or campaign.slice))
            else:
                seeds = range(options.trials or campaign.trials)
            passed &= run(campaign, seeds, Ledger(None if options.slice else RESULTS / f"{name}.jsonl"))
    finally:
        logger.setLevel(level)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
