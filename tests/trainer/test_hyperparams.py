"""Hyperparameters of the step itself, beside those of optax: changed, recorded and resumed like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, new_state, record, step_fn


def two_temperatures(state: Any, batch: Any) -> tuple[Any, Any]:
    new, metrics = step_fn({name: state[name] for name in ("params", "opt_state")}, batch)
    used = {name: state[name]["temperature"] for name in ("teacher", "student")}
    return {**state, **new}, {**metrics, **used}


def make(tmp_path: Path, *subscribers: et.Subscriber) -> et.Trainer[Any]:
    pairs = {name: et.hyperparams(temperature=value) for name, value in (("teacher", 1.0), ("student", 2.0))}
    return et.Trainer(
        two_temperatures,
        {**new_state(), **pairs},
        subscribers=[subs.Checkpointer("ck", every=4), *subscribers],
        run_dir=tmp_path,
    )


def test_a_parameter_of_the_step_is_changed_by_path_without_compiling_and_resumed(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    changes, steps = record(trainer, et.HyperparamChanged), []

    @trainer.on(et.StepCompleted, lag=1)
    async def change(event: et.StepCompleted, control: et.Control) -> None:
        steps.append((event.step, event.metrics["teacher"], event.metrics["student"]))
        if event.step == 1:
            control.set_hyperparam("temperature", 0.25, path="teacher")
            control.scale_hyperparam("temperature", 4, path="student")

    trainer.fit(batches(5), epochs=1)
    assert trainer._model.compiled is not None
    assert trainer._model.compiled.compilations == 1
    assert steps == [(1, 1.0, 2.0), (2, 1.0, 2.0), (3, 0.25, 8.0), (4, 0.25, 8.0), (5, 0.25, 8.0)]
    assert [(event.step, event.path, event.new) for event in changes] == [
        (2, "['teacher'].hyperparams['temperature']", 0.25),
        (2, "['student'].hyperparams['temperature']", 8.0),
    ]
    again = make(tmp_path)
    again.fit(batches(5), epochs=2, resume=4)
    assert again.control.hyperparams["['teacher'].hyperparams['temperature']"] == 0.25
    assert again.state["student"]["temperature"].item() == 8.0


def test_a_schedule_sets_a_parameter_of_the_step(tmp_path: Path) -> None:
    schedule = subs.HyperparamScheduler("temperature", lambda epoch: 1.0 + epoch, path="['teacher']")
    trainer = make(tmp_path, schedule)
    seen = record(trainer, et.EpochCompleted)
    trainer.fit(batches(2), epochs=3)
    path = "['teacher'].hyperparams['temperature']"
    assert [event.hyperparams[path] for event in seen] == [1.0, 2.0, 3.0]
