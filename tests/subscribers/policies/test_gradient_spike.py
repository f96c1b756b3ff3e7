"""GradientSpike against a reference in NumPy, and in real runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.testing import RecordingSubscriber, ScriptedStep

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])
VALUES = st.lists(
    st.one_of(
        st.floats(0, 4).map(lambda x: round(x, 2)), st.sampled_from([1.0, 20.0, 1e9, math.nan, math.inf])
    ),
    max_size=60,
)


class Scalings:
    """Stands for the control: counts what was asked for."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def scale_hyperparam(
        self, name: str, factor: float, *, minimum: float, path: str | None, reason: str
    ) -> None:
        assert (name, factor, minimum, path) == ("learning_rate", 0.5, 0.01, None)
        self.reasons.append(reason)


def drive(policy: subs.GradientSpike, values: Sequence[float], first_step: int = 1) -> list[int]:
    """The steps of the spikes that counted."""
    control, steps = Scalings(), list[int]()
    for step, value in enumerate(values, first_step):
        event = et.StepCompleted(step=step, epoch=0, batch=0, metrics={"grad_norm": value})
        with pytest.raises(StopIteration):
            policy.handle(event, control).send(None)
        if len(control.reasons) > len(steps):
            steps.append(step)
    return steps


def expected(
    values: Sequence[float], window: int, q: float, threshold: float, cooldown: int, warmup: int
) -> list[int]:
    spikes: list[int] = []
    for index, value in enumerate(values):
        past = [v for v in values[:index] if math.isfinite(v)][-window:]
        usual = len(past) >= warmup and value <= threshold * np.quantile(past, q)
        spike = not math.isfinite(value) or (len(past) >= warmup and not usual)
        if spike and (not spikes or index + 1 > spikes[-1] + cooldown):
            spikes.append(index + 1)
    return spikes


@given(
    VALUES,
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([1.0, 2.0, 5.0]),
    st.integers(0, 10),
    st.data(),
)
def test_it_cuts_where_the_definition_says(
    values: list[float], window: int, q: float, threshold: float, cooldown: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(1, window))
    policy = subs.GradientSpike(
        window=window,
        quantile=q,
        threshold=threshold,
        min_lr=0.01,
        cooldown=cooldown,
        warmup=warmup,
        lag=0,
    )
    assert drive(policy, values) == expected(values, window, q, threshold, cooldown, warmup)


@given(VALUES, st.integers(0, 60))
def test_a_saved_window_goes_on_where_it_was(values: list[float], cut: int) -> None:
    def make() -> subs.GradientSpike:
        return subs.GradientSpike(window=5, cooldown=3, warmup=2, min_lr=0.01, lag=0)

    first, second = make(), make()
    spikes = drive(first, values[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert spikes + drive(second, values[cut:], first_step=len(values[:cut]) + 1) == drive(make(), values)


def test_the_cooldown_is_never_shorter_than_the_lag() -> None:
    policy = subs.GradientSpike(window=2, cooldown=1, lag=10, min_lr=0.01)
    assert drive(policy, [1.0, 1.0] + [math.nan] * 20) == [3, 14]


def test_the_reason_names_the_value_and_what_was_usual() -> None:
    policy, control = subs.GradientSpike(window=3, warmup=2, min_lr=0.01, lag=0), Scalings()
    for step, value in enumerate([1.0, 1.0, 7.5], 1):
        with pytest.raises(StopIteration):
            policy.handle(
                et.StepCompleted(step=step, epoch=0, batch=0, metrics={"grad_norm": value}), control
            ).send(None)
    assert control.reasons == [
        "spike: grad_norm 7.5 is more than 2 times 1, the 0.95 quantile of the last 2 steps"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"quantile": 1.5},
        {"quantile": -0.1},
        {"threshold": 0.5},
        {"threshold": math.nan},
        {"factor": 1.0},
        {"factor": 0.0},
        {"min_lr": -1.0},
        {"cooldown": -1},
        {"warmup": 0},
        {"warmup": 201},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.GradientSpike(**options)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"version": 2}, "version 2"),
        ({"version": 1, "values": [1.0, "nan"], "quiet_until": 0}, r"values\.1"),
        ({"version": 1, "values": [1.0]}, "quiet_until"),
    ],
)
def test_a_state_that_cannot_be_taken_over_is_refused_by_the_key(state: dict[str, Any], named: str) -> None:
    with pytest.raises(et.StateError, match=named):
        subs.GradientSpike().load_state_dict(state)


# --- in real runs ---------------------------------------------------------------------------------------------------

NORMS = [1.0] * 30 + [9.0] + [1.0] * 29 + [math.nan] + [1.0] * 39
"""Spikes at steps 31 and 61 of 100."""


