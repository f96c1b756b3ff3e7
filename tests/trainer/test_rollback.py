"""Which checkpoint a run resumes from, and what is left of a trainer that refuses it: all that it was."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer


class Counting(et.Subscriber):
    """Counts steps in a list, which a state changes in place."""

    name = "counting"

    def __init__(self, *, refuses: bool = False) -> None:
        self.steps: list[int] = []
        self.loaded = False
        self._refuses = refuses

    async def on_step_completed(self, event: et.StepCompleted) -> None:
        self.steps.append(event.step)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = True
        self.steps.clear()
        self.steps += state["steps"]
        if self._refuses:
            raise ValueError("I will not")


class Other(Counting):
    name = "other"


def bits(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_a_refused_state_leaves_the_trainer_and_every_subscriber_as_they_were(tmp_path: Path) -> None:
    checkpointer = MemoryCheckpointer(every=2)
    et.Trainer(step_fn, new_state(), subscribers=[Counting(), Other(), checkpointer], run_dir=tmp_path).fit(
        batches(4), epochs=1
    )
    first, refusing = Counting(), Other(refuses=True)
    trainer = et.Trainer(
        step_fn, new_state(), subscribers=[first, refusing, checkpointer], run_dir=tmp_path / "other"
    )
    trainer.fit(batches(3), epochs=1)
    before, extensions = bits(trainer.state), trainer.extension_states()
    with pytest.raises(et.StateError, match="other refuses its state: I will not"):
        trainer.fit(batches(4), epochs=2, resume=4)
    assert bits(trainer.state) == before
    assert (trainer.step, trainer.epoch, trainer.extension_states()) == (3, 1, extensions)
    assert (first.steps, first.loaded) == (refusing.steps, refusing.loaded) == ([1, 2, 3], False)
    result = trainer.fit(batches(3), epochs=1)
    assert (result.step, first.steps) == (6, [1, 2, 3, 4, 5, 6])


def test_a_run_that_cannot_begin_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    checkpointer = MemoryCheckpointer(every=2)
    et.Trainer(step_fn, new_state(), subscribers=[Counting(), checkpointer], run_dir=tmp_path).fit(
        batches(4), epochs=1
    )
    counting = Counting()
    trainer = et.Trainer(
        step_fn,
        new_state(),
        subscribers=[counting, checkpointer],
        step_extensions=[et.EMA(0.9)],  # of which the checkpoint has nothing
        run_dir=tmp_path / "other",
    )
    before = bits(trainer.state)
    with pytest.raises((et.StateError, AssertionError)):
        trainer.fit(batches(4), epochs=2, resume=4)
    assert bits(trainer.state) == before
    assert (trainer.step, counting.steps, counting.loaded) == (0, [], False)


@pytest.mark.slow
def test_the_state_before_is_let_go_when_the_resumed_run_trains(tmp_path: Path) -> None:
    def sized(state: Any, batch: Any) -> Any:
        return state + batch, {}

    def new() -> Any:
        return jnp.zeros(54_321)

    checkpointer = MemoryCheckpointer(every=2)
    et.Trainer(sized, new(), subscribers=[checkpointer], run_dir=tmp_path).fit([np.float32(1)] * 2, epochs=1)
    trainer = et.Trainer(sized, new(), subscribers=[checkpointer], run_dir=tmp_path)
    checkpointer._schedule = {}
    alive: list[int] = []

    def data(epoch: int) -> Any:
        for batch in range(8):
            # The loop is idle here when it has done the steps of all batches that were drawn: one state is alive.
            while trainer.step < 2 + batch:
                time.sleep(0.001)
            gc.collect()
            alive.append(sum(array.shape == (54_321,) for array in jax.live_arrays()))
            yield np.float32(1)

    trainer.fit(data, epochs=2, resume=2)
    assert alive[-1] == 1, alive


def test_the_newest_of_several_checkpointers_is_the_one_committed_last_that_holds_a_run(
    tmp_path: Path,
) -> None:
    """Not the one with the highest step, nor one with weights only."""
    first = subs.Checkpointer("a", every=6, at_end=False)
    et.Trainer(step_fn, new_state(), subscribers=[first], run_dir=tmp_path).fit(batches(6), epochs=1)
    second = subs.Checkpointer("b", every=2, at_end=False)
    et.Trainer(step_fn, new_state(), subscribers=[second], run_dir=tmp_path).fit(batches(3), epochs=1)
    weights = subs.Checkpointer("b", every=1, save_weights_only=True)
    et.Trainer(step_fn, new_state(), subscribers=[weights], run_dir=tmp_path).fit(batches(4), epochs=1)
    trainer = et.Trainer(
        step_fn,
        new_state(),
        subscribers=[subs.Checkpointer("a", at_end=False), subs.Checkpointer("b", at_end=False)],
        run_dir=tmp_path,
    )
    seen: list[et.RunResumed] = []

    @trainer.on(et.RunResumed)
    async def note(event: et.RunResumed) -> None:
        seen.append(event)

    trainer.fit(batches(6), epochs=1, resume=True)
    assert [(event.step, Path(event.path).parent.name) for event in seen] == [(2, "b")]
