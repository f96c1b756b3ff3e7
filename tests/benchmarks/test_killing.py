"""Runs in processes of their own that are killed or terminated, and go on as if nothing had happened.

A slice of the campaigns ``sigkill``, ``sigkill_files`` and ``sigterm`` (``make faults``), with seeds of its own.
"""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.campaigns import sigkill, sigkill_files, sigterm
from benchmarks.killing.files import LOGS

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.allow_blocking]

FIRST_SEED = 2_000_000


@pytest.mark.parametrize("half", [0, 1])
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one_with_one_row_for_each_step(
    half: int,
) -> None:
    counts: Counter[str] = Counter()
    for seed in range(FIRST_SEED + 5 * half, FIRST_SEED + 5 * (half + 1)):
        counts.update(sigkill.trial(seed))
    assert counts["kills"] >= 6
    assert counts["in_save"] >= counts["kills"] / 5
    assert counts["tails_kept"] > 0


def test_every_log_of_a_killed_run_has_each_step_once_and_what_was_cut_off_beside() -> None:
    counts: Counter[str] = Counter()
    for seed in (FIRST_SEED + 10, FIRST_SEED + 11):
        counts.update(sigkill_files.trial(seed))
    assert counts["kills"] >= 4
    assert all(
        counts[f"tails_kept {log}"] > 0 for log in LOGS if log != "epochs.csv"
    )  # few rows: not at each kill


@pytest.mark.parametrize("phase", range(len(sigterm.PHASES)), ids=sigterm.PHASES)
def test_a_terminated_run_commits_ends_cleanly_and_goes_on_exactly(phase: int) -> None:
    assert FIRST_SEED % len(sigterm.PHASES) == 0
    assert sigterm.trial(FIRST_SEED + phase) == {sigterm.PHASES[phase]: 1}
