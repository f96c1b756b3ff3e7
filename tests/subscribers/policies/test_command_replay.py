"""A run that was steered from outside is repeated bit for bit from its log, beside deciders, and over a resume."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, eval_fn, new_state, step_fn

DATA = batches(10)


def slow_batches(_: int) -> Iterator[Any]:
    for batch in DATA:
        time.sleep(0.003)
        yield batch


class Halve(et.Subscriber):
    """Sets the learning rate every few steps, so that the order of commands at one boundary matters."""

    events = et.StepCompleted
    every = 4
    lag = 3

    async def handle(self, event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.5 - event.step / 1000)


def new_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer[Any]:
    return et.Trainer(
        step_fn,
        new_state(),
        eval_fn=eval_fn,
        subscribers=[subs.JSONLLogger("events.jsonl"), Halve(), *subscribers],
        run_dir=run_dir,
        **options,
    )


def steer(trainer: et.Trainer[Any], until: int, *, restores: bool) -> threading.Thread:
    """Sends commands at random moments, as people do."""
    control, chance = trainer.control.with_source("dashboard"), random.Random(0)

    def send() -> None:
        while trainer.step < until:
            choice = chance.randrange(6 if restores else 4)
            if choice == 0:
                control.scale_hyperparam("learning_rate", chance.choice([0.5, 2.0]))
            elif choice == 1:
                control.set_hyperparam("learning_rate", chance.random())
            elif choice == 2:
                control.evaluate()
            elif choice == 3:
                control.pause()
            elif choice == 4:
                control.snapshot("kept")
            else:
                control.restore("kept")
            time.sleep(0.004)
            control.resume()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def commands(run_dir: Path) -> list[tuple[Any, ...]]:
    """The commands that took effect, but those that change no value."""
    return [
        (
            event.step,
            event.command.kind,
            event.command.source,
            event.command.cause and event.command.cause.step,
        )
        for event in et.read_events(run_dir, kinds=et.CommandApplied)
        if event.command.kind not in ("pause", "resume")
    ]


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def steered_run(run_dir: Path, *, restores: bool) -> tuple[Path, Any]:
    trainer = new_trainer(run_dir)
    thread = steer(trainer, 90, restores=restores)
    result = trainer.fit(slow_batches, steps=100, eval_data=DATA[:2], progress=False)
    thread.join()
    assert len(commands(run_dir)) > 15
    return run_dir, result.state


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return steered_run(tmp_path_factory.mktemp("steered"), restores=True)


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 4}, {"max_in_flight_steps": 1}], ids=str)
def test_a_steered_run_is_repeated_bit_for_bit(
    tmp_path: Path, steered: tuple[Path, Any], options: dict[str, Any]
) -> None:
    run_dir, state = steered
    trainer = new_trainer(tmp_path, subs.CommandReplay(run_dir), **options)
    result = trainer.fit(DATA, steps=100, eval_data=DATA[:2], progress=False)
    assert same(result.state, state)
    assert commands(tmp_path) == commands(run_dir)
    (ended,) = et.read_events(tmp_path, kinds=et.RunCompleted)
    assert ended.deterministic


class Outside(et.Subscriber):
    """Sends commands for the boundaries of ``Halve``, as someone outside might."""

    events = et.StepCompleted
    every = 4
    lag = 3

    async def handle(self, event: et.StepCompleted, control: et.Control) -> None:
        control.with_source("dashboard").scale_hyperparam("learning_rate", 0.5)


@pytest.mark.parametrize("first", [True, False])
def test_commands_of_one_boundary_are_repeated_in_their_order(tmp_path: Path, first: bool) -> None:
    both: list[et.Subscriber] = [Outside(), Halve()] if first else [Halve(), Outside()]
    log = subs.JSONLLogger("events.jsonl")
    steered = et.Trainer(step_fn, new_state(), subscribers=[log, *both], run_dir=tmp_path / "steered")
    state = steered.fit(DATA, steps=20, progress=False).state
    replay = new_trainer(tmp_path / "again", subs.CommandReplay(tmp_path / "steered"))
    assert same(replay.fit(DATA, steps=20, progress=False).state, state)
    assert commands(tmp_path / "again") == commands(tmp_path / "steered")
    assert [source for _, _, source, _ in commands(tmp_path / "again")][:2] == (
        ["dashboard", None] if first else [None, "dashboard"]
    )


def test_a_repeated_run_can_be_repeated(tmp_path: Path, steered: tuple[Path, Any]) -> None:
    run_dir, state = steered
    new_trainer(tmp_path / "a", subs.CommandReplay(run_dir)).fit(
        DATA, steps=100, eval_data=DATA[:2], progress=False
    )
    again = new_trainer(tmp_path / "b", subs.CommandReplay(tmp_path / "a"))
    assert same(again.fit(DATA, steps=100, eval_data=DATA[:2], progress=False).state, state)


def test_a_repeated_run_that_resumes_applies_each_command_once(tmp_path: Path) -> None:
    run_dir, state = steered_run(tmp_path / "steered", restores=False)

    def part(steps: int) -> et.FitResult[Any]:
        trainer = new_trainer(
            tmp_path / "again", subs.CommandReplay(run_dir), subs.Checkpointer("checkpoints", every=37)
        )
        return trainer.fit(DATA, steps=steps, eval_data=DATA[:2], resume=True, progress=False)

    part(45)
    assert same(part(100).state, state)
    assert commands(tmp_path / "again") == commands(run_dir)


def test_a_stop_is_repeated_but_not_that_of_an_attempt_that_was_continued(tmp_path: Path) -> None:
    for attempt, at in ((1, 12), (2, 25)):
        trainer = new_trainer(tmp_path / "one", subs.Checkpointer("checkpoints", every=10))
        control = trainer.control.with_source("control socket")

        async def stop(event: et.StepCompleted, at: int = at, outside: et.Control = control) -> None:
            if event.step == at:
                outside.stop(f"at {at}", final=False)

        trainer.on(et.StepCompleted, lag=0)(partial(stop))

        trainer.fit(slow_batches, steps=40, resume=attempt > 1, progress=False)
    trainer = new_trainer(tmp_path / "two", subs.CommandReplay(tmp_path / "one"))
    result = trainer.fit(DATA, steps=40, progress=False)
    assert result.stop_reason == "at 25"
    stops = list(et.read_events(tmp_path / "one", kinds=et.CommandApplied))
    assert result.step == next(e.step for e in stops if e.command.reason == "at 25")


def test_a_run_without_a_log_cannot_be_repeated(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, subs.CommandReplay(tmp_path / "missing"))
    with pytest.raises(et.ConfigurationError, match="does not exist"):
        trainer.fit(DATA, steps=3, progress=False)