def run(
    tmp_path: Path, policy: et.Subscriber, norms: Sequence[float] = NORMS, **options: Any
) -> tuple[et.Trainer, ScriptedStep, RecordingSubscriber]:
    script = ScriptedStep({"grad_norm": norms}, steps_per_epoch=50, learning_rate=1.0)
    recorder = RecordingSubscriber(et.HyperparamChanged | et.StepCompleted | et.RunCompleted)
    trainer = et.Trainer(
        script.step_fn, script.state, subscribers=[policy, recorder], run_dir=tmp_path, **options
    )
    return trainer, script, recorder


def changes(recorder: RecordingSubscriber) -> list[tuple[int, float]]:
    return [(event.step, event.new) for event in recorder.of(et.HyperparamChanged)]


@BACKENDS
@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("lag", [0, 5, 16])
def test_a_cut_takes_effect_exactly_lag_steps_after_the_spike(
    tmp_path: Path, lag: int, steps_per_call: int, backend: str
) -> None:
    policy = subs.GradientSpike(window=10, cooldown=20, lag=lag)
    trainer, script, recorder = run(tmp_path, policy, steps_per_call=steps_per_call, backend=backend)
    trainer.fit(script.data, epochs=2)
    assert changes(recorder) == [(31 + lag, 0.5), (61 + lag, 0.25)]
    rates = {event.step: event.metrics["learning_rate"] for event in recorder.of(et.StepCompleted)}
    assert (rates[31 + lag], rates[32 + lag], rates[61 + lag], rates[62 + lag]) == (1.0, 0.5, 0.5, 0.25)
    cause = et.Cause(event="step_completed", step=31, subscriber="GradientSpike")
    assert recorder.of(et.HyperparamChanged)[0].cause == cause
    assert recorder.of(et.RunCompleted)[0].deterministic


class Hesitant(subs.GradientSpike):
    """Takes a random time over each event."""

    async def handle(self, event: et.StepCompleted, control: et.Control) -> None:
        await anyio.sleep(random.random() * 0.002)
        await super().handle(event, control)


@BACKENDS
def test_random_delays_of_the_handler_change_nothing(tmp_path: Path, backend: str) -> None:
    logs: list[Any] = []
    for policy in (subs.GradientSpike, Hesitant, Hesitant):
        trainer, script, recorder = run(
            tmp_path, policy(window=10, cooldown=20, lag=7, min_lr=0.3), backend=backend
        )
        trainer.fit(script.data, epochs=2)
        rates = [event.metrics["learning_rate"] for event in recorder.of(et.StepCompleted)]
        logs.append((changes(recorder), rates))
    assert logs[0] == logs[1] == logs[2]
    assert logs[0][0] == [(38, 0.5), (68, pytest.approx(0.3))]


@pytest.mark.parametrize("first", [20, 31, 45, 62])
def test_a_run_interrupted_between_two_epochs_goes_on_like_an_uninterrupted_one(
    tmp_path: Path, first: int
) -> None:
    policy = subs.GradientSpike(window=10, cooldown=35, lag=0)
    trainer, script, recorder = run(tmp_path, policy)
    trainer.fit(script.data * 2, epochs=1)
    assert changes(recorder) == [(31, 0.5)]  # the cooldown holds over the NaN at 61

    before = subs.GradientSpike(window=10, cooldown=35, lag=0)
    trainer, script, interrupted = run(tmp_path, before)
    trainer.fit([script.data[0]] * first, epochs=1)
    before.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    trainer.fit([script.data[0]] * (100 - first), epochs=1)
    assert changes(interrupted) == changes(recorder)
    assert before.state_dict() == policy.state_dict()


def test_every_fit_begins_anew_unless_a_state_was_loaded(tmp_path: Path) -> None:
    policy = subs.GradientSpike(window=10, cooldown=20, lag=0)
    trainer, script, recorder = run(tmp_path, policy)
    trainer.fit(script.data[:25], epochs=1)
    trainer.fit(script.data[:10], epochs=1)  # the window is not full again when 9.0 comes
    assert changes(recorder) == []


def test_a_run_whose_optimiser_lacks_the_hyperparameter_fails_at_its_start(tmp_path: Path) -> None:
    trainer, script, recorder = run(tmp_path, subs.GradientSpike(hyperparam="lr"))
    with pytest.raises(et.errors.UnknownHyperparam, match="'lr'"):
        trainer.fit(script.data, epochs=1)
    assert recorder.of(et.StepCompleted) == []


def test_a_metric_that_steps_lack_fails_the_run_before_the_first_one(tmp_path: Path) -> None:
    trainer, script, recorder = run(tmp_path, subs.GradientSpike("grad_nrm"))
    expected = r"GradientSpike monitors 'grad_nrm', which is not among .*\(grad_norm, learning_rate\)"
    with pytest.raises(et.ConfigurationError, match=expected):
        trainer.fit(script.data, epochs=1)
    assert recorder.of(et.StepCompleted) == []
