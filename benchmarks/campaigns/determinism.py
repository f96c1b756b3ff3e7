"""Decisions with a finite lag are the same in every rerun, however late handlers are and however busy the machine is.

A small regression runs with all policies, some of them on one hyperparameter. An undisturbed run gives the reference
log and state. A trial delays every handler and every batch at random while a thread burns CPU. The same with
``lag=None`` must give a different run; otherwise the delays would prove nothing. (20 undisturbed runs on a busy machine
had 2 different orders of arrival, and 8 disturbed runs had 8.)
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eventtrain as et
from benchmarks.campaign import Campaign
from eventtrain import subscribers as subs
from eventtrain.testing import RecordingSubscriber

EPOCHS, STEPS_PER_EPOCH = 12, 12
BAD_STEP, SPIKES = 41, (20, 33, 64, 77)
DELAYED, LONGEST_DELAY_S = 0.1, 0.02
"""Share of the handler calls that are delayed, and the maximum delay."""

OPTIMISER = optax.inject_hyperparams(optax.sgd)(learning_rate=0.05, momentum=0.5)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
    updates, opt_state = OPTIMISER.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    rate = state["opt_state"].hyperparams["learning_rate"]
    metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grads["w"]), "rate": rate}
    return {"params": params, "opt_state": opt_state}, metrics


def eval_fn(state: Any, batch: Any) -> dict[str, jax.Array]:
    return {"loss": loss_fn(state["params"], batch)}


@cache
def batches() -> Sequence[Any]:
    """Returns all batches of the run, on the device: noise, with some outliers and one NaN."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EPOCHS * STEPS_PER_EPOCH, 8, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32) + generator.normal(size=x.shape[:2]).astype(np.float32)
    for step in SPIKES:
        y[step - 1] *= 30
    y[BAD_STEP - 1] = np.nan
    return [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]


# --- the deciders ------------------------------------------------------------------------------------------------


def policies() -> list[Any]:
    """Returns all policies that decide by events. (MaxTime uses the clock, which a rerun does not repeat.)"""
    by_steps = subs.ReduceLROnPlateau("loss", factor=0.9, patience=5, cooldown=4, patience_unit="steps")
    by_steps.name, by_steps.lag = "plateau of steps", 9
    return [
        subs.EarlyStopping("val_loss", patience=6, min_delta=0.05, restore_best_weights=True),
        subs.ReduceLROnPlateau("val_loss", factor=0.7, patience=2, patience_unit="evaluations"),
        by_steps,
        subs.GradientSpike(window=16, warmup=8, quantile=0.9, factor=0.6, cooldown=10, lag=7),
        subs.TerminateOnNaN("rollback", snapshot_every=8, lag=5),
        subs.HyperparamScheduler("momentum", optax.cosine_decay_schedule(0.9, 100), by="step", lag=8),
        Faster(),
        Turns(),
    ]


class Faster(et.Subscriber):
    """A decider as users write it: every third step, from the loss."""

    events = et.StepCompleted
    every = 3
    lag = 6

    async def handle(self, event: et.StepCompleted, control: et.Control) -> None:
        """Raises the learning rate a little."""
        loss = event.metrics["loss"]
        if math.isfinite(loss):
            control.scale_hyperparam("learning_rate", 1.0 + 0.05 / (1.0 + loss), maximum=0.2)


class Turns(et.Subscriber):
    """A decider with two kinds of events and two lags."""

    events = et.EpochStarted | et.StepCompleted
    lag = {et.EpochStarted: 0, et.StepCompleted: 11}  # noqa: RUF012  # read only

    async def handle(self, event: et.EpochStarted | et.StepCompleted, control: et.Control) -> None:
        """Changes the rate in every second epoch, and reduces it at every fifth step."""
        if isinstance(event, et.EpochStarted):
            control.scale_hyperparam("learning_rate", 1.1 if event.epoch % 2 else 0.9)
        elif event.step % 5 == 0:
            control.scale_hyperparam("learning_rate", 0.97)


def without_lag(deciders: Sequence[Any]) -> None:
    """Removes the lag, so that decisions take effect when they arrive. (The policies left out refuse that.)"""
    for decider in deciders:
        if not isinstance(decider, subs.TerminateOnNaN | subs.HyperparamScheduler | subs.EarlyStopping):
            decider.lag = None


