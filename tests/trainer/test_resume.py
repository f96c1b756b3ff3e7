"""A run that resumes from any of its checkpoints ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import eval_fn, examples, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer

STEPS, EPOCHS = 7, 3


class Positioned:
    """Batches whose iterator says where it is, as Grain's does."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches
        self._next = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._next >= len(self._batches):
            raise StopIteration
        self._next += 1
        return self._batches[self._next - 1]

    def get_state(self) -> Any:
        return {"next": self._next, "blob": bytes([self._next])}

    def set_state(self, state: Any) -> None:
        assert state["blob"] == bytes([state["next"]])
        self._next = state["next"]


def loader() -> et.ArrayLoader:
    return et.ArrayLoader(examples(4 * STEPS), batch_size=4, seed=3)


DATA = {
    "loader": loader,
    "list": lambda: list(loader()(0)),
    "generator": lambda: lambda epoch: (batch for batch in loader()(epoch)),
    "positioned": lambda: lambda epoch: Positioned(list(loader()(epoch))),
}


class Record(et.Subscriber):
    """The training sequence, with the numbers that tell where a cut lies in it."""

    events = et.Event
    name = "record"

    def __init__(self) -> None:
        self.seen: list[et.Event] = []

    async def handle(self, event: et.Event) -> None:
        by_lag = not isinstance(event, et.CommandApplied) or event.command.due is not None
        in_sequence = isinstance(event, et.events.TRAINING_SEQUENCE) and not isinstance(event, et.RunResumed)
        if in_sequence and by_lag:
            self.seen.append(event)

    def sequence(self, after: int = 0) -> list[dict[str, Any]]:
        return [comparable(event) for event in self.seen if event.seq > after]


def comparable(event: et.Event) -> dict[str, Any]:
    left_out = {"run_id", "attempt", "seq", "time", "duration_s"}
    return {
        name: value for name, value in json.loads(event.model_dump_json()).items() if name not in left_out
    }


def make(
    tmp_path: Any, checkpointer: MemoryCheckpointer, extra: Sequence[et.Subscriber] = (), **options: Any
) -> tuple[et.Trainer, Record]:
    checkpointer.name = "memory"
    record = Record()
    trainer = et.Trainer(
        step_fn,
        new_state(),
        eval_fn=eval_fn,
        subscribers=[
            record,
            subs.EarlyStopping("val_loss", patience=50, restore_best_weights=True),
            subs.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0),
            subs.ReduceLROnPlateau(
                "loss", factor=0.9, patience=2, patience_unit="steps", min_delta=10.0, mode="min"
            ),
            subs.GradientSpike("loss", window=5, warmup=3, threshold=1.0, cooldown=2, lag=3, factor=0.9),
            subs.LearningRateScheduler(lambda epoch, lr: lr * (0.9 if epoch == 1 else 1.0)),
            checkpointer,
            *extra,
        ],
        step_extensions=[et.EMA(0.9, use_for=["eval"])],
        run_dir=tmp_path,
        weight="examples",
        **options,
    )

    @trainer.on(et.StepCompleted, every=3, lag=4, name="shrinks")
    async def shrink(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 1.0 + 1.0 / event.step)

    @trainer.on(et.StepCompleted, once=True, where=lambda event: event.step == 5, lag=2, name="once")
    async def set_once(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.3)

    return trainer, record


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("steps_per_call", "backend"), [(1, "asyncio"), (4, "trio")])
def test_from_every_step_it_ends_as_the_uninterrupted_run(
    tmp_path: Any, kind: str, steps_per_call: int, backend: str
) -> None:
    options: dict[str, Any] = {"steps_per_call": steps_per_call, "backend": backend}
    aim: dict[str, Any] = {"epochs": EPOCHS, "eval_data": list(loader()(0))[:2]}
    checkpointer = MemoryCheckpointer(every=1, every_epochs=1)
    trainer, record = make(tmp_path / "whole", checkpointer, **options)
    whole = trainer.fit(DATA[kind](), **aim)
    averages = bits(trainer.extension_states())
    assert sorted(checkpointer.saved) == list(range(1, STEPS * EPOCHS + 1))
    assert sum(event["kind"] == "hyperparam_changed" for event in record.sequence()) >= 8
    for step in (1, 4, 5, 6, 7, 8, 13, 14, 20, 21) if kind == "loader" else (6, 7, 12):
        saved = checkpointer.saved[step]
        resumed, again = make(tmp_path / str(step), checkpointer, **options)
        result = resumed.fit(DATA[kind](), resume=step, **aim)
        assert again.sequence() == record.sequence(after=saved.facts.stream.seq), step
        assert bits(result.state) == bits(whole.state), step
        assert bits(resumed.extension_states()) == averages, step
        assert (result.step, resumed.epoch) == (whole.step, EPOCHS)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("kind", "at"), [(et.StepCompleted, 1), (et.StepCompleted, 9), (et.EpochCompleted, 1)]
)
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Any, kind: type[et.Event], at: int) -> None:
    aim: dict[str, Any] = {"epochs": EPOCHS, "eval_data": list(loader()(0))[:4]}
    trainer, record = make(tmp_path / "whole", MemoryCheckpointer())
    whole = trainer.fit(loader(), **aim)
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, _ = make(tmp_path / "first", checkpointer)
    seen: list[et.Event] = []

    @trainer.on(kind, name="interrupts")
    async def count(event: et.Event) -> None:
        seen.append(event)
        if len(seen) == at:
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(slow(loader()), **aim)
    (saved,) = checkpointer.saved.values()
    resumed, again = make(tmp_path / "second", checkpointer)
    result = resumed.fit(loader(), resume=saved.step, **aim)
    cut = len(record.sequence()) - len(again.sequence())
    assert cut >= at
    assert again.sequence() == record.sequence()[cut:]
    assert bits(result.state) == bits(whole.state)


