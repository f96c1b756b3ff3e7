"""History: epochs and steps as columns, equal to the events, also after a resume, in bounded memory."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.loggers.history import ColumnStore
from eventtrain.testing import RecordingSubscriber, ScriptedStep
from tests.support.models import batches, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer


def window(first: int, count: int, epoch: int = 0, **metrics: Any) -> et.StepsCompleted:
    last = first + count - 1
    columns = {name: np.asarray(values) for name, values in metrics.items()}
    return et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=epoch, metrics=columns)


def test_the_frames_equal_the_events(tmp_path: Path) -> None:
    script = ScriptedStep(
        {"loss": [3.0, float("nan"), float("inf"), -1.5, 2.5, 1.25]},
        eval_metrics={"loss": [1.0, 0.5]},
        steps_per_epoch=3,
        learning_rate=0.5,
    )
    history, recorder = subs.History(steps=True), RecordingSubscriber()
    trainer = et.Trainer(
        script.step_fn,
        script.state,
        eval_fn=script.eval_fn,
        subscribers=[history, recorder],
        run_dir=tmp_path,
    )

    @trainer.on(et.EpochCompleted, lag=0)
    async def shrink(event: et.EpochCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    trainer.fit(script.data, epochs=2, eval_data=script.eval_data)
    steps, epochs = history.to_dataframe("steps"), history.to_dataframe()
    assert isinstance(steps, pd.DataFrame)
    events = recorder.of(et.StepCompleted)
    expected = pd.DataFrame([{"step": e.step, "epoch": e.epoch, **e.metrics} for e in events])
    pd.testing.assert_frame_equal(steps, expected, check_dtype=False, check_like=True)
    assert steps["loss"].dtype == np.float32
    ends = recorder.of(et.EpochCompleted)
    rows = [
        {"epoch": e.epoch, "step": e.step, "steps": e.steps, "duration_s": e.duration_s, **e.metrics}
        | {"hyperparam_learning_rate": e.hyperparams["learning_rate"]}
        for e in ends
    ]
    pd.testing.assert_frame_equal(epochs, pd.DataFrame(rows), check_like=True)
    assert list(epochs)[:4] == ["epoch", "step", "steps", "duration_s"]
    assert epochs["hyperparam_learning_rate"].tolist() == [0.5, 0.25]


async def test_names_that_are_taken_get_a_prefix_and_odd_ones_stay() -> None:
    history = subs.History(steps=True)
    await history.handle(window(1, 2, step=[5, 6], metric_step=[7, 8], **{'a,"b\n': [1.0, 2.0], "": [0, 1]}))
    await history.handle(
        et.EpochCompleted(
            step=2, epoch=0, metrics={"steps": 1.5}, hyperparams={"steps": 2}, steps=2, duration_s=1
        )
    )
    assert list(history.steps) == ["step", "epoch", "metric_metric_step", "metric_step", 'a,"b\n', ""]
    assert history.steps["metric_metric_step"].tolist() == [5, 6]
    assert history.steps["metric_step"].tolist() == [7, 8]
    assert {name: column.tolist() for name, column in history.epochs.items()} == {
        "epoch": [0],
        "step": [2],
        "steps": [2],
        "duration_s": [1.0],
        "metric_steps": [1.5],
        "hyperparam_steps": [2],
    }


async def test_what_an_epoch_lacks_is_nan_and_the_others_keep_their_type() -> None:
    history = subs.History()
    for epoch, metrics in enumerate([{"n": 2**62 + 1}, {"n": 2**62 + 3, "val_loss": 0.5}, {"n": 1}]):
        await history.handle(
            et.EpochCompleted(step=epoch + 1, epoch=epoch, metrics=metrics, steps=1, duration_s=0.0)
        )
    assert history.epochs["n"].tolist() == [2**62 + 1, 2**62 + 3, 1]
    np.testing.assert_array_equal(history.epochs["val_loss"], [np.nan, 0.5, np.nan])
    assert history.steps == {}
    assert len(history.to_dataframe("steps")) == 0


async def test_of_too_many_rows_the_newest_are_kept_and_the_others_counted() -> None:
    history = subs.History(steps=True, max_steps=1000, max_epochs=3)
    rng, first = np.random.default_rng(0), 1
    while first < 50_000:
        count = int(rng.integers(1, 300))
        await history.handle(window(first, count, loss=np.arange(first, first + count, dtype=np.float32)))
        first += count
        held = sum(len(next(iter(chunk.values()))) for chunk in history._steps._chunks)
        assert held < 2 * 1000 + 300
    for epoch in range(10):
        await history.handle(
            et.EpochCompleted(step=epoch + 1, epoch=epoch, metrics={}, steps=1, duration_s=0.0)
        )
    assert history.steps["step"].tolist() == list(range(first - 1000, first))
    assert history.steps["loss"].tolist() == list(range(first - 1000, first))
    assert history.dropped_steps == first - 1 - 1000
    assert history.epochs["epoch"].tolist() == [7, 8, 9]
    assert history.dropped_epochs == 7
    again = subs.History(steps=True, max_steps=1000, max_epochs=3)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert (again.dropped_steps, again.dropped_epochs) == (first - 1001, 7)
    pd.testing.assert_frame_equal(again.to_dataframe("steps"), history.to_dataframe("steps"))


def test_few_chunks_are_held_however_small_the_windows_are() -> None:
    columns = ColumnStore(100_000)
    for row in range(3000):
        columns.add({"step": np.array([row])})
        assert len(columns._chunks) <= 14
    assert columns.columns()["step"].tolist() == list(range(3000))


def test_a_resumed_runs_history_is_that_of_the_uninterrupted_one(tmp_path: Path) -> None:
    def trainer(*others: et.Subscriber) -> tuple[et.Trainer, subs.History]:
        history = subs.History(steps=True)
        return et.Trainer(step_fn, new_state(), subscribers=[history, *others], run_dir=tmp_path), history

    data, keeper = batches(4), MemoryCheckpointer(every=1)
    whole, expected = trainer(keeper)
    whole.fit(data, epochs=3)
    assert len(expected.steps["step"]) == 12
    for step in (1, 4, 6, 8):
        resumed, history = trainer(keeper)
        resumed.fit(data, epochs=3, resume=step)
        pd.testing.assert_frame_equal(history.to_dataframe("steps"), expected.to_dataframe("steps"))
        pd.testing.assert_frame_equal(
            history.to_dataframe().drop(columns="duration_s"),
            expected.to_dataframe().drop(columns="duration_s"),
        )


def test_a_second_fit_adds_and_a_run_that_begins_anew_forgets(tmp_path: Path) -> None:
    history = subs.History(steps=True)
    trainer = et.Trainer(
        step_fn, new_state(), subscribers=[history, subs.Checkpointer("ck", at_end=False)], run_dir=tmp_path
    )
    trainer.fit(batches(4), epochs=1)
    trainer.fit(batches(4), epochs=1)
    assert history.steps["step"].tolist() == list(range(1, 9))
    trainer.fit(batches(4), epochs=1, resume=True)  # nothing was saved
    assert history.epochs["epoch"].tolist() == [2]


def test_without_pandas_the_frame_alone_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    history = subs.History()
    assert history.epochs == {}
    with pytest.raises(et.ConfigurationError, match=r"pip install 'eventtrain\[dataframe\]'"):
        history.to_dataframe()


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(et.ConfigurationError, match="max_steps"):
        subs.History(steps=True, max_steps=0)
    with pytest.raises(et.ConfigurationError, match="rows='windows'"):
        subs.History().to_dataframe("windows")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "column",
    [
        {"dtype": "|O8", "data": "AAAA"},
        {"dtype": "<f8", "data": "AAAA"},
        {"dtype": "<f8", "data": "%%%%"},
        {"dtype": "<f4", "data": "AAAAAAAAAAA="},  # two rows, and the other column has one
    ],
)
def test_a_broken_state_is_refused(column: dict[str, str]) -> None:
    state = subs.History().state_dict()
    one = {"dtype": "<f4", "data": "AAAAAA=="}
    state["steps"]["columns"] = {"step": one, "loss": column}
    with pytest.raises(et.errors.StateError, match="History cannot load its state"):
        subs.History().load_state_dict(state)


def test_a_state_of_an_earlier_release_is_loaded_and_saved_with_the_same_keys() -> None:
    columns = {
        "step": {"dtype": "<i8", "data": "BwAAAAAAAAAIAAAAAAAAAA=="},
        "loss": {"dtype": "<f4", "data": "AAAAPwAAgD8="},
    }
    state = {
        "version": 1,
        "epochs": {"version": 1, "dropped": 0, "columns": {}},
        "steps": {"version": 1, "dropped": 6, "columns": columns},
    }
    history = subs.History(steps=True)
    history.load_state_dict(state)
    assert {name: column.tolist() for name, column in history.steps.items()} == {
        "step": [7, 8],
        "loss": [0.5, 1.0],
    }
    assert history.dropped_steps == 6
    assert history.state_dict() == state


def test_a_history_is_shown_in_a_line_and_in_a_notebook_whatever_it_holds() -> None:
    history = subs.History(steps=True, max_steps=1_000_000)
    assert repr(history) == "<History of 0 epochs>"
    assert "<svg" not in history._repr_html_()
    names = ["<i>odd</i>", *(f"m{index}" for index in range(20))]
    columns = {name: np.ones(1_000_000, np.float32) for name in names}
    columns["m0"][777_777] = 5
    window = et.StepsCompleted(first_step=1, last_step=1_000_000, epoch=0, metrics=columns, step=1_000_000)
    end = et.EpochCompleted(
        epoch=0, steps=1_000_000, duration_s=1.0, metrics={"m0": 1.25, "val_m0": 2.5}, step=1_000_000
    )
    for event in (window, end):
        asyncio.run(history.handle(event))
    assert repr(history) == "<History of 1 epochs and 1,000,000 steps: m0=1.25, val_m0=2.5>"
    shown = history._repr_html_()
    assert len(shown) < 100_000
    assert shown.count("<svg") == 12
    assert ">5</text>" in shown  # the spike
    assert "<i>odd" not in shown
    assert "9 more metrics are not drawn" in shown
