"""A slice of the campaign that delays every decider at random, and that its run is worth being delayed."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.campaigns.determinism import CAMPAIGN, policies, run, undisturbed

FIRST_SEED, TRIALS = 2_000_000, 4
"""Other seeds than those of the campaign and of its slice in CI."""


@pytest.mark.slow
@pytest.mark.faults
def test_random_delays_and_load_change_the_order_of_arrival_but_neither_commands_nor_final_state() -> None:
    total: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + TRIALS):
        total.update(CAMPAIGN.trial(seed))
    assert total["on_asyncio"] == total["on_trio"] == TRIALS / 2
    assert total["commands"] == TRIALS * sum(
        '"command_applied"' in event for event in undisturbed(True).sequence
    )
    for name, share in CAMPAIGN.least.items():
        assert total[name] >= share * TRIALS, name


def test_in_its_run_every_policy_decides_and_one_ends_it() -> None:
    outcome = undisturbed(True)
    deciders = {decider.name or type(decider).__name__ for decider in policies()}
    assert {subscriber for subscriber, _, _ in outcome.arrivals} == deciders
    assert outcome.end.reason.startswith("early stopping")
    assert outcome.end.deterministic
    assert any('"command_conflict"' in event for event in outcome.sequence)
    assert any('"kind":"restore"' in event for event in outcome.sequence)


def test_without_lags_the_run_says_that_no_rerun_repeats_it() -> None:
    assert not run(None, lags=False, backend="trio").end.deterministic
