"""Campaigns of many random trials: ``python -m benchmarks.faults [NAME ...] [--trials N]``.

A seed determines its trial. Each batch of trials appends one line to ``benchmarks/results/faults/NAME.jsonl``: the
seeds, the failures, counts, the machine and the versions. Seeds that are recorded there without a failure are not run
again, so an interrupted campaign continues, and failed seeds run again after a fix. The exit code is 1 if the last
trial of any seed failed, or if too few trials tested what they were meant to test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import pkgutil
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
"""First seed of a slice, which differs from the seeds of the campaign and of the test suite."""


def names() -> list[str]:
    """Returns the name of every campaign, which is a module of ``benchmarks.campaigns``."""
    return [module.name for module in pkgutil.iter_modules(campaigns.__path__)]


def load(name: str) -> Campaign:
    """Returns the campaign of this name; imports only its module."""
    return importlib.import_module(f"{campaigns.__name__}.{name}").CAMPAIGN


class Ledger:
    """Trials so far, one line per batch.

    Args:
        path: the file; None writes no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def append(self, line: dict[str, Any]) -> None:
        """Writes one batch at once, so that an interruption loses only the current batch."""
        self.lines.append(line)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def failures(self) -> dict[int, str]:
        """Seed -> failure, for each seed whose last trial failed."""
        failed: dict[int, str] = {}
        for line in self.lines:
            for seed in range(line["first_seed"], line["last_seed"] + 1):
                failed.pop(seed, None)
            failed |= {failure["seed"]: failure["what"] for failure in line["failures"]}
        return failed

    def missing(self, seeds: range) -> list[int]:
        """Returns those of ``seeds`` that were not tried, or that failed."""
        tried = {seed for line in self.lines for seed in range(line["first_seed"], line["last_seed"] + 1)}
        return sorted(set(seeds) - (tried - self.failures().keys()))

    def counts(self) -> Counter[str]:
        """The counts of all batches, including ``trials``."""
        total: Counter[str] = Counter()
        for line in self.lines:
            total.update(line["counts"])
        return total


FEWEST_JUDGED = 10
"""Number of trials from which on the least shares are checked."""


def run(campaign: Campaign, seeds: range, ledger: Ledger) -> bool:
    """Runs the trials that ``ledger`` lacks; returns whether no seed fails and every least share is reached."""
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
    """Runs the trials of ``seeds``; returns their line."""
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
        "revision": machine.revision(),
        "machine": machine.describe() | {package: version(package) for package in campaign.packages},
    }


def batches(seeds: Sequence[int], size: int) -> Iterator[range]:
    """Yields the seeds in order, in groups without a gap, of at most ``size``."""
    first = 0
    for index in range(1, len(seeds) + 1):
        if index == len(seeds) or index - first == size or seeds[index] != seeds[index - 1] + 1:
            yield range(seeds[first], seeds[index - 1] + 1)
            first = index


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all; known: {', '.join(names())}")
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="run the seeds 0 to N - 1; default: the number that the campaign defines",
    )
    parser.add_argument(
        "--slice", action="store_true", help="run a few other seeds and write no results, as in CI"
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"Unknown campaign: {', '.join(unknown)}. Known campaigns: {', '.join(names())}.")
    logger = logging.getLogger("eventtrain")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # faults are injected on purpose, so the warnings are expected
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
