"""`Summary` tells what the state consists of, and a run that exhausts the memory of its device says what was in it."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.testing import RecordingSubscriber
from tests.support.models import batches, new_state, step_fn


def test_the_table_has_each_array_once_and_the_events_its_sums(tmp_path: Path) -> None:
    out, recorder = io.StringIO(), RecordingSubscriber(et.RunStarted)
    summary = subs.Summary(console=Console(file=out, width=160))
    trainer = et.Trainer(step_fn, new_state(), subscribers=[summary, recorder], run_dir=tmp_path)
    trainer.fit(batches(3), epochs=1, progress=False)
    expected = {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), leaf.size, leaf.nbytes)
        for path, leaf in jax.tree_util.tree_flatten_with_path(trainer.state)[0]
    }
    arrays = {one.path: (one.shape, one.dtype, one.count, one.size_bytes) for one in summary.arrays}
    assert arrays == expected
    assert [one.path for one in summary.arrays if one.is_param] == ["['params']['w']"]
    assert all(path in out.getvalue() for path in expected)
    assert "weights: 3 numbers, 12 B" in out.getvalue()
    assert summary.memory["arguments"] > 0
    (started,) = recorder.of(et.RunStarted)
    assert (started.params_count, started.state_bytes) == (3, sum(one[3] for one in expected.values()))


def test_only_the_largest_rows_and_the_weights_are_shown_where_asked(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    state = {
        "params": {name: np.zeros(size) for name, size in (("a", 1), ("b", 9), ("c", 5))},
        "other": np.zeros(99),
    }
    out = io.StringIO()
    summary = subs.Summary(most_rows=2, params_only=True, console=Console(file=out, width=160))
    et.Trainer(step, state, subscribers=[summary], run_dir=tmp_path).fit(
        [np.zeros(())], steps=1, progress=False
    )
    shown = [name for name in ("['a']", "['b']", "['c']", "['other']") if name in out.getvalue()]
    assert shown == ["['b']", "['c']"]
    assert "1 smaller ones" in out.getvalue()


def test_exhausted_memory_is_saved_as_a_profile_and_the_error_names_it(tmp_path: Path) -> None:
    def data() -> Iterator[Any]:
        yield from batches(2)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    trainer = et.Trainer(step_fn, new_state(), subscribers=[RecordingSubscriber()], run_dir=tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        trainer.fit(data(), steps=4, progress=False)
    (profile,) = tmp_path.glob("*.prof")
    assert str(profile) in "".join(raised.value.__notes__)
    assert gzip.decompress(profile.read_bytes())
