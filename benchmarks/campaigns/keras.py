"""The policies decide as the callback objects of Keras 3.15.1 (docs/keras.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from benchmarks.campaign import Campaign
from benchmarks.keras_equality import non_finite, ours, reference
from benchmarks.keras_equality.cases import Case, make_case
from benchmarks.keras_equality.record import Record

NON_FINITE_EVERY = 25
"""One case in this many tests TerminateOnNaN; every fifth of those runs through ``fit``."""


def trial(seed: int) -> Mapping[str, int]:
    """Runs one random case through both.

    Raises:
        AssertionError: the decisions differ; the message names the difference and the case.
    """
    nth, rest = divmod(seed, NON_FINITE_EVERY)
    if rest == 1:
        through_fit = nth % 5 == 0
        bad = non_finite.compare(non_finite.make_case(seed, through_fit=through_fit))
        return {"with_TerminateOnNaN": 1, "fired": int(bad is not None), "through_fit": int(through_fit)}
    case = make_case(seed)
    expected = reference.drive(case)
    differences = ours.drive(case).differences(expected)
    if differences:
        listing = "; ".join(
            f"{name} is {mine}, Keras' is {theirs}" for name, (mine, theirs) in differences.items()
        )
        raise AssertionError(f"{listing}; in {case}")
    return counts(case, expected)


def counts(case: Case, record: Record) -> dict[str, int]:
    """Returns the counts that describe a case."""
    values = [value for column in case.metrics.values() for value in column[: record.epochs]]
    seen = {
        "fired": record.fired,
        "through_fit": case.through_fit,
        "stopped": record.stopped,
        "rate_cut": record.cuts > 0,
        "restored": record.restored,
        "nan": any(value is not None and math.isnan(value) for value in values),
        "inf": any(value is not None and math.isinf(value) for value in values),
        "missing": None in values,
        "several_policies": len(case.policies) > 1,
        **{f"with_{policy.name}": True for policy in case.policies},
    }
    return {name: int(holds) for name, holds in seen.items()}


CAMPAIGN = Campaign(
    name="keras",
    trial=trial,
    trials=2_000,
    slice=600,
    least={"fired": 0.5, "through_fit": 0.1},
    packages=("keras",),
)
