"""A program that trains, with mistakes that a type checker has to report. See ``test_typing.py`` for the marks."""

# fmt: off

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, reveal_type

import jax
import jax.numpy as jnp

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.testing import RecordingSubscriber


class State(NamedTuple):
    weights: jax.Array
    updates: jax.Array


class Batch(NamedTuple):
    x: jax.Array


def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    return state._replace(updates=state.updates + 1), {"loss": jnp.mean(batch.x * state.weights)}


def returns_no_metrics(state: State, batch: Batch) -> State:
    return state


state = State(jnp.zeros(4), jnp.zeros(()))
trainer = et.Trainer(train_step, state)
reveal_type(trainer)  # T Trainer[State]
et.Trainer(returns_no_metrics, state)  # E reportArgumentType: "State" is not assignable to "tuple[
et.Trainer(train_step, {"weights": 1})  # E reportArgumentType: "dict[str, int]"
et.Trainer(train_step, state, step_per_call=16)  # E reportCallIssue: No parameter named "step_per_call"
et.Trainer(train_step, state, subscribers=[train_step])  # E reportArgumentType: is not assignable to "Subscriber"


# --- handlers -----------------------------------------------------------------------------------------------------


@trainer.on(et.EpochCompleted)
async def reports(event: et.EpochCompleted) -> None:
    print(event.metrics["loss"], event.accuracy)  # E reportAttributeAccessIssue: attribute "accuracy"


@trainer.on(et.StepCompleted, every=100, lag=50)
async def decides(event: et.StepCompleted, control: et.Control) -> None:
    control.scale_hyperparam("learning_rate", "0.5")  # E reportArgumentType: "Literal['0.5']" is not assignable
    control.set_learning_rate(0.5)  # E reportAttributeAccessIssue: attribute "set_learning_rate"
    reveal_type(await control.stop("enough").result())  # T CommandApplied


@trainer.on(et.StepCompleted, lag={et.StepCompleted: 3})  # E reportArgumentType: "Control" is not assignable to "float"
async def takes_another_control(event: et.StepCompleted, control: float) -> None: ...


@trainer.on(et.EpochCompleted)  # E reportArgumentType: "EpochCompleted" is not assignable to "StepCompleted"
async def handles_another_event(event: et.StepCompleted, control: et.Control) -> None: ...


@trainer.on(et.StepCompleted, evry=10)  # E reportCallIssue: No overloads for "on"
async def has_a_misspelt_option(event: et.StepCompleted) -> None: ...


@trainer.on(et.EpochCompleted, with_state=True)
async def looks_at_the_state(event: et.EpochCompleted, state: State) -> None:
    print(state.weights, state.bias)  # E reportAttributeAccessIssue: attribute "bias" for class "State"


@trainer.on(et.EpochCompleted, with_state=True)  # E reportArgumentType: is not assignable to "int"
async def takes_another_state(event: et.EpochCompleted, state: int) -> None: ...


def runs_its_own_loop() -> None:
    with trainer.session(resume=True) as session:
        reveal_type(session.state)  # T State
        session.state = {"weights": 1}  # E reportAttributeAccessIssue: "dict[str, int]"


# --- subscribers --------------------------------------------------------------------------------------------------


class Watcher(et.Subscriber):
    every = 10
    lag = "soon"  # E reportAssignmentType: "Literal['soon']"
    timeout_s = "3"  # E reportAssignmentType: "Literal['3']"

    async def start(self, run: et.RunContext) -> None:
        self.path = run.run_dir / "watched.txt"
        run.publish_blocking(et.AlertRaised(name="hot", severity="bad"))  # E reportArgumentType: "Literal['bad']"
        print(run.total_step)  # E reportAttributeAccessIssue: attribute "total_step" for class "RunContext"

    def state_dict(self) -> list[str]:  # E reportIncompatibleMethodOverride: "state_dict" overrides
        return []


subs.EarlyStopping("val_loss", patience="3")  # E reportArgumentType: "Literal['3']" is not assignable to "int"
subs.CSVLogger(Path("steps.csv"), flush=3)  # E reportCallIssue: No parameter named "flush"


# --- results ------------------------------------------------------------------------------------------------------


def uses_results() -> None:
    result = trainer.fit([Batch(jnp.zeros(4))], epochs=3)
    reveal_type(result.state)  # T State
    reveal_type(trainer.state)  # T State
    print(result.state.weights, result.history[-1].metrics["loss"])
    print(result.state.bias)  # E reportAttributeAccessIssue: Cannot access attribute "bias" for class "State"
    print(result.state["weights"])  # E reportCallIssue: No overloads for "__getitem__"
    print(result.loss)  # E reportAttributeAccessIssue: Cannot access attribute "loss" for class "FitResult[State]"
    trainer.fit([], epoch=3)  # E reportCallIssue: No parameter named "epoch"
    recorder = RecordingSubscriber(et.StepCompleted)
    reveal_type(recorder.of(et.StepCompleted))  # T list[StepCompleted]


async def waits() -> None:
    result = await trainer.fit_async([], steps=10)
    reveal_type(result)  # T FitResult[State]
    reveal_type(await trainer.bus.wait_for(et.EvalCompleted))  # T EvalCompleted
    try:
        await trainer.control.pause().result()
    except et.CommandRejectedError as refused:
        print(refused.reason, refused.step)  # E reportAttributeAccessIssue: attribute "step" for class "Command
