"""A delayed writer saves the state of its step, bit for bit, while the loop continues to train and to donate.

A trial is one checkpoint. A run has twenty-five: they are taken at random steps, all of them are in flight at once, and
each is written at least ``DELAY_S`` seconds after it was taken. The first one waits after its copy to the host; the
others are still on the device. The state consists of integers, so that NumPy can compute the state of every step.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np

import eventtrain as et
from benchmarks.campaign import Campaign
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files

DELAY_S = 5.0
TOGETHER = 25
LAST_TAKEN = 400
"""The last step at which a checkpoint is taken."""
SIZE = 65_536
FACTOR, SUMMAND = 1_664_525, 1_013_904_223


@dataclass(frozen=True)
class Written:
    """One checkpoint of a run.

    Attributes:
        step: the step after which it was taken.
        late_s: seconds from then until its writing began.
        steps_behind: steps trained in that time.
        equal: whether the saved state is that step's state, bit for bit.
    """

    step: int
    late_s: float
    steps_behind: int
    equal: bool


def step_fn(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Changes every word; all steps have different states."""
    words = state["words"] * jnp.uint32(FACTOR) + jnp.uint32(SUMMAND) + batch
    return {"words": words, "count": state["count"] + 1}, {"word": words[0]}


def states(seed: int, steps: set[int]) -> dict[int, np.ndarray]:
    """Returns the words after each of ``steps``, computed by NumPy."""
    words, found = first_words(seed), {}
    for step in range(1, max(steps) + 1):
        words = words * np.uint32(FACTOR) + np.uint32(SUMMAND) + np.uint32(step)
        if step in steps:
            found[step] = words
    return found


def first_words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, SIZE, np.uint32)


@contextmanager
def delayed(delay_s: float, taken_s: Mapping[int, float]) -> Generator[dict[int, float]]:
    """Delays the creation of every checkpoint folder; yields step -> the time at which its state was taken."""
    make_folder: Callable[[Path], None] = atomic_files.make_folder
    began_s: dict[int, float] = {}

    def later(path: Path) -> None:
        step = int(path.name.rsplit("-", 1)[-1])
        time.sleep(max(0.0, taken_s[step] + delay_s - time.monotonic()))
        began_s[step] = time.monotonic()
        make_folder(path)

    atomic_files.make_folder = later
    try:
        yield began_s
    finally:
        atomic_files.make_folder = make_folder


def run(seed: int, *, together: int = TOGETHER, delay_s: float = DELAY_S) -> list[Written]:
    """Takes ``together`` checkpoints, and trains until all of them are written."""
    steps = sorted(Random(seed).sample(range(1, LAST_TAKEN), together))
    taken_s: dict[int, float] = {}
    began_at: dict[int, int] = {}
    through = threading.Event()
    checkpointer = subs.Checkpointer(
        "ck", max_to_keep=None, at_end=False, fsync=False, max_in_flight=together, retries=0
    )
    with tempfile.TemporaryDirectory() as folder:
        state = {"words": jnp.asarray(first_words(seed)), "count": jnp.int32(0)}
        trainer = et.Trainer(step_fn, state, subscribers=[checkpointer], run_dir=folder)
        outcomes: list[et.Event] = []

        @trainer.on(et.CheckpointStarted | et.CheckpointCommitted | et.CheckpointFailed)
        async def note(event: et.Event) -> None:
            if not isinstance(event, et.CheckpointStarted):
                began_at[event.step] = trainer.step
                outcomes.append(event)
                if len(outcomes) == together:
                    through.set()

        def batches(epoch: int) -> Iterator[np.uint32]:
            deadline_s = time.monotonic() + 60 + delay_s
            step = 0
            while step < LAST_TAKEN or not (through.is_set() or time.monotonic() > deadline_s):
                step += 1
                yield np.uint32(step)

        with delayed(delay_s, taken_s) as began_s, trainer.session() as session:
            for batch in batches(0):
                session.step(batch)
                if session.step_count in steps:
                    taken_s[session.step_count] = time.monotonic()
                    trainer.control.checkpoint()
        failed = [event for event in outcomes if isinstance(event, et.CheckpointFailed)]
        assert not failed, failed
        assert [event.step for event in outcomes] == steps, outcomes
        expected = states(seed, set(steps))
        return [
            Written(
                step,
                began_s[step] - taken_s[step],
                began_at[step] - step,
                saved_words(Path(folder), step).tobytes() == expected[step].tobytes(),
            )
            for step in steps
        ]


def saved_words(folder: Path, step: int) -> np.ndarray:
    saved = et.load_state(folder / f"ck/step-{step:08d}")
    assert int(saved["['count']"]) == step
    return saved["['words']"]


@cache
def run_of(seed: int) -> list[Written]:
    return run(seed)


def trial(seed: int) -> Mapping[str, int]:
    """Checks one checkpoint of its run.

    Raises:
        AssertionError: it does not have the state of its step, or its writer was not late.
    """
    written = run_of(seed // TOGETHER)[seed % TOGETHER]
    assert written.equal, f"the checkpoint of step {written.step} is not its state"
    assert written.late_s >= DELAY_S, f"it was written after {written.late_s:.1f} s"
    return {"bit_equal": 1, "steps_behind": written.steps_behind, "behind": int(written.steps_behind >= 100)}


CAMPAIGN = Campaign(
    name="delayed_writer",
    trial=trial,
    trials=100,
    slice=TOGETHER,
    batch=TOGETHER,
    least={"behind": 1.0},
    packages=("orbax-checkpoint",),
)
