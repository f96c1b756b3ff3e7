"""Runs that had ended when they were resumed: with the same aim nothing is trained, with a higher one they go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

VAL_LOSSES = jnp.asarray([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
BATCHES = [np.float32(1), np.float32(2)]
"""Of an epoch."""


def step_fn(state: Any, batch: Any) -> Any:
    return {"params": state["params"] + batch, "n": state["n"] + 1}, {"loss": batch}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"loss": VAL_LOSSES[state["n"] // 2 - 1]}


def run(
    folder: Path, *extra: et.Subscriber, checkpointer: dict[str, Any] | None = None, **aim: Any
) -> tuple[et.Trainer, Any, list[et.Event]]:
    """As one process of a script that always says ``resume=True``."""
    aim.setdefault("resume", True)
    trainer = et.Trainer(
        step_fn,
        {"params": jnp.float32(0), "n": jnp.int32(0)},
        eval_fn,
        subscribers=[subs.Checkpointer("ck", **(checkpointer or {})), *extra],
        run_dir=folder,
    )
    seen: list[et.Event] = []

    @trainer.on(et.Event, name="see")
    async def see(event: et.Event) -> None:
        seen.append(event)

    result = trainer.fit(BATCHES, eval_data=[np.float32(0)], **aim)
    return trainer, result, seen


def completed(seen: Sequence[et.Event]) -> et.RunCompleted:
    (event,) = [event for event in seen if isinstance(event, et.RunCompleted)]
    return event


def trained(seen: Sequence[et.Event]) -> list[int]:
    return [event.step for event in seen if isinstance(event, et.StepCompleted)]


def numbers(state: Any) -> list[float]:
    return [float(leaf) for leaf in jax.tree.leaves(state)]


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ck").iterdir())


def stopping(**options: Any) -> subs.EarlyStopping:
    return subs.EarlyStopping("val_loss", patience=2, **options)


@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("checkpointer", [{}, {"every_epochs": 1}], ids=["at the end", "every epoch"])
def test_a_run_that_was_stopped_early_trains_nothing_more_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, checkpointer: dict[str, Any], restores: bool
) -> None:
    trainer, first, seen = run(
        tmp_path, stopping(restore_best_weights=restores), checkpointer=checkpointer, epochs=8
    )
    ended = completed(seen)
    assert trained(seen) == list(range(1, 9))
    assert "early stopping" in ended.reason
    there = written(tmp_path)
    for _ in range(2):
        caplog.clear()
        trainer, again, seen = run(
            tmp_path, stopping(restore_best_weights=restores), checkpointer=checkpointer, epochs=8
        )
        assert trained(seen) == []
        assert not [event for event in seen if isinstance(event, et.EvalStarted | et.EpochStarted)]
        assert (completed(seen).reason, completed(seen).deterministic) == (ended.reason, ended.deterministic)
        assert (again.stop_reason, again.step, trainer.epoch) == (first.stop_reason, 8, 4)
        assert numbers(again.state) == numbers(first.state)
        assert written(tmp_path) == there
        (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert f"has ended at step 8 ({ended.reason})" in said


def test_a_run_that_was_stopped_within_an_epoch_trains_nothing_more(tmp_path: Path) -> None:
    def stops() -> et.Subscriber:
        class Stops(et.Subscriber):
            lag = 0

            async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
                if event.step == 3:
                    control.stop("enough")

        return Stops()

    _, first, _ = run(tmp_path, stops(), epochs=4)
    trainer, again, seen = run(tmp_path, stops(), epochs=4)
    assert (trained(seen), completed(seen).reason, trainer.epoch) == ([], "enough", 1)
    assert numbers(again.state) == numbers(first.state)
    _, further, seen = run(tmp_path, epochs=4, resume=3)  # named: it goes on, whatever had ended it
    assert (trained(seen), further.stop_reason) == ([4, 5, 6, 7, 8], "completed")


def test_a_run_that_was_completed_trains_nothing_more_until_its_aim_is_higher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, first, _ = run(tmp_path, epochs=2)
    there = written(tmp_path)
    _, again, seen = run(tmp_path, epochs=2)
    assert (trained(seen), completed(seen).reason) == ([], "completed")
    assert numbers(again.state) == numbers(first.state)
    assert written(tmp_path) == there
    assert "has ended at step 4 (completed)" in caplog.text
    _, more, seen = run(tmp_path, epochs=3)
    _, whole, _ = run(tmp_path / "whole", epochs=3)
    assert trained(seen) == [5, 6]
    assert numbers(more.state) == numbers(whole.state)


def test_a_run_that_was_stopped_goes_on_where_the_aim_is_higher(tmp_path: Path) -> None:
    run(tmp_path, stopping(), epochs=5)
    _, result, seen = run(tmp_path, epochs=6)
    assert (trained(seen), result.stop_reason) == ([9, 10, 11, 12], "completed")


def test_best_weights_that_were_not_put_back_before_a_kill_are_put_back_by_the_next_run(
    tmp_path: Path,
) -> None:
    """The last checkpoint is that of the epoch behind which the run was stopped."""
    options = {"every_epochs": 1, "at_end": False}
    _, first, _ = run(tmp_path, stopping(restore_best_weights=True), checkpointer=options, epochs=8)
    _, again, seen = run(tmp_path, stopping(restore_best_weights=True), checkpointer=options, epochs=8)
    assert trained(seen) == []
    assert [event.restored_step for event in seen if isinstance(event, et.CheckpointRestored)] == [4]
    assert numbers(again.state) == numbers(first.state)


def test_a_run_whose_time_was_used_up_goes_on_with_more_of_it(tmp_path: Path) -> None:
    def limited(seconds: float) -> et.Subscriber:
        return subs.MaxTime(seconds, clock=iter(float(n) for n in range(0, 10_000, 10)).__next__)

    _, first, _ = run(tmp_path, limited(5.0), epochs=4)
    assert "max time" in first.stop_reason
    _, result, seen = run(tmp_path, limited(1e6), epochs=4)
    assert (trained(seen)[-1], result.stop_reason) == (8, "completed")


def test_best_weights_are_put_back_beside_an_average_that_stands_in_for_the_result(tmp_path: Path) -> None:
    """As the docs say of the two together: the result has the average after the last step, trainer.state the best."""
    trainer = et.Trainer(
        step_fn,
        {"params": jnp.float32(0), "n": jnp.int32(0)},
        eval_fn,
        subscribers=[stopping(restore_best_weights=True)],
        step_extensions=[et.EMA(0.5, use_for=["final"])],
        run_dir=tmp_path,
    )
    result = trainer.fit(BATCHES, epochs=8, eval_data=[np.float32(0)])
    weights = np.cumsum(BATCHES * 4)
    average = 0.0  # as the weights were before the first step
    for weight in weights:
        average = 0.5 * average + 0.5 * float(weight)
    assert float(trainer.state["params"]) == weights[3]
    assert float(result.state["params"]) == pytest.approx(average)


def test_a_run_that_is_not_resumed_beside_checkpoints_of_an_earlier_one_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _, _ = run(tmp_path, epochs=1)
    trainer.fit(BATCHES, eval_data=[np.float32(0)], epochs=1)  # the same run goes on
    run(tmp_path, epochs=3)
    assert "earlier run" not in caplog.text
    run(tmp_path, epochs=1, resume=False)
    assert "has checkpoints of an earlier run, up to step 8, and this run begins at step 0" in caplog.text
