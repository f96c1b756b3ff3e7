"""EvaluateEvery: where evaluations happen, and what the events around them say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def make_trainer(tmp_path: Path, *policies: et.Subscriber, **options: Any) -> tuple[et.Trainer, list[Any]]:
    """A trainer whose evaluations give the number of steps taken, and the events that tell where they happened."""

    def step(state: Any, batch: Any) -> Any:
        return {"steps": state["steps"] + 1}, {"loss": batch}

    def evaluate(state: Any, batch: Any) -> Any:
        return {"steps": state["steps"]}

    trainer = et.Trainer(
        step,
        {"steps": jnp.zeros((), jnp.int32)},
        eval_fn=evaluate,
        subscribers=policies,
        run_dir=tmp_path,
        **options,
    )
    seen: list[Any] = []

    @trainer.on(
        et.StepCompleted | et.EvalStarted | et.EvalCompleted | et.EpochCompleted | et.RunCompleted, name="see"
    )
    async def see(event: et.Event) -> None:
        seen.append(event)

    return trainer, seen


def data(steps: int) -> list[np.float32]:
    return [np.float32(1.0)] * steps


EVAL_DATA = data(2)


def evaluated_at(seen: Sequence[Any]) -> list[int]:
    """The steps of all evaluations, each of which saw the state of that step."""
    completed = [event for event in seen if isinstance(event, et.EvalCompleted)]
    assert all(event.metrics["steps"] == event.step for event in completed)
    assert [event.step for event in seen if isinstance(event, et.EvalStarted)] == [e.step for e in completed]
    return [event.step for event in completed]


@BACKENDS
@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"steps": 4}, [4, 8, 12, 16, 20, 24, 28]),
        ({"steps": 10}, [10, 20, 30]),
        ({"steps": 1}, list(range(1, 31))),
        ({"steps": 31}, []),
        ({"epochs": 1}, [10, 20, 30]),
        ({"epochs": 2}, [20]),
        ({"steps": 4, "epochs": 1}, [4, 8, 10, 12, 16, 20, 24, 28, 30]),
        ({"steps": 4, "epochs": 2}, [4, 8, 12, 16, 20, 24, 28]),
    ],
)
def test_it_evaluates_at_exactly_these_steps_each_once(
    tmp_path: Path, when: dict[str, Any], steps: list[int], steps_per_call: int, backend: str
) -> None:
    trainer, seen = make_trainer(
        tmp_path, subs.EvaluateEvery(**when), steps_per_call=steps_per_call, backend=backend
    )
    trainer.fit(data(10), epochs=3, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == steps
    assert seen[-1].deterministic


def test_without_it_there_is_an_evaluation_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path)
    trainer.fit(data(10), epochs=3, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [10, 20, 30]


def test_several_that_meet_at_one_boundary_give_one_evaluation(tmp_path: Path) -> None:
    trainer, seen = make_trainer(
        tmp_path, subs.EvaluateEvery(steps=4), subs.EvaluateEvery(steps=6), subs.EvaluateEvery(epochs=1)
    )
    trainer.fit(data(12), epochs=2, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [4, 6, 8, 12, 16, 18, 20, 24]


def test_an_evaluation_stands_behind_its_step_and_before_the_end_of_its_epoch(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(steps=3))
    trainer.fit(data(6), epochs=1, eval_data=EVAL_DATA)
    assert [(event.kind, event.step) for event in seen] == [
        *(("step_completed", step) for step in (1, 2, 3)),
        ("eval_started", 3),
        ("eval_completed", 3),
        *(("step_completed", step) for step in (4, 5, 6)),
        ("eval_started", 6),
        ("eval_completed", 6),
        ("epoch_completed", 6),
        ("run_completed", 6),
    ]


def test_an_epoch_has_the_metrics_of_its_last_evaluation_and_none_without_one(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, subs.EvaluateEvery(steps=8))
    result = trainer.fit(data(5), epochs=4, eval_data=EVAL_DATA)
    assert [epoch.metrics.get("val_steps") for epoch in result.history] == [None, 8, None, 16]
    trainer, _ = make_trainer(tmp_path, subs.EvaluateEvery(steps=2))
    result = trainer.fit(data(5), epochs=2, eval_data=EVAL_DATA)
    assert [epoch.metrics.get("val_steps") for epoch in result.history] == [4, 10]


def test_the_epochs_are_counted_over_all_calls_of_fit(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(epochs=2))
    for _ in range(5):
        trainer.fit(data(3), epochs=1, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [6, 12]


def test_a_run_that_ends_within_an_epoch_evaluates_at_its_last_step_too(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(steps=4))
    trainer.fit(data(10), steps=8, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [4, 8]
    trainer.fit(data(10), steps=4, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [4, 8, 12]


@BACKENDS
def test_early_stopping_by_evaluations_stops_within_an_epoch(tmp_path: Path, backend: str) -> None:
    early = subs.EarlyStopping("val_steps", mode="min", patience=2, patience_unit="evaluations")
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(steps=3), early, backend=backend)
    result = trainer.fit(data(100), epochs=1, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == [3, 6, 9]
    assert (result.step, result.epochs_completed, early.best) == (9, 0, 3)


def test_your_own_loop_evaluates_at_these_steps_too(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(steps=3, epochs=1))
    with trainer.session(eval_data=EVAL_DATA) as session:
        for _ in range(2):
            for batch in data(4):
                assert session.step(batch)
            assert session.end_epoch()
    assert evaluated_at(seen) == [3, 4, 6, 8]


@pytest.mark.parametrize("fit", [dict[str, Any], lambda: {"eval_data": EVAL_DATA}])
def test_a_run_without_anything_to_evaluate_on_fails_at_its_start(
    tmp_path: Path, fit: Callable[[], dict[str, Any]]
) -> None:
    options = fit()
    trainer = et.Trainer(
        lambda state, batch: (state, {"loss": batch}),
        {"w": jnp.zeros(1)},
        eval_fn=None if options else lambda state, batch: {"loss": batch},
        subscribers=[subs.EvaluateEvery(steps=1)],
        run_dir=tmp_path,
    )
    with pytest.raises(et.ConfigurationError, match="eval_fn"):
        trainer.fit(data(1), epochs=1, **options)
    assert trainer.step == 0


@BACKENDS
def test_an_evaluation_by_the_clock_is_said_not_to_be_reproducible(tmp_path: Path, backend: str) -> None:
    trainer, seen = make_trainer(
        tmp_path, subs.EvaluateEvery(seconds=1e-9), flush_interval_s=1e-9, backend=backend
    )
    trainer.fit(data(6), epochs=1, eval_data=EVAL_DATA)
    assert evaluated_at(seen)[-1] == 6
    assert len(evaluated_at(seen)) >= 5  # each step is a window of its own
    assert not seen[-1].deterministic


def test_seconds_that_do_not_pass_change_nothing(tmp_path: Path) -> None:
    trainer, seen = make_trainer(tmp_path, subs.EvaluateEvery(seconds=1e6))
    trainer.fit(data(6), epochs=2, eval_data=EVAL_DATA)
    assert evaluated_at(seen) == []
    assert seen[-1].deterministic


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": True},
        {"steps": 1.5},
        {"epochs": -1},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
    ],
)
def test_what_is_not_positive_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(
        et.ConfigurationError, match=rf"EvaluateEvery\({next(iter(options))}=.* must be .*, got"
    ):
        subs.EvaluateEvery(**options)


def test_nothing_given_is_refused() -> None:
    with pytest.raises(et.ConfigurationError, match="would never evaluate"):
        subs.EvaluateEvery()
