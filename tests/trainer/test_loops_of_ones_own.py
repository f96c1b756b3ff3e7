"""Reinforcement learning in a session: the loop belongs to the user, who reads and replaces the state between steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from tests.support import agents
from tests.support.models import batches, make_trainer, record
from tests.support.saved_in_memory import MemoryCheckpointer

STEPS = 40


def as_session(collect: Callable[[Any], Any], sync: bool) -> Callable[[et.Trainer, Any], None]:
    def run(trainer: et.Trainer, resume: Any) -> None:
        with trainer.session(resume=resume) as session:
            for _ in range(session.step_count, STEPS):
                session.step(collect(session.state))
                if sync and session.step_count % agents.SYNC == 0:
                    session.state = session.state._replace(target=session.state.params)

    return run


def as_bare_loop(
    state: Any, step_fn: Any, collect: Callable[[Any], Any], sync: bool
) -> tuple[Any, list[Any]]:
    step, losses = jax.jit(step_fn), []
    for index in range(STEPS):
        state, metrics = step(state, collect(state))
        losses.append(metrics["loss"].item())
        if sync and (index + 1) % agents.SYNC == 0:
            state = state._replace(target=state.params)
    return state, losses


def same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "step_fn", "collect", "sync"),
    [
        (agents.new_dqn, agents.dqn_step, agents.interact, True),
        (agents.new_ppo, agents.ppo_step, agents.rollout, False),
    ],
    ids=["dqn", "ppo"],
)
def test_an_agent_has_the_numbers_of_its_bare_loop_and_resumes_bit_for_bit(
    tmp_path: Path, new: Any, step_fn: Any, collect: Any, sync: bool
) -> None:
    run = as_session(collect, sync)

    def trainer_with(checkpointer: MemoryCheckpointer) -> et.Trainer:
        checkpointer.name = "memory"
        return et.Trainer(step_fn, new(), subscribers=[checkpointer], run_dir=tmp_path)

    checkpointer = MemoryCheckpointer(every=10)
    trainer = trainer_with(checkpointer)
    steps = record(trainer, et.StepCompleted)
    run(trainer, False)
    state, losses = as_bare_loop(new(), step_fn, collect, sync)
    same(trainer.state, state)
    assert [event.metrics["loss"] for event in steps] == losses

    resumed = trainer_with(checkpointer)
    again = record(resumed, et.StepCompleted)
    run(resumed, 20)
    same(resumed.state, state)
    assert [event.metrics["loss"] for event in again] == losses[20:]


def test_a_state_that_was_read_stays_valid_and_costs_no_wait(tmp_path: Path) -> None:
    trainer, read = make_trainer(tmp_path), []
    with trainer.session() as session:
        for batch in batches(4):
            read.append(session.state["params"]["w"])
            session.step(batch)
        assert session.state["params"]["w"] is session.state["params"]["w"]
        read.append(session.state["params"]["w"])
    plain = make_trainer(tmp_path / "plain")
    with plain.session() as session:
        for batch, found in zip(batches(4), read, strict=False):
            np.testing.assert_array_equal(found, session.state["params"]["w"])
            session.step(batch)
    np.testing.assert_array_equal(trainer.state["params"]["w"], read[-1])


def test_a_replaced_state_is_the_one_that_the_next_step_and_commands_see(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    changed, steps = record(trainer, et.HyperparamChanged), record(trainer, et.StepCompleted)
    data = batches(3)
    with trainer.session() as session:
        session.step(data[0])
        opt_state = session.state["opt_state"]
        rates = {**opt_state.hyperparams, "learning_rate": jnp.asarray(0.125)}  # weakly typed
        params = {"w": np.ones(3, np.float32)}
        session.state = {"params": params, "opt_state": opt_state._replace(hyperparams=rates)}
        assert session.control.hyperparams["learning_rate"] == 0.125
        session.control.scale_hyperparam("learning_rate", 0.5)
        session.step(data[1])
        compiled = trainer._model.compiled
        assert compiled is not None
        assert compiled.compilations == 1
    assert changed[0].old == 0.125
    assert steps[1].metrics["rate"] == 0.0625
    expected = np.mean((np.asarray(data[1]["x"]).sum(1) - np.asarray(data[1]["y"])) ** 2)
    assert steps[1].metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("begun", [False, True])
def test_a_state_of_another_kind_is_refused_by_name_and_the_run_goes_on(tmp_path: Path, begun: bool) -> None:
    trainer = make_trainer(tmp_path)
    with trainer.session() as session:
        if begun:
            session.step(batches(1)[0])
        for params, words in (
            ({"w": jnp.zeros(4)}, r"\['w'\] is float32\[4\]"),
            ({"v": jnp.zeros(3)}, "was added"),
        ):
            with pytest.raises(et.StateError, match=words):
                session.state = {**session.state, "params": params}
        assert session.step(batches(1)[0])
    assert trainer.step == 1 + begun


def test_a_session_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    data = batches(4)

    def run(checkpointer: MemoryCheckpointer, resume: Any) -> tuple[et.Trainer, list[Any]]:
        checkpointer.name = "memory"
        trainer = make_trainer(tmp_path, subscribers=[checkpointer])
        seen = record(trainer, et.EpochStarted, et.EpochCompleted)
        with trainer.session(resume=resume) as session:
            for epoch in range(session.epoch, 3):
                for batch in data[session.batch :]:
                    session.step(batch)
                session.end_epoch()
                assert session.epoch == epoch + 1
        return trainer, [(event.kind, event.step) for event in seen]

    checkpointer = MemoryCheckpointer(every=3)
    whole, events = run(checkpointer, False)
    resumed, repeated = run(checkpointer, 6)
    same(resumed.state, whole.state)
    assert repeated == events[3:]


def test_a_session_that_was_stopped_for_good_trains_nothing_more(tmp_path: Path) -> None:
    def session_of(checkpointer: MemoryCheckpointer, resume: Any) -> int:
        checkpointer.name = "memory"
        trainer = make_trainer(tmp_path, subscribers=[checkpointer])
        with trainer.session(resume=resume) as session:
            for batch in batches(3):
                session.step(batch)
            session.control.stop("enough")
        return trainer.step

    checkpointer = MemoryCheckpointer(at_end=True)
    assert session_of(checkpointer, False) == 3
    checkpointer.saved[True] = checkpointer.saved[3]
    assert session_of(checkpointer, True) == 3
    assert session_of(checkpointer, 3) == 6


def test_a_session_without_a_checkpointer_cannot_resume(tmp_path: Path) -> None:
    with (
        pytest.raises(et.ConfigurationError, match="requires a Checkpointer"),
        make_trainer(tmp_path).session(resume=True),
    ):
        pass
