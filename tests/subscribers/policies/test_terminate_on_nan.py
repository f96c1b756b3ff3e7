"""TerminateOnNaN: stop, raise, and roll back, at exactly the steps that were promised."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.saved_in_memory import MemoryCheckpointer

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def make_trainer(
    tmp_path: Path, *policies: et.Subscriber, weight: float = 0.0, **options: Any
) -> tuple[et.Trainer, list[Any]]:
    """A weight that grows by rate times batch; the loss of a step is the weight before its update.

    So with batches of 1 the loss of step k is k - 1, and a NaN among the batches shows in the step after it.
    """
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state["params"], state["opt_state"]
        rate = opt_state.hyperparams["learning_rate"]
        updates, opt_state = optimiser.update({"w": -batch}, opt_state, params)
        metrics = {"loss": params["w"], "rate": rate}
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, metrics

    params = {"w": jnp.asarray(weight, jnp.float32)}
    state = {"params": params, "opt_state": optimiser.init(params)}
    trainer = et.Trainer(step, state, subscribers=policies, run_dir=tmp_path, **options)
    seen: list[Any] = []

    @trainer.on(et.Event, name="see")
    async def see(event: et.Event) -> None:
        seen.append(event)

    return trainer, seen


def batches(count: int, *bad: int, first: int = 1, value: float = math.nan) -> list[np.float32]:
    """``count`` batches from step ``first`` on, bad ones for the steps ``bad``."""
    return [np.float32(value if step in bad else 1.0) for step in range(first, first + count)]


def weight(trainer: et.Trainer) -> float:
    return float(trainer.state["params"]["w"])


def losses(seen: Sequence[Any]) -> dict[int, float]:
    return {event.step: event.metrics["loss"] for event in seen if isinstance(event, et.StepCompleted)}


def restored(seen: Sequence[Any]) -> list[tuple[int, int]]:
    """When a state was put back, and of which step it was."""
    return [(event.step, event.restored_step) for event in seen if isinstance(event, et.CheckpointRestored)]


def rates(seen: Sequence[Any]) -> list[tuple[int, float]]:
    return [(event.step, event.new) for event in seen if isinstance(event, et.HyperparamChanged)]


def commands(seen: Sequence[Any]) -> list[Any]:
    return [
        (event.step, event.command.model_dump()) for event in seen if isinstance(event, et.CommandApplied)
    ]


# --- stop and raise -------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("lag", [0, 5, 64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_stops_the_run_exactly_lag_steps_later(
    tmp_path: Path, value: float, lag: int, steps_per_call: int, backend: str
) -> None:
    policy = subs.TerminateOnNaN(lag=lag)
    trainer, seen = make_trainer(tmp_path, policy, steps_per_call=steps_per_call, backend=backend)
    result = trainer.fit(batches(100, 10, value=value), epochs=1)
    assert result.step == 11 + lag
    assert result.stop_reason == f"TerminateOnNaN: loss is {value} at step 11"
    assert seen[-1].deterministic
    assert len(commands(seen)) == 1


def test_without_a_lag_it_stops_as_soon_as_it_can_and_says_that_a_rerun_may_differ(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.TerminateOnNaN(lag=None))
    result = trainer.fit((batch for batch in batches(1_000_000, 10)), epochs=1)
    assert 11 <= result.step < 1_000_000
    assert not seen[-1].deterministic


def test_finite_losses_of_any_size_stop_nothing(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.TerminateOnNaN(lag=0), weight=3e38)
    assert trainer.fit(batches(20), epochs=1).stop_reason == "completed"


def test_a_run_that_ends_before_the_stop_is_due_is_completed(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.TerminateOnNaN())
    result = trainer.fit(batches(40, 10), epochs=1)
    assert (result.step, result.stop_reason) == (40, "completed")


@BACKENDS
@pytest.mark.parametrize("bad", [10, 39])
def test_raise_fails_the_run_also_at_its_last_step(tmp_path: Path, bad: int, backend: str) -> None:
    trainer, seen = make_trainer(tmp_path, subs.TerminateOnNaN("raise"), backend=backend)
    with pytest.raises(et.SubscriberError, match=f"loss is nan at step {bad + 1}") as caught:
        trainer.fit(batches(40, bad), epochs=1)
    assert isinstance(caught.value.__cause__, et.NonFiniteMetric)
    assert isinstance(seen[-1], et.RunFailed)


def test_it_watches_the_metric_it_is_told_to(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.TerminateOnNaN(monitor="rate", lag=0))
    assert trainer.fit(batches(20, 10), epochs=1).stop_reason == "completed"
    trainer, _ = make_trainer(tmp_path, subs.TerminateOnNaN(monitor="los"))
    with pytest.raises(et.ConfigurationError, match="TerminateOnNaN monitors 'los', which is not among"):
        trainer.fit(batches(3), epochs=1)


# --- roll back ------------------------------------------------------------------------------------------------------


def rollback(**options: Any) -> subs.TerminateOnNaN:
    options = {"snapshot_every": 10, "lag": 4, **options}
    return subs.TerminateOnNaN("rollback", **options)


@BACKENDS
@pytest.mark.parametrize("snapshot", ["keep", "copy"])
@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_the_last_good_state_is_back_lag_steps_later_with_a_smaller_rate(
    tmp_path: Path, steps_per_call: int, snapshot: Any, backend: str
) -> None:
    trainer, seen = make_trainer(
        tmp_path, rollback(), steps_per_call=steps_per_call, snapshot=snapshot, backend=backend
    )
    result = trainer.fit(batches(40, 25), epochs=1)
    assert restored(seen) == [(30, 20)]  # the loss is NaN from step 26 on
    assert rates(seen) == [(30, 0.5)]
    assert [loss for step, loss in losses(seen).items() if step > 30] == [20 + 0.5 * n for n in range(10)]
    assert (result.step, result.stop_reason, weight(trainer)) == (40, "completed", 25.0)
    assert seen[-1].deterministic
    assert not trainer.control.snapshots  # their memory is given back


def test_a_snapshot_of_a_state_that_was_bad_already_is_not_good(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback())
    trainer.fit(batches(40, 20), epochs=1)
    assert [event.step for event in seen if isinstance(event, et.SnapshotTaken)][:3] == [0, 10, 20]
    assert restored(seen) == [(25, 10)]


def test_the_state_that_the_run_starts_from_is_the_first_to_go_back_to(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback())
    trainer.fit(batches(20, 3), epochs=1)
    assert restored(seen) == [(8, 0)]
    assert weight(trainer) == 0.5 * 12


def test_at_most_the_good_one_and_its_successor_are_kept(tmp_path: Path) -> None:
    policy = rollback(lag=0)
    trainer, _ = make_trainer(tmp_path, policy)
    kept: dict[int, set[int]] = {}

    @trainer.on(et.StepCompleted, lag=0)
    async def look(event: et.StepCompleted, control: et.Control) -> None:
        kept[event.step] = {snapshot.step for snapshot in control.snapshots.values()}

    trainer.fit(batches(35), epochs=1)
    # Whether the policy or this handler comes first to event 11, 21 or 31 is open.
    settled = {step: kept[step] for step in (5, 10, 15, 20, 25, 30, 35)}
    assert settled == {5: {0}, 10: {0}, 15: {10}, 20: {10}, 25: {20}, 30: {20}, 35: {30}}


def test_each_rollback_to_the_same_snapshot_makes_the_rate_smaller_still(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback())
    trainer.fit(batches(50, 25, 31, 37), epochs=1)
    assert restored(seen) == [(30, 20), (36, 20), (42, 20)]
    assert [rate for _, rate in rates(seen) if rate != 1.0] == [0.5, 0.25, 0.125]


def test_a_newer_snapshot_has_the_smaller_rate_and_counts_anew(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback())
    trainer.fit(batches(100, 25, 75), epochs=1)
    assert restored(seen) == [(30, 20), (80, 70)]
    assert rates(seen) == [(30, 0.5), (80, 0.25)]


@pytest.mark.parametrize(("limit", "bad", "step"), [(2, 65, 70), (1, 45, 50), (0, 25, 30)])
def test_after_so_many_rollbacks_it_stops_and_leaves_the_good_state(
    tmp_path: Path, limit: int, bad: int, step: int
) -> None:
    trainer, seen = make_trainer(tmp_path, rollback(max_rollbacks=limit))
    result = trainer.fit(batches(100, 25, 45, 65), epochs=1)
    assert result.step == step
    assert result.stop_reason == f"TerminateOnNaN: loss is nan at step {bad + 1}, after {limit} rollbacks"
    assert len(restored(seen)) == limit + 1  # the last one at the end
    assert math.isfinite(weight(trainer))
    assert not trainer.control.snapshots


def test_a_run_that_starts_bad_stops_since_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback(), weight=math.nan)
    result = trainer.fit(batches(40), epochs=1)
    assert (result.step, result.stop_reason) == (
        5,
        "TerminateOnNaN: loss is nan at step 1, and no snapshot is known to be good",
    )
    assert restored(seen) == []


@BACKENDS
@pytest.mark.parametrize("steps", [26, 28, 29, 30])
def test_a_run_that_ends_before_the_rollback_is_due_ends_with_the_good_state(
    tmp_path: Path, steps: int, backend: str
) -> None:
    trainer, seen = make_trainer(tmp_path, rollback(), backend=backend)
    result = trainer.fit(batches(steps, 25), epochs=1)
    assert (result.step, result.stop_reason, weight(trainer)) == (steps, "completed", 20.0)
    assert restored(seen)[-1] == (steps, 20)
    assert isinstance(seen[-1], et.RunCompleted)
    again = trainer.fit(batches(10), epochs=1)  # and it can go on from there
    assert (again.step, weight(trainer)) == (steps + 10, 30.0)


def test_so_does_a_run_that_is_stopped_meanwhile(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, rollback())

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 28)
    async def stop(event: et.StepCompleted, control: et.Control) -> None:
        control.stop("enough")

    result = trainer.fit(batches(100, 25), epochs=1)
    assert (result.step, result.stop_reason, weight(trainer)) == (28, "enough", 20.0)


def test_the_best_params_win_over_the_last_good_state(tmp_path: Path) -> None:
    best = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer, seen = make_trainer(tmp_path, best, rollback())
    trainer.fit(lambda epoch: batches(14, 25, first=1 + 14 * epoch), epochs=2)
    assert restored(seen) == [(28, 20), (28, 14)]
    assert weight(trainer) == 14.0


def test_a_good_run_gets_nothing_back_at_its_end(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, rollback())
    trainer.fit(batches(35), epochs=1)
    assert (restored(seen), weight(trainer)) == ([], 35.0)


def test_averages_inside_the_step_are_rolled_back_too(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, rollback(), step_extensions=[et.EMA(0.5)])
    trainer.fit(batches(40, 25), epochs=1)
    leaves = jax.tree.leaves(trainer.extension_states())
    assert leaves
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_factor_of_one_leaves_the_rate_alone_and_needs_none(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return {"w": state["w"] + batch}, {"loss": state["w"]}

    trainer = et.Trainer(
        step, {"w": jnp.zeros(())}, subscribers=[rollback(lr_factor=1.0)], run_dir=tmp_path / "run"
    )
    assert float(trainer.fit(batches(40, 25), epochs=1).state["w"]) == 30.0
    trainer = et.Trainer(step, {"w": jnp.zeros(())}, subscribers=[rollback()], run_dir=tmp_path / "run")
    with pytest.raises(et.errors.UnknownHyperparam, match="learning_rate"):
        trainer.fit(batches(40, 25), epochs=1)


class Hesitant(subs.TerminateOnNaN):
    """Takes a random time over each event."""

    async def handle(self, event: Any, control: et.Control) -> None:
        await anyio.sleep(random.random() * 0.002)
        await super().handle(event, control)


@BACKENDS
def test_random_delays_of_the_handler_change_nothing(tmp_path: Path, backend: str) -> None:
    runs: list[Any] = []
    for kind in (subs.TerminateOnNaN, Hesitant, Hesitant):
        policy = kind("rollback", snapshot_every=10, lag=4)
        policy.name = "nan"
        trainer, seen = make_trainer(tmp_path, policy, backend=backend)
        trainer.fit(batches(100, 25, 31, 66), epochs=1)
        runs.append((commands(seen), str(losses(seen)), weight(trainer)))
    assert runs[0] == runs[1] == runs[2]
    assert [step for step, command in runs[0][0] if command["kind"] == "restore"] == [30, 36, 71]


@settings(max_examples=25)
@given(
    st.integers(1, 60),
    st.sets(st.integers(1, 60), max_size=5),
    st.integers(0, 6),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_whatever_turns_bad_the_run_ends_with_a_state_as_after_good_steps_only(
    tmp_path_factory: pytest.TempPathFactory,
    steps: int,
    bad: set[int],
    lag: int,
    every: int,
    limit: int,
) -> None:
    policy = rollback(lag=lag, snapshot_every=every, max_rollbacks=limit)
    trainer, seen = make_trainer(tmp_path_factory.mktemp("run"), policy)
    result = trainer.fit(batches(steps, *bad), epochs=1)
    values = losses(seen)
    for step, restored_step in restored(seen):
        before = values.get(restored_step + 1)
        assert before is not None
        assert math.isfinite(before)  # it was proven
        assert restored_step == 0 or restored_step % every == 0
        assert values.get(step + 1, before) == before  # it is that very state
    applied = [c for step, c in commands(seen) if c["kind"] == "restore"]
    assert policy.rollbacks <= limit
    assert len(applied) <= limit
    # The loss tells of the state before the last update only.
    if result.step not in bad or not math.isfinite(values[result.step]):
        assert math.isfinite(weight(trainer))
    if not bad:
        assert (restored(seen), rates(seen), weight(trainer)) == ([], [], steps)
    assert not trainer.control.snapshots


@pytest.mark.parametrize(
    "change",
    [{"every": 2}, {"lag": 4}, {"lag": {et.RunStarted: 0, et.StepCompleted: 5}}],
    ids=["every", "one lag for all", "another lag"],
)
def test_a_rollback_whose_events_are_thinned_out_or_later_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    policy = rollback()
    vars(policy).update(change)
    trainer, seen = make_trainer(tmp_path, policy)
    with pytest.raises(et.ConfigurationError, match=r"cannot have every=.*Give lag= to the constructor"):
        trainer.fit(batches(40, 25), epochs=1)
    assert losses(seen) == {}


def test_one_that_only_stops_may_look_at_every_so_many_steps(tmp_path: Path) -> None:
    policy = subs.TerminateOnNaN(lag=0)
    policy.every = 10
    trainer, _ = make_trainer(tmp_path, policy)
    assert trainer.fit(batches(40, 12), epochs=1).step == 20


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [45, 50, 57])
def test_a_run_interrupted_between_two_epochs_goes_on_like_an_uninterrupted_one(
    tmp_path: Path, first: int
) -> None:
    bad = (25, 75, 95)
    policy = rollback(lag=0, max_rollbacks=2)
    trainer, whole = make_trainer(tmp_path, policy)
    result = trainer.fit(batches(110, *bad), epochs=1)

    before = rollback(lag=0, max_rollbacks=2)
    interrupted, seen = make_trainer(tmp_path, before)
    interrupted.fit(batches(first, *bad), epochs=1)
    before.load_state_dict(json.loads(json.dumps(before.state_dict())))
    second = interrupted.fit(batches(110 - first, *bad, first=first + 1), epochs=1)
    assert restored(seen) == restored(whole)
    assert rates(seen) == rates(whole)
    assert (second.step, second.stop_reason, weight(interrupted)) == (
        result.step,
        result.stop_reason,
        weight(trainer),
    )
    assert before.rollbacks == policy.rollbacks == 2


@BACKENDS
@pytest.mark.parametrize("extensions", [[], [et.EMA(0.5)]], ids=["plain", "averages"])
def test_a_run_resumed_from_any_checkpoint_goes_on_like_an_uninterrupted_one(
    tmp_path: Path, extensions: list[Any], backend: str
) -> None:
    data = batches(60, 25, 31)
    checkpointer = MemoryCheckpointer(every=1)
    checkpointer.name = "memory"

    def make(name: str) -> tuple[et.Trainer, list[Any]]:
        options: dict[str, Any] = {"step_extensions": extensions, "backend": backend}
        return make_trainer(tmp_path / name, rollback(), checkpointer, **options)

    trainer, seen = make("whole")
    whole = trainer.fit(data, epochs=1)
    assert restored(seen) == [(30, 20), (36, 20)]
    for step in (1, 10, 21, 26, 30, 33, 40):
        resumed, again = make(str(step))
        result = resumed.fit(data, epochs=1, resume=step)
        assert restored(again) == [pair for pair in restored(seen) if pair[0] > step], step
        assert str(losses(again)) == str({k: v for k, v in losses(seen).items() if k > step}), step
        assert weight(resumed) == weight(trainer), step
        assert result.stop_reason == whole.stop_reason
        averages = jax.tree.leaves(trainer.extension_states())
        assert len(averages) == len(extensions)
        assert all(map(np.array_equal, jax.tree.leaves(resumed.extension_states()), averages))


def test_the_good_snapshot_lies_in_a_checkpoint_on_disk_too(tmp_path: Path) -> None:
    def make() -> et.Trainer:
        checkpointer = subs.Checkpointer("checkpoints", every=28, max_to_keep=None)
        return make_trainer(tmp_path, rollback(), checkpointer, step_extensions=[et.EMA(0.5)])[0]

    whole = make()
    whole.fit(batches(40, 25), epochs=1)
    resumed = make()  # from a state that is bad, with the rollback on its way
    resumed.fit(batches(40, 25), epochs=1, resume=28)
    assert (resumed.step, weight(resumed), weight(whole)) == (40, 25.0, 25.0)
    averages = jax.tree.leaves(whole.extension_states())
    assert all(map(np.array_equal, jax.tree.leaves(resumed.extension_states()), averages))


def test_an_interrupted_run_keeps_its_snapshots_for_the_next(tmp_path: Path) -> None:
    policy = rollback()
    trainer, seen = make_trainer(tmp_path, policy)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: event.step == 28)
    async def interrupt(event: et.StepCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    trainer.fit(batches(100, 25), epochs=1)  # the rollback was due at 30
    assert math.isnan(weight(trainer))
    policy.load_state_dict(policy.state_dict())
    trainer.fit(batches(40, first=29), epochs=1)
    assert restored(seen) == [(35, 20)]  # step 31 is the first that is looked at again


def test_every_fit_begins_anew_unless_a_state_was_loaded(tmp_path: Path) -> None:
    policy = rollback(max_rollbacks=1)
    trainer, seen = make_trainer(tmp_path, policy)
    for _ in range(3):
        assert trainer.fit(batches(40, 25), epochs=1).stop_reason == "completed"
    assert restored(seen) == [(30, 20), (70, 60), (110, 100)]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"version": 7}, "version 7"),
        ({"version": 1, "good": 2}, "good"),
        ({"version": 1, "candidate": [0, -1]}, "candidate"),
        ({"version": 1, "rollbacks": "many"}, "rollbacks"),
        ({"version": 1, "surplus": 1}, "surplus"),
    ],
)
def test_a_state_that_cannot_be_taken_over_is_refused_by_the_key(state: dict[str, Any], named: str) -> None:
    with pytest.raises(et.StateError, match=named):
        subs.TerminateOnNaN().load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"action": "explode"},
        {"snapshot_every": 0},
        {"lr_factor": 0.0},
        {"lr_factor": 1.5},
        {"lr_factor": math.nan},
        {"max_rollbacks": -1},
        {"lag": None, "action": "rollback"},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.TerminateOnNaN(**options)
    assert next(iter(options)) in str(caught.value)
