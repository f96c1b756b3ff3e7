"""A run goes on from what a Checkpointer wrote to disk, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, new_state, step_fn


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def make_trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer:
    return et.Trainer(step_fn, new_state(), subscribers=subscribers, run_dir=run_dir, **options)


def test_a_run_resumes_from_each_step_on_disk_with_extensions_kept_snapshots_and_subscribers(
    tmp_path: Path,
) -> None:
    def stopping() -> et.Subscriber:
        return subs.EarlyStopping("loss", patience=9, restore_best_weights=True)

    def average() -> Any:
        return et.EMA(0.9)

    data = batches(4)
    whole = make_trainer(
        tmp_path / "a",
        subs.Checkpointer("ck", every=3, max_to_keep=None, at_end=False),
        stopping(),
        step_extensions=[average()],
    )
    expected = whole.fit(data, epochs=3)
    assert [path.name for path in sorted((tmp_path / "a/ck").iterdir())] == [
        f"step-{step:08d}" for step in (3, 6, 9, 12)
    ]
    for step in (3, 6, 9):
        checkpointer = subs.Checkpointer("ck", at_end=False)
        resumed = make_trainer(tmp_path / "a", checkpointer, stopping(), step_extensions=[average()])
        result = resumed.fit(data, epochs=3, resume=step)
        assert result.step == 12
        assert same(resumed.state, whole.state)
        assert same(result.state, expected.state)
        assert same(resumed.extension_states(), whole.extension_states())
