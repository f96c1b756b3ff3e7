"""ReduceLROnPlateau against Keras' state machine, and in a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs


class Rate:
    """Stands for the control and the optimiser: carries the scaling out."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.cuts = 0

    def scale_hyperparam(self, name: str, factor: float, *, minimum: float, path: None, reason: str) -> None:
        assert name == "learning_rate"
        assert "plateau" in reason
        self.value = max(self.value * factor, minimum)
        self.cuts += 1


def drive(
    policy: subs.ReduceLROnPlateau, values: Sequence[float], rate: Any, first_epoch: int = 0
) -> list[int]:
    """The epochs at whose end the policy cuts."""
    cuts: list[int] = []
    for epoch, value in enumerate(values, first_epoch):
        event = et.EpochCompleted(
            epoch=epoch,
            metrics={"val_loss": value},
            hyperparams={"learning_rate": rate.value},
            steps=1,
            duration_s=0.0,
        )
        before = rate.cuts
        with pytest.raises(StopIteration):
            policy.handle(event, rate).send(None)
        if rate.cuts > before:
            cuts.append(epoch)
    return cuts


def keras_cuts(
    values: Sequence[float], factor: float, patience: int, min_delta: float, cooldown: int, min_lr: float
) -> tuple[list[int], float]:
    """Keras 3.15.1's ReduceLROnPlateau.on_epoch_end (minimising), written down from its source; NaN left out."""
    best, wait, counter, rate, cuts = None, 0, 0, 1.0, []
    for epoch, current in enumerate(values):
        if counter > 0:
            counter -= 1
            wait = 0
        if best is None or np.float32(current - -min_delta) < np.float32(best):
            best = current
            wait = 0
        elif not counter > 0:
            wait += 1
            if wait >= patience and rate > np.float32(min_lr):
                rate = max(rate * factor, min_lr)
                cuts.append(epoch)
                counter = cooldown
                wait = 0
    return cuts, rate


@given(
    st.lists(st.floats(-4, 4).map(lambda x: round(x, 1)), max_size=40),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 5),
    st.sampled_from([0.0, 1e-4, 1.0]),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.25, 0.3]),
)
def test_it_cuts_where_keras_cuts(
    values: list[float], factor: float, patience: int, min_delta: float, cooldown: int, min_lr: float
) -> None:
    policy = subs.ReduceLROnPlateau("val_loss", factor, patience, "auto", min_delta, cooldown, min_lr)
    rate = Rate(1.0)
    assert (drive(policy, values, rate), rate.value) == keras_cuts(
        values, factor, patience, min_delta, cooldown, min_lr
    )


def test_the_epoch_that_ends_the_cooldown_counts_already() -> None:
    assert drive(subs.ReduceLROnPlateau(patience=2, cooldown=2), [1.0] * 10, Rate(1.0)) == [2, 5, 8]


def test_the_rate_is_cut_to_min_lr_and_no_further() -> None:
    rate = Rate(float(np.float32(1e-2)))
    assert drive(subs.ReduceLROnPlateau(patience=1, min_lr=1e-3), [1.0] * 9, rate) == [1]
    rate.value = float(np.float32(1e-3))  # as the device holds it: a little above 1e-3
    assert drive(subs.ReduceLROnPlateau(patience=1, min_lr=1e-3), [1.0] * 9, rate) == []


def test_a_first_nan_is_not_the_best_for_ever() -> None:
    assert drive(subs.ReduceLROnPlateau(patience=2), [math.nan, 3.0, 2.0, 1.0, 0.5], Rate(1.0)) == []


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), max_size=30), st.integers(0, 30))
def test_a_saved_count_goes_on_where_it_was(values: list[float], cut: int) -> None:
    def make() -> subs.ReduceLROnPlateau:
        return subs.ReduceLROnPlateau(factor=0.5, patience=2, cooldown=2)

    whole = drive(make(), values, Rate(1.0))
    first, second, rate = make(), make(), Rate(1.0)
    cuts = drive(first, values[:cut], rate)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert cuts + drive(second, values[cut:], rate, first_epoch=cut) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 1.0},
        {"factor": 0},
        {"factor": -0.5},
        {"factor": math.nan},
        {"patience": -1},
        {"cooldown": -1},
        {"min_lr": -1.0},
        {"mode": "sideways"},
        {"monitor": "speed"},
        {"min_delta": math.inf},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.ReduceLROnPlateau(**options)
    assert next(iter(options)) in str(caught.value)


