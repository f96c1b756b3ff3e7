"""Schedules as a config file names them, and their values as the host computes them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import BaseModel, ValidationError

from eventtrain.errors import ConfigurationError, HyperparamError
from eventtrain.subscribers.policies.schedules import (
    NAMES,
    CheckedSchedule,
    Schedule,
    build_schedule,
    takes_value,
)

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
        ({"name": "cosine_decay_schedule", "init_value": 1.0}, ["missing arguments: decay_steps", "alpha"]),
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


# --- CheckedSchedule ----------------------------------------------------------------------------------------------


def in_the_optimiser(schedule: Any, steps: int) -> list[np.float32]:
    """The learning rate of each step, as optax computes it inside a compiled update."""
    optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)
    params = {"w": jnp.ones((3, 2))}
    state = optimiser.init(params)

    @jax.jit
    def update(state: Any, params: Any) -> Any:
        updates, state = optimiser.update({"w": params["w"] * 0.1}, state, params)
        return state, optax.apply_updates(params, updates)

    rates = []
    for _ in range(steps):
        state, params = update(state, params)
        rates.append(np.float32(state.hyperparams["learning_rate"]))
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
async def test_a_schedule_gives_the_bits_that_it_gives_in_the_optimiser(name: str) -> None:
    if name == "one cycle" and version("optax") < "0.2.8":
        pytest.skip("the last bit differs, as the docstring says")
    checked = CheckedSchedule("Scheduler", "learning_rate", SCHEDULES[name][0])
    rates = in_the_optimiser(SCHEDULES[name][0], 200)
    numbers = [step for step, rate in enumerate(rates) if not np.isnan(rate)]
    assert len(numbers) == (120 if name == "polynomial" else 200)  # see the next test
    assert [np.float32(await checked.at(step)) for step in numbers] == [rates[step] for step in numbers]


async def test_the_end_of_a_polynomial_that_compiled_is_nan_is_its_end_value() -> None:
    schedule = SCHEDULES["polynomial"][0]
    assert np.isnan(jax.jit(schedule)(np.int32(120)))
    checked = CheckedSchedule("Scheduler", "learning_rate", schedule)
    assert [await checked.at(step) for step in (120, 121)] == [0.0, 0.0]
    assert await checked.at(0) == pytest.approx(0.1)


@pytest.mark.parametrize(("power", "length"), [(1.0, 100), (2.0, 64), (0.5, 10)])
async def test_the_polynomial_is_that_of_the_formula(power: float, length: int) -> None:
    checked = CheckedSchedule("Scheduler", "rate", optax.polynomial_schedule(0.2, 0.0, power, length))
    for step in range(length + 20):
        formula = 0.2 * max(0.0, 1 - step / length) ** power
        assert await checked.at(step) == pytest.approx(formula, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("schedule", "by", "expected"),
    [
        (lambda epoch: 0.1, "epoch", False),
        (lambda epoch, lr: lr, "epoch", True),
        (lambda epoch, lr=0.1: lr, "epoch", True),
        (lambda epoch, *, decay=0.9: decay, "epoch", False),
        (lambda *arguments: 0.1, "epoch", True),
        (lambda step, decay=0.9: decay, "step", False),
        (optax.cosine_decay_schedule(0.1, 10), "epoch", False),
        (optax.cosine_decay_schedule(0.1, 10), "step", False),
        (jax.jit(lambda count: count * 0.1), "step", False),
    ],
)
def test_the_signature_says_whether_the_value_in_effect_is_passed(
    schedule: Callable[..., Any], by: Any, expected: bool
) -> None:
    assert takes_value("Scheduler", schedule, by) is expected


@pytest.mark.parametrize(
    ("schedule", "by", "words"),
    [
        (0.1, "epoch", ["0.1", "function of the epoch"]),
        (lambda: 0.1, "epoch", ["schedule(epoch)"]),
        (lambda epoch, lr, more: lr, "epoch", ["schedule(epoch, value)", "(epoch, lr, more)"]),
        (lambda step, lr: lr, "step", ["schedule(step)", "ahead"]),
    ],
)
def test_a_schedule_that_cannot_be_called_is_refused(schedule: Any, by: Any, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        takes_value("Scheduler", schedule, by)
    for word in ("Scheduler", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("result", "number"),
    [
        (0.5, 0.5),
        (3, 3),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.asarray(0.5), 0.5),
        (jnp.asarray(0.5, jnp.bfloat16), 0.5),
    ],
)
async def test_numbers_of_all_kinds_are_numbers(result: Any, number: float) -> None:
    value = await CheckedSchedule("Scheduler", "rate", lambda epoch: result).at(0)
    assert value == number
    assert type(value) is type(number)


@pytest.mark.parametrize(
    "result",
    [None, "0.1", True, np.bool_(True), 1j, np.ones(1), [0.1], float("nan"), float("-inf"), jnp.asarray(jnp.nan)],
)  # fmt: skip
async def test_what_is_no_finite_number_is_named_with_the_call(result: Any) -> None:
    with pytest.raises(HyperparamError) as caught:
        await CheckedSchedule("MyScheduler", "rate", lambda epoch, lr: result).at(7, 0.5)
    assert "MyScheduler: schedule(7, 0.5) returned " + repr(result) in str(caught.value)
    assert "'rate'" in str(caught.value)


async def test_what_a_schedule_raises_is_named_with_the_call() -> None:
    with pytest.raises(HyperparamError, match=r"schedule\(7\) raised IndexError: list index out of range"):
        await CheckedSchedule("Scheduler", "rate", lambda epoch: [0.1][epoch]).at(7)


async def test_a_schedule_that_is_async_is_refused_or_named() -> None:
    async def schedule(step: int) -> float:
        return 0.1

    with pytest.raises(ConfigurationError, match="schedule must be a plain function"):
        takes_value("Scheduler", schedule, "step")
    with pytest.raises(HyperparamError, match="returned a coroutine"):
        await CheckedSchedule("Scheduler", "rate", lambda step: schedule(step)).at(3)


async def test_a_schedule_that_needs_the_number_itself_is_not_compiled() -> None:
    calls: list[int] = []

    def table(step: int) -> jax.Array:
        calls.append(step)
        return jnp.asarray([0.5, 0.25][step], jnp.float32)

    checked = CheckedSchedule("Scheduler", "rate", table)
    assert [await checked.at(step) for step in (0, 1, 0)] == [0.5, 0.25, 0.5]
    assert [call for call in calls if isinstance(call, int)] == [0, 1, 0]


async def test_schedules_are_computed_on_the_cpu_whatever_device_trains() -> None:
    devices: list[Any] = []

    def schedule(step: Any) -> Any:
        devices.append(jax.config.jax_default_device)  # pyright: ignore
        return jnp.exp(-0.1 * step)

    checked = CheckedSchedule("Scheduler", "rate", schedule)
    assert [await checked.at(step) for step in range(3)] == pytest.approx(np.exp([0.0, -0.1, -0.2]))
    assert set(devices) == {jax.local_devices(backend="cpu")[0]}


def test_without_a_cpu_backend_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**options: Any) -> Any:
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(ConfigurationError, match='JAX_PLATFORMS="cuda,cpu"'):
        CheckedSchedule("Scheduler", "rate", optax.constant_schedule(0.1))