@pytest.mark.parametrize("every", [None, 4])
def test_an_evaluation_that_was_interrupted_goes_on_behind_its_last_batch(
    tmp_path: Any, every: int | None
) -> None:
    batches = list(loader()(0))[:4]
    extra = [] if every is None else [subs.EvaluateEvery(steps=every)]
    trainer, record = make(tmp_path / "whole", MemoryCheckpointer(), extra)
    aim: dict[str, Any] = {"epochs": EPOCHS}
    whole = trainer.fit(loader(), eval_data=batches, **aim)
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, before = make(tmp_path / "first", checkpointer, extra)

    def interrupted(epoch: int) -> Iterator[Any]:
        yield from slowly(batches[:2])
        interrupt()
        yield from slowly(batches[2:])

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader(), eval_data=interrupted, **aim)
    (saved,) = checkpointer.saved.values()
    assert (saved.facts.loop.batch, saved.facts.loop.in_epoch) == (every or STEPS, True)
    assert saved.facts.loop.evaluated_batches in (1, 2, 3)
    resumed, after = make(tmp_path / "second", checkpointer, extra)
    result = resumed.fit(loader(), eval_data=batches, resume=saved.step, **aim)
    assert before.sequence()[:-1] + after.sequence() == record.sequence()  # all but its RunCompleted
    assert bits(result.state) == bits(whole.state)


def slowly(batches: Any) -> Iterator[Any]:
    """So slowly that an interruption comes before the end."""
    for batch in batches:
        time.sleep(0.05)
        yield batch


def slow(data: et.ArrayLoader) -> Any:
    return lambda epoch, start=0: slowly(data(epoch, start))


def test_the_differences_between_then_and_now_are_said(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = MemoryCheckpointer(every=3)
    trainer, _ = make(tmp_path, checkpointer)
    evaluated_on = list(loader()(0))[:1]
    trainer.fit(loader(), steps=7, eval_data=evaluated_on)
    resumed, _ = make(tmp_path, checkpointer, steps_per_call=2)
    result = resumed.fit(loader(), steps=12, eval_data=evaluated_on, resume=3)
    assert result.step == 12
    assert "steps_per_call: 1 then, 2 now" in caplog.text


def test_a_resume_without_anybody_who_keeps_checkpoints_is_refused(tmp_path: Any) -> None:
    trainer = et.Trainer(step_fn, new_state(), run_dir=tmp_path)
    with pytest.raises(et.ConfigurationError, match="Checkpointer"):
        trainer.fit(loader(), epochs=1, resume=True)
