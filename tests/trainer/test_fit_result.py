from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, make_trainer


def test_a_result_is_shown_in_one_line_whatever_it_holds(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    trainer = et.Trainer(step, {"w": jnp.zeros((100, 100))}, run_dir=tmp_path)
    result = trainer.fit([np.float32(1)] * 2, epochs=30, progress=False)
    assert repr(result) == "FitResult(step=60, epochs_completed=30, stop_reason='completed', undelivered={})"
    assert len(result.history) == 30
    assert result.state["w"].shape == (100, 100)


def test_the_history_keeps_the_newest_epochs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventtrain.loop.event_builder.HISTORY_LIMIT", 3)
    result = make_trainer(tmp_path).fit(batches(1), epochs=5)
    assert [epoch.epoch for epoch in result.history] == [2, 3, 4]
    assert result.epochs_completed == 5
