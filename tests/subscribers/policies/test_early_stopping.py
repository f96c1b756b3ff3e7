"""EarlyStopping against Keras' state machine, and in a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.testing import ScriptedStep


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
        coroutine = policy.handle(completed(epoch, val_loss=value), asked)
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
        coroutine = policy.handle(completed(epoch, loss=1.0), asked)
        with pytest.raises(StopIteration):
            coroutine.send(None)
    assert (policy.wait, asked.reasons) == (0, [])
    assert caplog.text.count("'val_loss'") == 1


def keras_stop(
    values: Sequence[float], patience: int, min_delta: float, baseline: float | None, start: int
) -> int | None:
    """Keras 3.15.1's EarlyStopping.on_epoch_end (minimising), written down from its source; NaN left out."""

    def less(current: float, reference: float | None) -> bool:
        return reference is None or np.float32(current - -min_delta) < np.float32(reference)

    best, wait = None, 0
    for epoch, current in enumerate(values):
        if epoch < start:
            continue
        wait += 1
        if less(current, best):
            best = current
            if less(current, baseline):
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
    with pytest.raises(et.StateError, match="version 9"):
        subs.EarlyStopping().load_state_dict({"version": 9})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"monitor": {"version": 1, "wait": "long"}}, "monitor.wait"),
        ({"surplus": 1}, "surplus"),
        ({"monitor": None}, "monitor"),
    ],
)
def test_a_broken_state_is_refused_by_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(et.StateError, match=named):
        subs.EarlyStopping().load_state_dict(subs.EarlyStopping().state_dict() | change)


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "patience 2"),
        ({"min_delta": 0.5}, "patience 2, min_delta 0.5"),
        ({"min_delta": 0.1, "min_delta_relative": True}, "patience 2, min_delta 0.1 of the best"),
    ],
)
def test_the_reason_names_the_margin_without_which_it_would_be_a_riddle(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    policies = [subs.EarlyStopping("loss", patience=2, **options)]
    losses = [1.0, 1.0, 1.0] if told == "patience 2" else [1.0, 0.95, 0.94]
    trainer, run = climbing(losses, subscribers=policies, run_dir=tmp_path)
    reason = trainer.fit(**run).stop_reason
    assert reason == f"early stopping: loss has not improved for 2 epochs (best 1 in epoch 1, {told})"


def climbing(losses: Sequence[float], **options: Any) -> tuple[et.Trainer, dict[str, Any]]:
    """A trainer whose weight is the number of steps taken; its loss of epoch e is ``losses[e]``, two steps an epoch."""

    def step(state: Any, batch: Any) -> Any:
        return {"params": {"w": state["params"]["w"] + 1}, "count": state["count"] + 1}, {"loss": batch}

    state = {"params": {"w": jnp.zeros(2)}, "count": jnp.zeros((), jnp.int32)}
    trainer = et.Trainer(step, state, eval_fn=lambda state, batch: {"loss": batch}, **options)
    return trainer, {"data": lambda epoch: [np.float32(losses[epoch])] * 2, "epochs": len(losses)}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("snapshot", ["keep", "copy"])
@pytest.mark.parametrize(
    ("losses", "patience", "weight"),
    [
        ([3.0, 1.0, 2.0, 2.0, 2.0], 2, 4),  # stopped early
        ([3.0, 1.0, 2.0, 2.0], 9, 4),  # its epochs were over
        ([3.0, 2.0, 1.0], 9, 6),  # the last is the best
        ([1.0, 2.0, 3.0], 9, 2),
    ],
)
def test_the_best_weights_are_back_at_the_end_stopped_early_or_not(
    tmp_path: Path, losses: list[float], patience: int, weight: int, backend: str, snapshot: Any
) -> None:
    policy = subs.EarlyStopping("loss", patience=patience, restore_best_weights=True)
    trainer, run = climbing(
        losses, subscribers=[policy], run_dir=tmp_path, backend=backend, snapshot=snapshot
    )
    seen: list[et.CheckpointRestored] = []
    trainer.on(et.CheckpointRestored)(lambda event: seen.append(event))
    result = trainer.fit(**run)
    assert result.state["params"]["w"].tolist() == [weight, weight]
    assert int(result.state["count"]) == result.step  # the params only, as Keras
    assert [(event.step, event.restored_step, event.part) for event in seen] == [
        (result.step, weight, "params")
    ]
    assert not trainer.control.snapshots  # the device copy is given back


def test_an_interrupted_run_keeps_its_state_and_its_best_weights_for_the_next(tmp_path: Path) -> None:
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    policy = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer, run = climbing(losses, subscribers=[policy], run_dir=tmp_path)

    @trainer.on(et.EpochCompleted, lag=0, once=True, where=lambda event: event.epoch == 2)
    async def interrupt(event: et.EpochCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    result = trainer.fit(**run)
    assert result.state["params"]["w"].tolist() == [6, 6]
    policy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    result = trainer.fit(run["data"], epochs=3)
    assert (result.step, result.state["params"]["w"].tolist()) == (12, [4, 4])


def test_a_run_without_a_number_restores_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer, run = climbing([math.nan] * 3, subscribers=[policy], run_dir=tmp_path)
    assert trainer.fit(**run).state["params"]["w"].tolist() == [6, 6]
    assert "restored no weights: 'loss' was never a number" in caplog.text


def test_best_weights_of_an_earlier_fit_are_forgotten(tmp_path: Path) -> None:
    policy = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer, run = climbing([1.0, 2.0, math.nan, math.nan], subscribers=[policy], run_dir=tmp_path)

    @trainer.on(et.EpochCompleted, lag=0, once=True, where=lambda event: event.epoch == 1)
    async def interrupt(event: et.EpochCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    trainer.fit(**run)
    assert set(trainer.control.snapshots) == {"EarlyStopping/best"}
    assert trainer.fit(run["data"], epochs=2).state["params"]["w"].tolist() == [8, 8]


@pytest.mark.parametrize(
    ("options", "losses", "epochs", "reason"),
    [
        ({"stopping_threshold": 1.0}, [3.0, 1.0, 0.9, 0.8], 3, "better than the stopping threshold 1"),
        ({"divergence_threshold": 5.0}, [3.0, 5.0, 6.0, 1.0], 3, "worse than the divergence threshold 5"),
        ({"nan": "stop"}, [3.0, math.nan, 1.0], 2, "loss is NaN"),
        (
            {"mode": "max", "stopping_threshold": 4.0},
            [3.0, 4.0, 5.0, 6.0],
            3,
            "better than the stopping threshold",
        ),
    ],
)
def test_thresholds_and_nan_stop_at_once(
    tmp_path: Path, options: Any, losses: list[float], epochs: int, reason: str
) -> None:
    policy = subs.EarlyStopping("loss", patience=9, **options)
    trainer, run = climbing(losses, subscribers=[policy], run_dir=tmp_path)
    result = trainer.fit(**run)
    assert result.epochs_completed == epochs
    assert reason in result.stop_reason


def test_patience_in_evaluations_stops_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    policy = subs.EarlyStopping(
        "val_loss", patience=2, patience_unit="evaluations", restore_best_weights=True
    )
    trainer, _ = climbing([], subscribers=[policy, subs.EvaluateEvery(steps=5)], run_dir=tmp_path)
    result = trainer.fit([np.float32(0)] * 100, epochs=1, eval_data=[np.float32(1)])
    assert (result.step, result.epochs_completed) == (15, 0)
    assert "for 2 evaluations" in result.stop_reason
    assert result.state["params"]["w"].tolist() == [5, 5]


def test_a_metric_that_no_event_can_have_fails_the_run_before_its_first_step(tmp_path: Path) -> None:
    trainer, run = climbing([1.0, 1.0], subscribers=[subs.EarlyStopping("val_loss")], run_dir=tmp_path)
    with pytest.raises(et.ConfigurationError, match=r"'val_loss', which is not among the metrics \(loss\)"):
        trainer.fit(**run)
    assert trainer.step == 0


@pytest.mark.parametrize("strict", [False, True])
def test_a_metric_that_an_evaluation_lacks_is_found_at_the_first_one_if_not_before(
    tmp_path: Path, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = subs.EarlyStopping("val_los", mode="min", strict=strict)
    trainer, run = climbing([1.0], subscribers=[policy], run_dir=tmp_path)
    with pytest.raises(et.SubscriberError) if strict else nullcontext():
        trainer.fit(**run, eval_data=iter([np.float32(1)]))  # is not read ahead
    assert "'val_los', which is not among the metrics (val_loss" in caplog.text


@pytest.mark.parametrize("unit", ["steps", "seconds"])
def test_best_weights_that_would_be_asked_for_too_late_are_refused(unit: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=f"patience_unit='{unit}'.*EvaluateEvery"):
        subs.EarlyStopping("loss", restore_best_weights=True, patience_unit=unit)


@pytest.mark.parametrize("lag", [None, 3, {et.EpochCompleted: 3}])
def test_best_weights_and_another_lag_are_refused_at_the_start(tmp_path: Path, lag: Any) -> None:
    policy = subs.EarlyStopping("loss", restore_best_weights=True)
    policy.lag = lag
    trainer, run = climbing([1.0, 1.0], subscribers=[policy], run_dir=tmp_path)
    with pytest.raises(et.ConfigurationError, match="Leave lag alone"):
        trainer.fit(**run)


def test_a_clock_that_jumps_costs_no_patience_in_seconds() -> None:
    policy, asked = subs.EarlyStopping("loss", patience=60, patience_unit="seconds"), Asked()
    for epoch in range(3):
        event = completed(epoch, loss=1.0).model_copy(
            update={"time": datetime(2000 + epoch, 1, 1, tzinfo=UTC)}
        )
        with pytest.raises(StopIteration):
            policy.handle(event, cast(Any, asked)).send(None)
    assert (asked.reasons, policy.wait < 60) == ([], True)


@pytest.mark.parametrize(("losses", "weight"), [([2.0, 2.0], 4), ([2.0, 0.5, 1.0], 4)])
def test_a_state_loaded_without_its_best_weights_says_so_and_restores_only_better_ones(
    tmp_path: Path, losses: list[float], weight: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (subs.EarlyStopping("loss", patience=9, restore_best_weights=True) for _ in range(2))
    trainer, run = climbing([3.0, 1.0], subscribers=[first], run_dir=tmp_path / "first")
    trainer.fit(**run)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert "are missing" not in caplog.text
    trainer, run = climbing(losses, subscribers=[second], run_dir=tmp_path / "second")
    assert trainer.fit(**run).state["params"]["w"].tolist() == [weight, weight]
    assert "whose best weights (loss 1) are missing: only better ones can be restored" in caplog.text
    better = min(losses) < 1
    assert ("restored no weights: those of the best loss, 1, were not kept" in caplog.text) is not better


def test_best_weights_that_the_device_did_not_keep_are_missed_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = subs.EarlyStopping("loss", patience=9, restore_best_weights=True)
    trainer, run = climbing([3.0, 1.0, 2.0, 2.0], subscribers=[policy], run_dir=tmp_path)

    @trainer.on(et.EpochCompleted, lag=0, where=lambda event: event.epoch == 2)
    async def let_go(event: et.EpochCompleted, control: et.Control) -> None:
        control.snapshots["EarlyStopping/best"].release()

    assert trainer.fit(**run).state["params"]["w"].tolist() == [8, 8]
    assert "restored no weights: those of the best loss, 1, were not kept on the device" in caplog.text


POLICIES_OF_EPOCHS = pytest.mark.parametrize("kind", [subs.EarlyStopping, subs.ReduceLROnPlateau])


def evaluating(tmp_path: Path, kind: Any, epochs: int, **options: Any) -> tuple[et.Trainer, dict[str, Any]]:
    """Three epochs of two steps, evaluated at every ``epochs``-th; the metric is "loss"."""
    script = ScriptedStep({"loss": [1.0]}, eval_metrics={"loss": [1.0]}, steps_per_epoch=2, learning_rate=0.5)
    policies = [kind(patience=9, **options), subs.EvaluateEvery(epochs=epochs)]
    trainer = et.Trainer(script.step_fn, script.state, script.eval_fn, subscribers=policies, run_dir=tmp_path)
    return trainer, {"data": script.data, "epochs": 3, "eval_data": script.eval_data}


@POLICIES_OF_EPOCHS
@pytest.mark.parametrize("strict", [False, True])
def test_a_metric_that_comes_with_a_later_evaluation_is_not_missing(
    tmp_path: Path, kind: Any, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, run = evaluating(tmp_path, kind, 2, strict=strict)
    assert trainer.fit(**run).epochs_completed == 3
    assert "watches" not in caplog.text


@POLICIES_OF_EPOCHS
def test_a_metric_that_evaluations_lack_is_missing_before_the_first_step(tmp_path: Path, kind: Any) -> None:
    trainer, run = evaluating(tmp_path, kind, 2, monitor="val_error")
    with pytest.raises(et.ConfigurationError, match=r"'val_error', which is not among .*val_loss"):
        trainer.fit(**run)
    assert trainer.step == 0


@POLICIES_OF_EPOCHS
def test_an_evaluation_that_never_comes_is_said_at_the_end_and_fails_the_run_where_strict(
    tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, run = evaluating(tmp_path / "warns", kind, 4)
    trainer.fit(**run)
    assert caplog.text.count("the run ended before an epoch with an evaluation (3 without one)") == 1
    trainer, run = evaluating(tmp_path / "fails", kind, 4, strict=True)
    with pytest.raises(
        et.SubscriberError, match=r"monitors 'val_loss', and the run ended before.*EvaluateEvery"
    ):
        trainer.fit(**run)


@POLICIES_OF_EPOCHS
def test_an_interrupted_run_misses_no_evaluation(
    tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, run = evaluating(tmp_path, kind, 4, strict=True)

    @trainer.on(et.EpochCompleted, lag=0)
    async def interrupt(event: et.EpochCompleted, control: et.Control) -> None:
        control.stop("interrupted")

    assert trainer.fit(**run).stop_reason == "interrupted"
    assert "watches" not in caplog.text


# --- several metrics --------------------------------------------------------------------------------------------

WORSE_FROM_2 = [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
BETTER_UNTIL_4 = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5]


def run_of_two(*policies: et.Subscriber, epochs: int = 8, **options: Any) -> tuple[Any, et.Trainer]:
    script = ScriptedStep({"loss": WORSE_FROM_2, "accuracy": BETTER_UNTIL_4})
    trainer = et.Trainer(script.step_fn, script.state, subscribers=policies, **options)
    return trainer.fit(script.data, epochs=epochs), trainer


@pytest.mark.parametrize(
    ("when", "epochs", "words"),
    [
        ("any", 4, "loss has not improved for 2 epochs"),
        ("all", 7, "loss has not improved for 5 epochs (best 0.5 in epoch 2, patience 2); accuracy has not"),
    ],
)
def test_several_metrics_stop_the_run_together_or_each_by_itself(when: Any, epochs: int, words: str) -> None:
    result, _ = run_of_two(subs.EarlyStopping(["loss", "accuracy"], patience=2, when=when))
    assert result.epochs_completed == epochs
    assert result.stop_reason.startswith(f"early stopping: {words}")


def test_the_first_of_several_metrics_decides_which_weights_are_the_best() -> None:
    for metrics, step in ((["loss", "accuracy"], 2), (["accuracy", "loss"], 5)):
        policy = subs.EarlyStopping(metrics, patience=2, restore_best_weights=True)
        result, _ = run_of_two(policy)
        assert float(result.state["params"]["weight"]) == step
        assert policy.best_epoch == step - 1


@pytest.mark.parametrize("metrics", [["val_f1", "loss"], ["loss", "val_f1"]])
def test_each_of_several_metrics_is_looked_up_before_the_first_step(metrics: list[str]) -> None:
    with pytest.raises(et.ConfigurationError, match="monitors 'val_f1'"):
        run_of_two(subs.EarlyStopping(metrics, patience=2, strict=True))


def test_the_counts_of_several_metrics_survive_a_restart() -> None:
    policy = subs.EarlyStopping(["loss", "accuracy"], patience=2)
    for epoch in range(6):
        asked: Any = Asked()
        event = completed(epoch, loss=WORSE_FROM_2[epoch], accuracy=BETTER_UNTIL_4[epoch])
        with pytest.raises(StopIteration):
            policy.handle(event, asked).send(None)
    other = subs.EarlyStopping(["loss", "accuracy"], patience=2)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    with pytest.raises(StopIteration):
        other.handle(completed(6, loss=0.5, accuracy=0.5), asked).send(None)
    assert len(asked.reasons) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"monitor": []}, "list of different names"),
        ({"monitor": ["loss", "loss"]}, "list of different names"),
        ({"monitor": ["loss", "accuracy"], "baseline": 0.1}, "for one metric"),
        ({"monitor": ["loss", "widgets"]}, "widgets"),
        ({"monitor": ["loss", "accuracy"], "when": "both"}, "when"),
    ],
)
def test_several_metrics_that_cannot_be_watched_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(et.ConfigurationError, match=words):
        subs.EarlyStopping(**arguments)