def make_trainer(
    tmp_path: Path, policy: et.Subscriber, *, extra: Sequence[et.Subscriber] = (), **options: Any
) -> tuple[et.Trainer, list[et.Event]]:
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    params = jnp.zeros(2)

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, "rate": state["opt_state"].hyperparams["learning_rate"]}

    state = {"params": params, "opt_state": optimiser.init(params)}
    trainer = et.Trainer(step, state, subscribers=[policy, *extra], run_dir=tmp_path, **options)
    seen: list[et.Event] = []

    @trainer.on(et.HyperparamChanged | et.SubscriberFailed | et.StepCompleted)
    async def see(event: et.Event) -> None:
        seen.append(event)

    return trainer, seen


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_cuts_end_quietly_where_float32_holds_nothing_smaller(tmp_path: Path, unit: Any, caplog: Any) -> None:
    policy = subs.ReduceLROnPlateau("loss", factor=1e-9, patience=1, patience_unit=unit)
    trainer, seen = make_trainer(tmp_path, policy)
    commands: list[et.Event] = []
    trainer.on(et.CommandApplied | et.CommandRejected)(commands.append)
    trainer.fit([np.float32(1.0)] * 300, epochs=20)
    changes = [event.new for event in seen if isinstance(event, et.HyperparamChanged)]
    assert len(changes) == 4
    assert 0 < changes[-1] < 1e-36
    rejected = [event.reason for event in commands if isinstance(event, et.CommandRejected)]
    assert not [reason for reason in rejected if not reason.startswith("the run ended")]
    assert not caplog.messages
    if unit == "epochs":
        assert len(commands) == 4


async def test_a_real_run_takes_the_cut_with_the_next_epochs_first_step(tmp_path: Path) -> None:
    policy = subs.ReduceLROnPlateau("loss", factor=0.5, patience=2)
    trainer, seen = make_trainer(tmp_path, policy)
    await trainer.fit_async(lambda epoch: [np.float32(1.0)] * 4, epochs=5)
    changes = [event for event in seen if isinstance(event, et.HyperparamChanged)]
    assert [(event.step, event.old, event.new) for event in changes] == [(12, 0.5, 0.25), (20, 0.25, 0.125)]
    assert changes[0].cause == et.Cause(event="epoch_completed", step=12, subscriber="ReduceLROnPlateau")
    rates = {event.step: event.metrics["rate"] for event in seen if isinstance(event, et.StepCompleted)}
    assert (rates[12], rates[13]) == (0.5, 0.25)


def test_the_reason_names_the_margin_that_a_lower_value_missed(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.ReduceLROnPlateau("loss", patience=1, min_delta=0.5))
    trainer.fit(lambda epoch: [np.float32(1.0 - epoch / 4)], epochs=2)
    (change,) = [event for event in seen if isinstance(event, et.HyperparamChanged)]
    assert change.reason == "plateau: loss 0.75 is not an improvement on 1 (patience 1, min_delta 0.5)"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_run_whose_optimiser_lacks_the_hyperparameter_fails_at_its_start(
    tmp_path: Path, backend: str
) -> None:
    policy = subs.ReduceLROnPlateau("loss", hyperparam="lr")
    trainer, seen = make_trainer(tmp_path, policy, backend=backend)
    with pytest.raises(et.errors.UnknownHyperparam, match="'lr': the state holds learning_rate") as caught:
        trainer.fit([np.float32(1.0)], epochs=1)
    assert caught.value.__notes__ == ["Raised by the subscriber ReduceLROnPlateau when the run started."]
    assert not [event for event in seen if isinstance(event, et.StepCompleted)]


