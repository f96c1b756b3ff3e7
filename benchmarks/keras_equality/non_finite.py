"""Compares TerminateOnNaN with Keras': the step that each names as the first with a NaN or infinite loss."""

from __future__ import annotations

import contextlib
import io
import math
import random
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import anyio

import eventtrain as et
from benchmarks.keras_equality.reference import CallbackList, keras, model
from eventtrain import subscribers as subs
from eventtrain.testing import ScriptedStep


@dataclass(frozen=True)
class NonFiniteCase:
    """One run.

    Attributes:
        losses: one per step.
        steps_per_epoch: Keras counts the batches of an epoch; eventtrain counts steps.
        raises: Keras' ``raise_error``, our ``action="raise"``.
        lag: number of steps after which ours stops, the only difference.
        through_fit: whether ours is a real run.
    """

    losses: tuple[float, ...]
    steps_per_epoch: int
    raises: bool
    lag: int
    through_fit: bool


def make_case(seed: int, *, through_fit: bool) -> NonFiniteCase:
    """Returns the case of this seed; in one of five, all losses are finite."""
    rng = random.Random(seed)
    steps_per_epoch = rng.randint(1, 8)
    share = rng.choice((0.0, 0.05, 0.1, 0.2, 0.5))
    odd = (math.nan, math.inf, -math.inf)
    losses = tuple(
        rng.choice(odd) if rng.random() < share else rng.choice((0.5, -1.0, 3e38))
        for _ in range(steps_per_epoch * rng.randint(1, 6))
    )
    return NonFiniteCase(losses, steps_per_epoch, rng.random() < 0.3, rng.choice((0, 1, 5, 64)), through_fit)


def compare(case: NonFiniteCase) -> int | None:
    """Returns the first bad step, counted from 1, if both name the same; None if there is none.

    Raises:
        AssertionError: they name different steps, or our run does not stop ``lag`` steps later.
    """
    theirs = by_keras(case)
    mine = through_fit(case) if case.through_fit else anyio.run(through_handlers, case)
    if mine != theirs:
        raise AssertionError(f"The first bad step is {mine}, Keras' is {theirs}; in {case}")
    return theirs


def by_keras(case: NonFiniteCase) -> int | None:
    """Returns the step at whose end Keras' callback ended the run."""
    subject = model()
    subject.stop_training = False
    callbacks = CallbackList([keras.callbacks.TerminateOnNaN(raise_error=case.raises)], model=subject)
    callbacks.on_train_begin()
    for index, loss in enumerate(case.losses):
        epoch, batch = divmod(index, case.steps_per_epoch)
        if batch == 0:
            callbacks.on_epoch_begin(epoch)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a message when it stops
                callbacks.on_train_batch_end(batch, {"loss": loss})
        except RuntimeError as error:
            return epoch * case.steps_per_epoch + _number(r"at batch (\d+)", error) + 1
        if subject.stop_training:
            return index + 1
    return None


async def through_handlers(case: NonFiniteCase) -> int | None:
    """Returns the step that our policy's handler names."""
    policy = _make_policy(case)
    reasons: list[str] = []

    class Control:
        def stop(self, reason: str) -> None:
            reasons.append(reason)

    control: Any = Control()
    for index, loss in enumerate(case.losses):
        epoch, batch = divmod(index, case.steps_per_epoch)
        event = et.StepCompleted(step=index + 1, epoch=epoch, batch=batch, metrics={"loss": loss})
        try:
            await policy.handle(event, control)
        except et.NonFiniteMetric as error:
            return _number(r"at step (\d+)", error)
    return _number(r"at step (\d+)$", reasons[0]) if reasons else None


def through_fit(case: NonFiniteCase) -> int | None:
    """Returns the step that a real run names; the run must end ``lag`` steps later."""
    script = ScriptedStep({"loss": case.losses}, steps_per_epoch=case.steps_per_epoch)
    epochs = len(case.losses) // case.steps_per_epoch
    with tempfile.TemporaryDirectory() as folder:
        trainer = et.Trainer(script.step_fn, script.state, subscribers=[_make_policy(case)], run_dir=folder)
        stops: list[str] = []
        trainer.on(et.CommandApplied | et.CommandRejected)(lambda event: stops.append(event.command.reason))
        try:
            result = trainer.fit(script.data, epochs=epochs, progress=False)
        except et.SubscriberError as error:
            return _number(r"at step (\d+)", error)
    bad = _number(r"at step (\d+)$", stops[0]) if stops else None
    last = len(case.losses) if bad is None else min(bad + case.lag, len(case.losses))
    if result.step != last:
        raise AssertionError(f"The run ended after step {result.step} instead of {last}; in {case}")
    return bad


def _make_policy(case: NonFiniteCase) -> subs.TerminateOnNaN:
    return subs.TerminateOnNaN("raise" if case.raises else "stop", lag=case.lag)


def _number(pattern: str, text: object) -> int:
    found = re.search(pattern, str(text))
    assert found is not None, text
    return int(found[1])