# --- one run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        sequence: the training sequence with its commands, as JSON without the fields that depend on the clock.
        state: the bits of the final state, and the states of the policies.
        arrivals: the handler calls that decided something, as subscriber, event and step, in the order in which they
            finished.
        end: the RunCompleted event.
    """

    sequence: tuple[str, ...]
    state: tuple[Any, ...]
    arrivals: tuple[tuple[str, str, int], ...]
    end: et.RunCompleted


def run(seed: int | None, *, lags: bool = True, backend: str = "asyncio") -> Outcome:
    """Trains once, disturbed at random unless ``seed`` is None, and optionally without lags."""
    deciders = policies()
    if not lags:
        without_lag(deciders)
    arrived: list[tuple[str, str, int]] = []
    recorder = RecordingSubscriber((*et.events.TRAINING_SEQUENCE, et.CommandConflict))
    for decider in deciders:
        be_late(decider, seed, arrived)
    params = {"w": jnp.zeros(3)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(
            step_fn,
            {"params": params, "opt_state": OPTIMISER.init(params)},
            eval_fn,
            subscribers=[*deciders, subs.EvaluateEvery(steps=STEPS_PER_EPOCH // 2), recorder],
            run_dir=folder,
            backend=backend,
        )
        with load(seed):
            result = trainer.fit(
                lambda epoch: late_batches(epoch, seed),
                epochs=EPOCHS,
                eval_data=batches()[:2],
                progress=False,
            )
    commands = [event.command for event in recorder.of(et.CommandApplied)]
    decided = {(c.cause.subscriber, c.cause.event, c.cause.step) for c in commands if c.cause is not None}
    return Outcome(
        sequence=tuple(repeatable(event) for event in recorder.recorded),
        state=(
            *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state)),
            *(json.dumps(decider.state_dict()) for decider in deciders),
        ),
        arrivals=tuple(arrival for arrival in arrived if arrival in decided),
        end=recorder.of(et.RunCompleted)[0],
    )


def be_late(decider: Any, seed: int | None, arrived: list[tuple[str, str, int]]) -> None:
    """Makes a subscriber wait before it handles an event, and records when it has finished."""
    name, handle = decider.name or type(decider).__name__, decider.handle
    generator = Random(f"{seed} {name}")

    async def late(event: et.Event, control: et.Control) -> None:
        if seed is not None and generator.random() < DELAYED:
            await anyio.sleep(generator.random() * LONGEST_DELAY_S)
        await handle(event, control)
        arrived.append((name, event.kind, event.step))

    decider.handle = late


def late_batches(epoch: int, seed: int | None) -> Iterator[Any]:
    """Yields the batches of one epoch, some of them late."""
    generator = Random(f"{seed} {epoch}")
    for batch in batches()[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]:
        if seed is not None and generator.random() < DELAYED:
            time.sleep(generator.random() * LONGEST_DELAY_S / 4)
        yield batch


@contextmanager
def load(seed: int | None) -> Generator[None]:
    """Runs a thread that burns CPU in bursts, unless ``seed`` is None."""
    if seed is None:
        yield
        return
    over, generator = threading.Event(), Random(f"{seed} load")

    def burn() -> None:
        while not over.wait(generator.random() * 0.005):
            until_s = time.perf_counter() + generator.random() * 0.005
            while time.perf_counter() < until_s:
                pass

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def repeatable(event: et.Event) -> str:
    """Returns an event as JSON, without the fields that a rerun does not repeat."""
    return event.model_dump_json(exclude={"run_id", "attempt", "seq", "time", "duration_s"})


# --- the trial ----------------------------------------------------------------------------------------------------


@cache
def undisturbed(lags: bool) -> Outcome:
    """Returns the reference run."""
    return run(None, lags=lags)


def trial(seed: int) -> Mapping[str, int]:
    """Runs with the disturbances of ``seed``, alternating between asyncio and trio.

    Raises:
        AssertionError: the run differs from the reference run; the message names the first difference.
    """
    backend = ("asyncio", "trio")[seed % 2]
    expected, found = undisturbed(True), run(seed, backend=backend)
    for number, (one, other) in enumerate(zip(found.sequence, expected.sequence, strict=False)):
        assert one == other, f"event {number} is {one}, in the reference run it is {other}; on {backend}"
    assert len(found.sequence) == len(expected.sequence), f"{len(found.sequence)} events; on {backend}"
    assert found.state == expected.state, f"the final states differ; on {backend}"
    assert found.end.deterministic, f"the run reports deterministic=False; on {backend}"
    free = run(seed, lags=False, backend=backend)
    return {
        "reordered": int(found.arrivals != expected.arrivals),
        "differs_without_lag": int(free.sequence != undisturbed(False).sequence),
        "commands": sum('"kind":"command_applied"' in event for event in found.sequence),
        "decisions": len(found.arrivals),
        f"on_{backend}": 1,
    }


CAMPAIGN = Campaign(
    name="determinism",
    trial=trial,
    trials=100,
    slice=10,
    batch=20,
    least={"reordered": 0.9, "differs_without_lag": 0.9},
)
