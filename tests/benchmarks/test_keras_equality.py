"""A slice of the campaign against Keras' own callbacks, and where we differ from them on purpose (docs/keras.md)."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import warnings
from collections import Counter
from typing import Any

import pytest

if importlib.util.find_spec("keras") is None:
    pytest.skip(
        "keras, the reference, is not installed: it comes with the extra test", allow_module_level=True
    )

import eventtrain as et
from benchmarks.campaigns.keras import CAMPAIGN, counts
from benchmarks.keras_equality import ours, reference
from benchmarks.keras_equality.cases import CHARACTERS, SETS, Case, Policy, PolicyName, make_case
from benchmarks.keras_equality.record import Record
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared.metric_goal import make_goal

FIRST_SEED, CASES, CHUNK = 2_000_000, 200, 40
"""Other seeds than those of the campaign and of its slice in CI."""


@pytest.mark.faults
@pytest.mark.parametrize("first_seed", range(FIRST_SEED, FIRST_SEED + CASES, CHUNK))
def test_random_cases_end_as_keras_own_callbacks_end_them(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + CHUNK):
        CAMPAIGN.trial(seed)


def test_in_at_least_half_of_the_cases_something_fires_and_one_in_ten_is_a_real_run() -> None:
    cases = [make_case(seed) for seed in range(FIRST_SEED, FIRST_SEED + CASES)]
    total: Counter[str] = Counter()
    for case in cases:
        total.update(counts(case, reference.drive(case)))
    assert total["fired"] >= CASES / 2
    assert total["through_fit"] == CASES / 10
    assert min(total.values()) > 0, total
    assert {character for case in cases for character in case.characters.values()} == set(CHARACTERS)
    sets = {tuple(sorted(policy.name for policy in case.policies)) for case in cases}
    assert sets == {tuple(sorted(names)) for names in SETS}


def test_a_difference_is_named_with_both_values() -> None:
    record = reference.drive(make_case(FIRST_SEED))
    other = dataclasses.replace(record, epochs=record.epochs + 1)
    assert record.differences(record) == {}
    assert other.differences(record) == {"epochs": (record.epochs + 1, record.epochs)}


# --- what is called alike ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler"])
def test_arguments_and_their_defaults_are_those_of_keras(name: str) -> None:
    theirs, mine = (inspect.signature(getattr(module, name)) for module in (reference.keras.callbacks, subs))
    wanted = {
        argument: parameter.default
        for argument, parameter in theirs.parameters.items()
        if argument != "verbose" and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert {argument: mine.parameters[argument].default for argument in wanted} == wanted


def test_mode_auto_agrees_with_keras_on_each_of_its_metrics() -> None:
    directions: dict[str, str] = {}
    for kind in vars(reference.keras.metrics).values():
        metric = build(kind) if inspect.isclass(kind) else None
        if hasattr(metric, "_direction"):
            directions[metric.name] = {"up": "max", "down": "min"}[metric._direction]
    assert len(directions) > 30
    assert {name: make_goal("Policy", name, "auto", 0).mode for name in directions} == directions


def build(kind: Any) -> Any:
    """An instance with whatever the constructor needs; None of what is no complete metric."""
    needed = {"num_classes": 2, "recall": 0.5, "precision": 0.5, "sensitivity": 0.5, "specificity": 0.5}
    needed |= {"target_class_ids": [0]}
    parameters = inspect.signature(kind).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return kind(**{name: needed[name] for name in required}) if set(required) <= set(needed) else None


# --- where we differ, on purpose --------------------------------------------------------------------------------


def both(name: PolicyName, values: list[float | None], **options: Any) -> tuple[Record, Record]:
    """One policy on ``loss``: what ours and what Keras' makes of it."""
    policies = (Policy(name, options if name == "LearningRateScheduler" else {"monitor": "loss"} | options),)
    case = Case(1, False, 0.1, 1, 1, {"loss": tuple(values)}, {"loss": "given"}, policies)
    return ours.drive(case), reference.drive(case)


@pytest.mark.parametrize("name", ["EarlyStopping", "ReduceLROnPlateau"])
def test_a_first_nan_is_never_best_where_keras_never_finds_a_better_one(name: PolicyName) -> None:
    mine, keras = both(name, [math.nan, 3.0, 2.0, 1.0], patience=2)
    assert mine.policies[0]["best"] == 1.0
    assert math.isnan(keras.policies[0]["best"])
    assert not mine.fired
    assert keras.fired


def test_a_nan_that_is_not_first_is_an_epoch_without_improvement_in_both() -> None:
    mine, keras = both("EarlyStopping", [3.0, math.nan, 2.0, math.nan, math.nan, 1.0], patience=2)
    assert mine == keras
    assert (mine.epochs, mine.stopped) == (5, True)


def test_a_rate_too_small_for_float32_is_not_set_where_keras_sets_zero() -> None:
    case = Case(
        0, True, 1e-3, 1, 1, {"loss": (1.0,) * 50}, {"loss": "constant"},
        (Policy("ReduceLROnPlateau", {"monitor": "loss", "patience": 1, "factor": 0.1}),),
    )  # fmt: skip
    mine, keras = ours.drive(case), reference.drive(case)
    assert keras.rates[-1] == 0
    assert mine.rates[-1] != 0
    assert mine.rates[:40] == keras.rates[:40]


def test_a_type_error_inside_a_schedule_is_said_where_keras_calls_it_again_with_less() -> None:
    def schedule(epoch: int, rate: Any = None) -> float:
        return 0.25 if rate is None else rate + "broken"

    with pytest.raises(et.errors.HyperparamError, match="TypeError"):
        both("LearningRateScheduler", [1.0], schedule=schedule)
    policies = (Policy("LearningRateScheduler", {"schedule": schedule}),)
    keras = reference.drive(Case(1, False, 0.1, 1, 1, {"loss": (1.0,)}, {}, policies))
    assert keras.fired is False
    assert keras.rates == (0x3E800000,)  # 0.25


def test_arguments_that_cannot_work_are_refused_where_keras_takes_them() -> None:
    keras = reference.keras.callbacks
    keras.EarlyStopping(patience=-1)
    keras.ReduceLROnPlateau(factor=0.0, cooldown=-1)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert keras.EarlyStopping(mode="down").mode == "auto"
    for policy, options in (
        (subs.EarlyStopping, {"patience": -1}),
        (subs.EarlyStopping, {"mode": "down"}),
        (subs.ReduceLROnPlateau, {"factor": 0.0}),
        (subs.ReduceLROnPlateau, {"cooldown": -1}),
    ):
        with pytest.raises(et.ConfigurationError):
            policy(**options)  # pyright: ignore
