"""Schedules as a file names them."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import numpy as np
import optax
import pytest
from pydantic import BaseModel, ValidationError

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers.policies.schedules import NAMES, Schedule, build_schedule

# name -> (a schedule of optax, the same as a file says it)
SCHEDULES: dict[str, tuple[Any, str]] = {
    "constant": (optax.constant_schedule(0.3), 'name = "constant_schedule", value = 0.3'),
    "cosine": (
        optax.cosine_decay_schedule(0.3, 130, alpha=0.01),
        'name = "cosine_decay_schedule", init_value = 0.3, decay_steps = 130, alpha = 0.01',
    ),
    "warm-up cosine": (
        optax.warmup_cosine_decay_schedule(0.0, 1e-3, 20, 150),
        'name = "warmup_cosine_decay_schedule", init_value = 0.0, peak_value = 1e-3, warmup_steps = 20, '
        "decay_steps = 150",
    ),
    "piecewise": (
        optax.piecewise_constant_schedule(0.1, {20: 0.3, 90: 0.1}),
        'name = "piecewise_constant_schedule", init_value = 0.1, boundaries_and_scales = { 20 = 0.3, 90 = 0.1 }',
    ),
    "exponential": (
        optax.exponential_decay(0.1, 10, 0.96),
        'name = "exponential_decay", init_value = 0.1, transition_steps = 10, decay_rate = 0.96',
    ),
    "cyclic": (
        optax.sgdr_schedule(
            [
                {"init_value": 0.0, "peak_value": peak, "decay_steps": 50, "warmup_steps": 5}
                for peak in (0.1, 0.05)
            ]
        ),
        'name = "sgdr_schedule", cosine_kwargs = ['
        "{ init_value = 0.0, peak_value = 0.1, decay_steps = 50, warmup_steps = 5 }, "
        "{ init_value = 0.0, peak_value = 0.05, decay_steps = 50, warmup_steps = 5 }]",
    ),
    "polynomial": (
        optax.polynomial_schedule(0.1, 0.0, 1.7, 120),
        'name = "polynomial_schedule", init_value = 0.1, end_value = 0.0, power = 1.7, transition_steps = 120',
    ),
    "one cycle": (
        optax.linear_onecycle_schedule(150, 0.1),
        'name = "linear_onecycle_schedule", transition_steps = 150, peak_value = 0.1',
    ),
    "joined": (
        optax.join_schedules([optax.linear_schedule(0.0, 0.1, 30), optax.constant_schedule(0.1)], [30]),
        'name = "join_schedules", boundaries = [30], schedules = ['
        '{ name = "linear_schedule", init_value = 0.0, end_value = 0.1, transition_steps = 30 }, '
        '{ name = "constant_schedule", value = 0.1 }]',
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_table_of_a_file_names_the_same_schedule(name: str) -> None:
    schedule, text = SCHEDULES[name]
    table = tomllib.loads(f"schedule = {{ {text} }}")["schedule"]
    built = build_schedule(json.loads(json.dumps(table)))
    assert [np.float32(built(step)) for step in range(0, 200, 7)] == [
        np.float32(schedule(step)) for step in range(0, 200, 7)
    ]


def test_every_name_that_a_file_may_use_is_a_schedule_of_optax() -> None:
    assert [name for name in NAMES if not callable(getattr(optax, name, None))] == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "warmup_cosine_decay"}, ["'warmup_cosine_decay'", "'warmup_cosine_decay_schedule'"]),
        ({"name": "scale_by_adam"}, ["'scale_by_adam'", "constant_schedule"]),
        ({"value": 0.1}, ["name=None", "constant_schedule"]),
        ({"name": ["constant_schedule"]}, ["constant_schedule"]),
        ({"name": "constant_schedule", "valu": 1}, ["'valu'", "'value'"]),
        ({"name": "cosine_decay_schedule", "init_value": 1.0}, ["lacks decay_steps", "alpha"]),
        (
            {"name": "cosine_decay_schedule", "init_value": "high", "decay_steps": 3},
            ["cosine_decay", "high"],
        ),
        (
            {
                "name": "piecewise_constant_schedule",
                "init_value": 1.0,
                "boundaries_and_scales": {"ten": 0.5},
            },
            ["piecewise_constant_schedule", "ten"],
        ),
        (
            {"name": "join_schedules", "boundaries": [], "schedules": [{"name": "constant"}]},
            ["'constant'", "'constant_schedule'"],
        ),
        ({"name": "sgdr_schedule", "cosine_kwargs": [{"peak": 1.0}]}, ["sgdr_schedule", "peak"]),
    ],
)
def test_a_table_that_names_no_schedule_is_refused_with_what_would_be_valid(
    table: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_schedule(table)
    for word in words:
        assert word in str(caught.value)


def test_the_annotated_type_builds_tables_and_lets_functions_through() -> None:
    class Config(BaseModel):
        schedule: Schedule

    def halve(epoch: int) -> float:
        return 0.5**epoch

    assert Config(schedule=halve).schedule is halve
    built = Config.model_validate({"schedule": {"name": "constant_schedule", "value": 0.25}})
    assert built.schedule(3) == 0.25
    with pytest.raises(ValidationError, match="Did you mean 'constant_schedule'"):
        Config.model_validate({"schedule": {"name": "constantschedule"}})
    with pytest.raises(ValidationError, match="callable"):
        Config.model_validate({"schedule": 3})
