"""EarlyStopping against Keras' state machine, and in a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs


class Asked:
    """Stands for the control: notes what is asked."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


def completed(epoch: int, **metrics: float) -> et.EpochCompleted:
    return et.EpochCompleted(step=epoch + 1, epoch=epoch, metrics=metrics, steps=1, duration_s=0.0)


def drive(policy: subs.EarlyStopping, values: Sequence[float], first_epoch: int = 0) -> int | None:
    """Epoch at which the policy stops."""
    for epoch, value in enumerate(values, first_epoch):
        asked: Any = Asked()
        coroutine = policy.on_epoch_completed(completed(epoch, val_loss=value), asked)
        with pytest.raises(StopIteration):
            coroutine.send(None)
        if asked.reasons:
            return epoch
    return None


@pytest.mark.parametrize(("patience", "stops_at"), [(0, 1), (1, 1), (2, 2), (3, 3), (5, 5)])
def test_a_flat_metric_stops_where_keras_stops(patience: int, stops_at: int) -> None:
    assert drive(subs.EarlyStopping(patience=patience), [1.0] * 20) == stops_at


def test_epoch_0_never_stops_the_run() -> None:
    assert drive(subs.EarlyStopping(), [math.nan]) is None
    assert drive(subs.EarlyStopping(), [math.nan, math.nan]) == 1


def test_a_metric_that_improves_but_never_beats_the_baseline_never_stops() -> None:
    assert drive(subs.EarlyStopping(patience=2, baseline=0.0), [1.0 / n for n in range(1, 50)]) is None


def test_the_baseline_keeps_the_count_going() -> None:
    # 3.0, 2.5: best, yet not below the baseline, so wait goes on to 2; the next failure makes it 3.
    assert drive(subs.EarlyStopping(patience=3, baseline=1.0), [3.0, 2.5, 2.6]) == 2
    assert drive(subs.EarlyStopping(patience=3, baseline=2.7), [3.0, 2.5, 2.6, 2.6, 2.6]) == 4


def test_earlier_epochs_than_start_from_epoch_are_not_looked_at() -> None:
    assert drive(subs.EarlyStopping(patience=1, start_from_epoch=3), [0.1, 0.2, 0.3, 9.0, 9.0]) == 4


def test_a_first_nan_is_not_the_best_for_ever() -> None:
    assert drive(subs.EarlyStopping(patience=3), [math.nan, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7]) is None


def test_an_epoch_without_the_metric_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    policy = subs.EarlyStopping(patience=1)
    asked: Any = Asked()
    for epoch in range(5):
        coroutine = policy.on_epoch_completed(completed(epoch, loss=1.0), asked)
        with pytest.raises(StopIteration):
            coroutine.send(None)
    assert (policy.wait, asked.reasons) == (0, [])
    assert caplog.text.count("'val_loss'") == 1


def keras_stop(
    values: Sequence[float], patience: int, min_delta: float, baseline: float | None, start: int
) -> int | None:
    """Keras 3.15.1's EarlyStopping.on_epoch_end (minimising), written down from its source; NaN left out."""
    best, wait = None, 0
    for epoch, current in enumerate(values):
        if epoch < start:
            continue
        wait += 1
        if best is None or current - -min_delta < best:
            best = current
            if baseline is None or current - -min_delta < baseline:
                wait = 0
            continue
        if wait >= patience and epoch > 0:
            return epoch
    return None


@given(
    st.lists(st.floats(-4, 4).map(lambda x: round(x, 1)), max_size=40),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.none() | st.floats(-3, 3),
    st.integers(0, 5),
)
def test_it_stops_where_keras_stops(
    values: list[float], patience: int, min_delta: float, baseline: float | None, start: int
) -> None:
    policy = subs.EarlyStopping("val_loss", min_delta, patience, baseline=baseline, start_from_epoch=start)
    assert drive(policy, values) == keras_stop(values, patience, min_delta, baseline, start)


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]), max_size=30), st.integers(0, 30))
def test_a_saved_count_goes_on_where_it_was(values: list[float], cut: int) -> None:
    whole = drive(subs.EarlyStopping(patience=4), values)
    first = subs.EarlyStopping(patience=4)
    stopped = drive(first, values[:cut])
    if stopped is None:
        second = subs.EarlyStopping(patience=4)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        stopped = drive(second, values[cut:], first_epoch=cut)
    assert stopped == whole


@pytest.mark.parametrize(
    "options",
    [
        {"patience": -1},
        {"patience": 1.5},
        {"mode": "down"},
        {"monitor": "speed"},
        {"min_delta": math.nan},
        {"baseline": math.inf},
        {"start_from_epoch": -1},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.EarlyStopping(**options)
    assert next(iter(options)) in str(caught.value)


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(et.ConfigurationError, match="version 9"):
        subs.EarlyStopping().load_state_dict({"version": 9})


def test_it_ends_a_real_run_before_the_next_epoch_begins(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(
        step, {"w": jnp.zeros(1)}, subscribers=[subs.EarlyStopping("loss", patience=2)], run_dir=tmp_path
    )
    result = trainer.fit(lambda epoch: [np.float32(losses[epoch])] * 3, epochs=8)
    assert (result.epochs_completed, result.step) == (5, 15)
    assert result.stop_reason == (
        "early stopping: loss has not improved for 2 epochs (best 1 in epoch 3, patience 2)"
    )
    again = trainer.fit(lambda epoch: [np.float32(1.0)], epochs=8)  # the count began anew
    assert again.epochs_completed == 3