def test_patience_in_evaluations_cuts_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    policy = subs.ReduceLROnPlateau("val_loss", factor=0.5, patience=2, patience_unit="evaluations")
    trainer, seen = make_trainer(
        tmp_path, policy, eval_fn=lambda state, batch: {"loss": batch}, extra=[subs.EvaluateEvery(steps=3)]
    )
    trainer.fit([np.float32(1.0)] * 12, epochs=1, eval_data=[np.float32(1.0)])
    changes = [(e.step, e.new) for e in seen if isinstance(e, et.HyperparamChanged)]
    assert changes == [(9, 0.25)]  # evaluations at 3 (the first), 6 and 9 (no better), 12


def test_patience_in_steps_cuts_at_the_boundary_its_lag_names(tmp_path: Path) -> None:
    policy = subs.ReduceLROnPlateau("loss", factor=0.5, patience=10, patience_unit="steps", cooldown=1000)
    policy.lag = 5
    trainer, seen = make_trainer(tmp_path, policy)
    trainer.fit([np.float32(1.0)] * 40, epochs=1)
    changes = [(e.step, e.new) for e in seen if isinstance(e, et.HyperparamChanged)]
    assert changes == [(11 + 5, 0.25)]  # step 1 is the best; 11 is the tenth step after it


@pytest.mark.parametrize("lag", [0, 1, 5, {et.StepCompleted: 5}])
def test_by_steps_no_second_cut_is_decided_before_a_step_had_the_first(tmp_path: Path, lag: Any) -> None:
    policy = subs.ReduceLROnPlateau("loss", factor=0.5, patience=1, patience_unit="steps")
    policy.lag = lag
    trainer, seen = make_trainer(tmp_path, policy)
    trainer.fit([np.float32(1.0)] * 30, epochs=1)
    changes = [e for e in seen if isinstance(e, et.HyperparamChanged)]
    steps = lag if isinstance(lag, int) else lag[et.StepCompleted]
    # Step 1 is the best and step 2 the first to be no better; step k + lag + 1 is the first with what k decided.
    decided = list(range(2, 31, steps + 1))
    assert [e.cause.step for e in changes if e.cause is not None] == [k for k in decided if k + steps <= 30]
    assert [e.step for e in changes] == [k + steps for k in decided if k + steps <= 30]


def test_a_nan_stops_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.ReduceLROnPlateau("loss", nan="stop"))
    result = trainer.fit(lambda epoch: [np.float32(math.nan if epoch == 2 else 1.0)], epochs=5)
    assert (result.epochs_completed, result.stop_reason) == (3, "ReduceLROnPlateau: loss is NaN")


def test_one_policy_cuts_the_rates_of_all_groups_that_can_be_set(tmp_path: Path) -> None:
    def group(rate: Any) -> Any:
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

    groups = {"a": group(0.4), "b": group(0.02), "c": group(optax.constant_schedule(1.0))}
    optimiser = optax.multi_transform(groups, {"a": "a", "b": "b", "c": "c"})
    params = {"a": jnp.ones(()), "b": jnp.ones(()), "c": jnp.ones(())}

    def step_fn(state: Any, batch: Any) -> Any:
        updates, opt_state = optimiser.update(state["params"], state["opt_state"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {
            "loss": batch
        }

    policy = subs.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_lr=0.01, path="*")
    state = {"params": params, "opt_state": optimiser.init(params)}
    trainer = et.Trainer(step_fn, state, subscribers=[policy], run_dir=tmp_path)
    changed: list[et.HyperparamChanged] = []
    trainer.on(et.HyperparamChanged)(changed.append)
    trainer.fit([jnp.ones(())], epochs=4)
    found = [(event.step, round(event.old, 4), round(event.new, 4)) for event in changed]
    assert found == [(2, 0.4, 0.2), (2, 0.02, 0.01), (3, 0.2, 0.1), (4, 0.1, 0.05)]


def test_groups_of_which_none_can_be_set_are_refused(tmp_path: Path) -> None:
    params = {"a": jnp.ones(())}
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(1.0))
    state = {"params": params, "opt_state": optimiser.init(params)}
    policy = subs.ReduceLROnPlateau("loss", path="*")
    trainer = et.Trainer(lambda s, b: (s, {"loss": b}), state, subscribers=[policy], run_dir=tmp_path)
    with pytest.raises(et.errors.ScheduledHyperparam):
        trainer.fit([jnp.ones(())], epochs=1)
