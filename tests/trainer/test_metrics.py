"""Metrics that are no means, end to end: with state, with reductions of their own, derived from others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import record
from tests.support.saved_in_memory import MemoryCheckpointer
from tests.support.stateful_metrics import Confusion, measured, scored, uneven

STATE = {"w": jnp.zeros(())}


def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    w = state["w"] + 1
    return {"w": w}, {
        "loss": 1 / w,
        "examples": et.Sum(batch["label"].shape[0]),
        "aux": et.Mean(jnp.where(w % 2 == 0, w, jnp.nan), weight="examples"),
        "peak": et.Max(w),
        "rate": et.Last(jnp.where(w < 4, w / 8, jnp.nan)),
    }


def make(tmp_path: Path, **options: Any) -> et.Trainer:
    return et.Trainer(step_fn, STATE, eval_fn=measured, run_dir=tmp_path, **options)


def test_metrics_with_state_are_in_the_events_of_evaluations_and_epochs(tmp_path: Path) -> None:
    trainer, examples = make(tmp_path, weight="examples"), scored()
    seen = record(trainer, et.EvalCompleted, et.EpochCompleted)
    trainer.fit(uneven(examples), epochs=2, eval_data=uneven(examples))
    first, epoch = seen[:2]
    expected = confusion_matrix(examples["class"], examples["predicted"])
    assert first.arrays["confusion"].tolist() == expected.tolist()
    assert first.metrics["f1"] == pytest.approx(f1_score(examples["label"], examples["score"] > 0.5))
    assert first.metrics["score"] == pytest.approx(examples["score"].mean(dtype=np.float64), abs=1e-7)
    assert epoch.metrics["val_f1"] == first.metrics["f1"]
    assert "val_confusion" not in epoch.metrics
    assert seen[2].metrics == first.metrics  # the second evaluation begins anew
    assert et.parse_event(first.model_dump_json()) == first
    assert trainer.evaluate(uneven(examples, (20,)))["auc"] == pytest.approx(first.metrics["auc"])


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_an_epoch_has_what_the_step_says_of_each_metric(tmp_path: Path, steps_per_call: int) -> None:
    trainer = make(tmp_path, steps_per_call=steps_per_call)
    seen = record(trainer, et.StepCompleted)
    metrics = trainer.fit(uneven(scored()), epochs=1).history[0].metrics
    assert metrics["examples"] == 20
    assert metrics["aux"] == pytest.approx((2 * 5 + 4 * 1) / 6)
    assert (metrics["peak"], metrics["rate"]) == (4, 3 / 8)
    assert metrics["loss"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert [event.metrics["examples"] for event in seen] == [7, 5, 7, 1]
    assert ["aux" in event.metrics for event in seen] == [False, True, False, True]


def test_policies_see_derived_values(tmp_path: Path) -> None:
    derive = {"perplexity": lambda means: math.exp(means["loss"]), "error": lambda means: 1 - means["f1"]}
    policy = subs.EarlyStopping("perplexity", mode="min", stopping_threshold=math.exp(0.2))
    trainer = make(tmp_path, derive=derive, subscribers=[policy])
    result = trainer.fit(uneven(scored()), epochs=9, eval_data=uneven(scored()))
    assert "better than the stopping threshold" in result.stop_reason
    last = result.history[-1].metrics
    assert last["perplexity"] == math.exp(last["loss"])
    assert last["val_error"] == 1 - last["val_f1"]
    assert "val_perplexity" not in last
    assert "error" not in last


def test_what_cannot_be_derived_from_is_refused_by_name() -> None:
    with pytest.raises(et.ConfigurationError, match=r"derive=\{'x': 3\}"):
        et.Trainer(step_fn, STATE, derive={"x": 3})  # type: ignore[dict-item]


def test_each_set_of_eval_data_has_its_metrics_and_policies_monitor_any(tmp_path: Path) -> None:
    sets = {"clean": uneven(scored()), "noisy": uneven(scored(), (12, 8))[::-1]}
    policy = subs.EarlyStopping("val_noisy_f1", mode="max", patience=2)
    trainer = make(tmp_path, weight="examples", derive={"error": lambda m: 1 - m["f1"]}, subscribers=[policy])
    seen = record(trainer, et.EvalStarted, et.EvalStepCompleted, et.EvalCompleted)
    result = trainer.fit(uneven(scored()), epochs=9, eval_data=sets)
    assert "val_noisy_f1 has not improved" in result.stop_reason
    kinds = [event.kind for event in seen]
    assert kinds[:8] == ["eval_started", *["eval_step_completed"] * 6, "eval_completed"]
    assert [event.batch for event in seen[1:7]] == list(range(6))
    assert seen[1].metrics.keys() == {"clean_score", "clean_examples"}
    assert seen[6].metrics.keys() == {"noisy_score", "noisy_examples"}
    done = seen[7]
    alone = trainer.evaluate(sets["clean"])
    assert {name: done.metrics[f"clean_{name}"] for name in alone} == alone
    assert (done.steps, done.metrics["noisy_examples"]) == (6, 20)
    assert done.arrays.keys() == {"clean_confusion", "noisy_confusion"}
    assert result.history[0].metrics["val_noisy_error"] == 1 - result.history[0].metrics["val_noisy_f1"]
    assert trainer.evaluate(sets) == done.metrics


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "empty mapping"),
        ({"a b": [1]}, "named 'a b'"),
        ({"clean": uneven(scored()), "noisy": []}, "evaluation data 'noisy' is empty"),
    ],
)
def test_sets_that_cannot_be_evaluated_are_refused_by_name(tmp_path: Path, sets: Any, message: str) -> None:
    trainer = make(tmp_path)
    for evaluate in (trainer.evaluate, lambda data: trainer.fit(uneven(scored()), epochs=1, eval_data=data)):
        with pytest.raises(et.DataError, match=message):
            evaluate(sets)


def counting_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    w = state["w"] + 1
    return {"w": w}, {"loss": 1 / w, "confusion": Confusion.of(batch["predicted"], batch["class"])}


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 2}, {"step_extensions": [et.EMA(0.5)]}])
def test_metrics_with_state_of_the_step_are_merged_over_an_epoch(tmp_path: Path, options: Any) -> None:
    trainer = et.Trainer(counting_step, STATE, params=lambda state: state, run_dir=tmp_path, **options)

    @trainer.on(et.EpochStarted, lag=0)
    async def keep(event: et.EpochStarted, control: et.Control) -> None:
        control.restore("kept") if event.epoch else control.snapshot("kept")

    examples = scored()
    history = trainer.fit(uneven(examples), epochs=3).history
    expected = confusion_matrix(examples["class"], examples["predicted"]).tolist()
    assert [event.arrays["confusion"].tolist() for event in history] == [expected] * 3
    assert trainer.state["w"] == 4  # the state of the snapshot was restored, and not the metrics
    again = trainer.fit(uneven(examples), epochs=1).history
    assert again[0].arrays["confusion"].tolist() == expected
    assert trainer.extension_states().keys() == ({"ema"} if "step_extensions" in options else set())


@pytest.mark.parametrize("options", [{}, {"step_extensions": [et.EMA(0.5)]}])
def test_an_epoch_that_was_cut_goes_on_with_the_states_of_its_metrics(tmp_path: Path, options: Any) -> None:
    def run(name: str, checkpointer: MemoryCheckpointer, **resume: Any) -> list[et.EpochCompleted]:
        trainer = et.Trainer(
            counting_step,
            STATE,
            params=lambda state: state,
            subscribers=[checkpointer],
            run_dir=tmp_path / name,
            **options,
        )
        return trainer.fit(uneven(scored()), epochs=2, **resume).history

    checkpointer = MemoryCheckpointer(every=3)
    whole = run("whole", checkpointer)
    for step in (3, 6):
        history = run(f"from {step}", checkpointer, resume=step)
        counts = [[event.arrays["confusion"].tolist() for event in run] for run in (history, whole)]
        assert counts[0] == counts[1][-len(history) :]
        assert len(history) == 2 - step // 4
