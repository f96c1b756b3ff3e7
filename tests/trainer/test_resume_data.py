"""Data that is not the same when it is made again is reported when a run resumes in the middle of an epoch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.control import checkpoint_handover
from eventtrain.device.state import checksum

STEPS = 8


def shuffled(seed: int, *, device: bool = False) -> Any:
    """Numbers in an order of their own."""
    order = np.random.default_rng(seed).permutation(STEPS).astype(np.float32)
    return [jnp.asarray(number) if device else number for number in order]


class Seekable:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, epoch: int, start: int = 0) -> Any:
        return iter(shuffled(self.seed)[start:])


KINDS: dict[str, Any] = {
    "list": shuffled,
    "list on the device": lambda seed: shuffled(seed, device=True),
    "callable": lambda seed: lambda epoch: iter(shuffled(seed)),
    "seekable": Seekable,
    "iterator": lambda seed: iter(shuffled(seed)),
    "loader": lambda seed: et.ArrayLoader(np.arange(2 * STEPS, dtype=np.float32), 2, seed=seed),
}


def fit(folder: Path, data: Any, steps_per_call: int = 1, **aim: Any) -> None:
    trainer = et.Trainer(
        lambda state, batch: ({"sum": state["sum"] + batch.sum()}, {}),
        {"sum": jnp.float32(0)},
        subscribers=[subs.Checkpointer("ck", fsync=False)],
        run_dir=folder,
        steps_per_call=steps_per_call,
    )
    trainer.fit(data, resume=True, **aim)


@pytest.mark.parametrize("steps_per_call", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [False, True], ids=["the same", "another order"])
def test_another_order_is_reported_with_the_batch_and_the_same_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, steps_per_call: int, changed: bool
) -> None:
    fit(tmp_path, KINDS[kind](0), steps_per_call, steps=5)
    caplog.clear()
    fit(tmp_path, KINDS[kind](1 if changed else 0), steps_per_call, steps=STEPS)
    said = [
        record.getMessage() for record in caplog.records if "does not resume exactly" in record.getMessage()
    ]
    assert len(said) == changed
    assert not changed or "batch 4 of epoch 0" in said[0]


def test_no_batch_is_read_on_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def counted(tree: Any) -> int | None:
        threads.append(threading.current_thread().name)
        return checksum(tree)

    monkeypatch.setattr(checkpoint_handover, "checksum", counted)
    fit(tmp_path, shuffled(0), steps=5)
    assert threads
    assert not [name for name in threads if "Checkpointer" not in name]


def test_the_checksum_depends_on_every_byte_dtype_and_shape() -> None:
    trees = [
        {"x": np.arange(6, dtype=np.float32)},
        {"x": np.arange(6, dtype=np.int32)},
        {"x": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"x": np.arange(6, dtype=np.float32)[::-1]},
        {"x": jnp.arange(6, dtype=jnp.bfloat16)},
    ]
    assert len({checksum(tree) for tree in trees}) == len(trees)
    assert checksum(trees[0]) == checksum(jax.tree.map(jnp.asarray, trees[0]))
    deleted = jnp.ones(2)
    deleted.delete()
    assert checksum([deleted]) is None
    assert checksum([jax.random.key(0), "text", 3]) is not None
