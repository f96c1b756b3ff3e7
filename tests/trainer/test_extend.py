"""A run of M, extended to N by ``resume=True``, is the run of N at once; an aim that was passed trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import eval_fn, new_state, step_fn
from tests.trainer.test_resume import DATA, STEPS, Positioned, Record, bits, loader

EVAL = list(loader()(0))[:2]


class Stream(Positioned):
    """One endless stream with a state."""

    def __init__(self) -> None:
        super().__init__([batch for epoch in range(8) for batch in loader()(epoch)])


SOURCES: dict[str, Callable[[], Any]] = {
    **DATA,
    "device list": lambda: [
        {name: jnp.asarray(array) for name, array in batch.items()} for batch in loader()(0)
    ],
    "stream with a state": Stream,
    "stream": lambda: iter([batch for epoch in range(8) for batch in loader()(epoch)]),
}


class Heard(Record):
    """Also tells behind which event the run resumed."""

    resumed_at = 0

    async def handle(self, event: et.Event) -> None:
        if isinstance(event, et.RunResumed):
            self.resumed_at = event.seq
        await super().handle(event)


def run(folder: Path, source: str, checkpointer: dict[str, Any], **aim: Any) -> tuple[et.FitResult, Heard]:
    """As one process of a script that always says ``resume=True``."""
    record = Heard()
    trainer = et.Trainer(
        step_fn,
        new_state(),
        eval_fn=eval_fn,
        subscribers=[
            record,
            subs.EarlyStopping("val_loss", patience=50, mode="max", restore_best_weights=True),
            subs.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0),
            subs.ReduceLROnPlateau("loss", factor=0.9, patience=2, patience_unit="steps", min_delta=10.0),
            subs.GradientSpike("loss", window=5, warmup=3, threshold=1.0, cooldown=2, lag=3, factor=0.9),
            subs.LearningRateScheduler(lambda epoch, lr: lr * (0.9 if epoch == 1 else 1.0)),
            subs.JSONLLogger("log.jsonl"),
            subs.Checkpointer("ck", fsync=False, **checkpointer),
        ],
        step_extensions=[et.EMA(0.9, use_for=["eval"])],
        run_dir=folder,
        weight="examples",
    )

    @trainer.on(et.StepCompleted, every=3, lag=4, name="shrinks")
    async def shrink(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 1.0 + 1.0 / event.step)

    result = trainer.fit(SOURCES[source](), eval_data=EVAL, resume=True, **aim)
    return result, record


def same(parts: list[Heard], whole: Heard) -> None:
    """The parts, each up to where the next one continues, are the whole."""
    together = Heard()
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        until = after.resumed_at if after is not None else 1 << 60
        together.seen += [event for event in part.seen if event.seq < until]
    assert [(e.kind, e.step) for e in together.seen] == [(e.kind, e.step) for e in whole.seen]
    assert together.sequence() == whole.sequence()


CHECKPOINTERS = {"at the end": {}, "each epoch, none at the end": {"every_epochs": 1, "at_end": False}}


@pytest.mark.parametrize("checkpointer", CHECKPOINTERS)
@pytest.mark.parametrize("source", SOURCES)
def test_steps_extended_twice_are_the_same_run(tmp_path: Path, source: str, checkpointer: str) -> None:
    """Cut within an epoch, and at the end of one."""
    options = CHECKPOINTERS[checkpointer]
    whole, expected = run(tmp_path / "whole", source, options, steps=3 * STEPS - 2)
    parts = [
        run(tmp_path / "parts", source, options, steps=steps)
        for steps in (STEPS - 2, 2 * STEPS, 3 * STEPS - 2)
    ]
    same([record for _, record in parts], expected)
    assert bits(parts[-1][0].state) == bits(whole.state)
    rows = [
        (tmp_path / name / "log.jsonl").read_text().count('"kind":"step_completed"')
        for name in ("whole", "parts")
    ]
    assert rows == [3 * STEPS - 2] * 2


@pytest.mark.parametrize("checkpointer", CHECKPOINTERS)
@pytest.mark.parametrize("source", DATA)
def test_epochs_extended_are_the_same_run_with_its_best_weights(
    tmp_path: Path, source: str, checkpointer: str
) -> None:
    options = CHECKPOINTERS[checkpointer]
    whole, expected = run(tmp_path / "whole", source, options, epochs=3)
    parts = [run(tmp_path / "parts", source, options, epochs=epochs) for epochs in (1, 2, 3)]
    same([record for _, record in parts], expected)
    assert bits(parts[-1][0].state) == bits(whole.state)


def test_an_epoch_that_was_cut_is_completed_for_an_aim_in_epochs(tmp_path: Path) -> None:
    run(tmp_path / "parts", "loader", {}, steps=2 * STEPS - 2)
    result, _ = run(tmp_path / "parts", "loader", {}, epochs=2)
    whole, _ = run(tmp_path / "whole", "loader", {}, epochs=2)
    assert (result.step, result.stop_reason) == (2 * STEPS, "completed")
    assert bits(result.state) == bits(whole.state)


def test_the_same_aim_again_changes_nothing(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "loader", {}, steps=STEPS - 2)
    there = sorted(path.name for path in tmp_path.rglob("*"))
    again, record = run(tmp_path, "loader", {}, steps=STEPS - 2)
    assert [type(event) for event in record.seen] == [et.RunCompleted]
    assert (again.step, again.stop_reason) == (STEPS - 2, "completed")
    assert bits(again.state) == bits(first.state)
    assert there == [name for name in sorted(path.name for path in tmp_path.rglob("*")) if name in there]
    further, _ = run(tmp_path, "loader", {}, steps=STEPS)
    whole, _ = run(tmp_path / "whole", "loader", {}, steps=STEPS)
    assert bits(further.state) == bits(whole.state)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("aim", [{"epochs": 1}, {"steps": 3}, {"steps": STEPS}])
@pytest.mark.parametrize("reached", [{"epochs": 2}, {"steps": STEPS + 3}])
def test_an_aim_below_the_position_trains_and_writes_nothing(
    tmp_path: Path, reached: dict[str, int], aim: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = run(tmp_path, "loader", {"every": 2}, **reached)
    before = contents(tmp_path)
    with caplog.at_level(logging.WARNING):
        result, record = run(tmp_path, "stream", {"every": 2}, **aim)
    assert "has ended at step" in caplog.text
    assert record.seen == []
    assert (result.step, result.epochs_completed, result.stop_reason) == (first.step, 0, "completed")
    assert contents(tmp_path) == before
    further, _ = run(tmp_path, "loader", {"every": 2}, epochs=3)
    whole, _ = run(tmp_path / "whole", "loader", {"every": 2}, epochs=3)
    assert bits(further.state) == bits(whole.state)


def test_phases_with_other_data_are_each_trained_on_theirs_whenever_the_script_is_killed(
    tmp_path: Path,
) -> None:
    class Killed(Exception):
        pass

    def phase(value: float, fails_before: int | None = None) -> Any:
        def data(epoch: int) -> Any:
            for index in range(5):
                if (index, epoch) == (fails_before, 3):
                    raise Killed
                yield np.float32(value)

        return data

    def script(seen: list[tuple[int, float]], fails_before: int | None = None) -> float:
        trainer = et.Trainer(
            lambda state, batch: ({"sum": state["sum"] + batch}, {"batch": batch}),
            {"sum": jnp.float32(0)},
            subscribers=[subs.Checkpointer("ck", every=2)],
            run_dir=tmp_path,
        )

        @trainer.on(et.StepCompleted)
        async def note(event: et.StepCompleted) -> None:
            seen.append((event.step, float(event.metrics["batch"])))

        trainer.fit(phase(1.0), epochs=2, resume=True)
        return float(trainer.fit(phase(10.0, fails_before), epochs=4, resume=True).state["sum"])

    with pytest.raises(Killed):
        script([], 3)
    seen: list[tuple[int, float]] = []
    assert script(seen) == 10 * 1.0 + 10 * 10.0
    assert {value for _, value in seen} == {10.0}
    seen.clear()
    assert script(seen) == 110.0
    assert seen == []
