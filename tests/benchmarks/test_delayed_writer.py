"""A snapshot survives donation: what is written late is the state of its step, and no other state is held for it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from benchmarks.campaigns import delayed_writer
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from tests.support.accelerator import as_on_an_accelerator

SHAPE = (70_001,)
"""Of a state that nothing else in this process is like."""


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_what_a_delayed_writer_saves_is_the_state_of_its_step_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A part of one run of the campaign, with a shorter delay."""
    if device == "accelerator":
        as_on_an_accelerator(monkeypatch)
    written = delayed_writer.run(1_000_000, together=8, delay_s=0.5)
    assert len(written) == 8
    assert all(one.equal for one in written)
    assert min(one.late_s for one in written) >= 0.5
    assert min(one.steps_behind for one in written) > 0


def states_alive() -> int:
    gc.collect()
    arrays = [array for array in jax.live_arrays() if array.shape == SHAPE]
    return len({array.unsafe_buffer_pointer() for array in arrays})


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", ["keep", "copy"])
def test_each_snapshot_in_flight_holds_one_state_and_none_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Any
) -> None:
    """Beside the one that is trained; the donating step leaves no other."""
    make_folder, released = atomic_files.make_folder, threading.Event()

    def later(path: Path) -> None:
        assert released.wait(60)
        make_folder(path)

    monkeypatch.setattr(atomic_files, "make_folder", later)
    trainer = et.Trainer(
        lambda state, batch: (state + batch, {}),
        jnp.zeros(SHAPE),
        subscribers=[subs.Checkpointer("ck", every=10, at_end=False, max_in_flight=4, max_to_keep=None)],
        run_dir=tmp_path,
        snapshot=snapshot,
    )
    committed = threading.Semaphore(0)

    @trainer.on(et.CheckpointCommitted)
    async def note(event: et.CheckpointCommitted) -> None:
        committed.release()

    alive: dict[int, int] = {}
    with trainer.session() as session:
        for step in range(1, 60):
            session.step(np.float32(1))
            if step in (5, 15, 25, 35, 45):
                session.block_until_ready()
                alive[step] = states_alive()
            if step == 45:
                released.set()
                for _ in range(4):
                    assert committed.acquire(timeout=60)
        session.block_until_ready()
        alive[59] = states_alive()
    # Those of steps 10, 20, 30 and 40 are in flight; the first was copied to the host, which on a CPU is a view.
    assert alive[45] >= 4
    assert all(alive[step] <= count for step, count in {5: 1, 15: 2, 25: 3, 35: 4, 45: 5, 59: 2}.items()), (
        alive
    )
