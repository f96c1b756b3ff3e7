"""The demo keeps what it promises, and says so when it does not."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import eventtrain as et
from eventtrain import demo
from eventtrain import subscribers as subs


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MEASURED_STEPS", 100)
    monkeypatch.setattr(demo, "MEASURED_PAIRS", 2)
    text = io.StringIO()
    out = tmp_path / "out"
    problem = demo.run_demo(out, console=Console(file=text, width=200))
    shown = text.getvalue()
    assert problem is None, shown
    found = re.search(r"Accuracy on the test set, read once: (0\.\d+)", shown)
    assert found is not None
    assert float(found[1]) >= 0.97
    assert re.search(
        r"LR cut +step \d+: learning_rate .* caused by ReduceLROnPlateau on epoch_completed: plateau", shown
    )
    assert re.search(r"checkpoint +step \d+: step-\d+ committed, ", shown)
    assert re.search(r"run completed at step \d+: early stopping: val_loss has not improved", shown)
    for word in ("bare jitted loop", "with all subscribers", "JSONLLogger", "Checkpointer", "events.jsonl"):
        assert word in shown
    assert "failed" not in shown
    events = [et.parse_event(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = [event.step for event in events if isinstance(event, et.StepCompleted)]
    assert steps == list(range(1, len(steps) + 1))
    checkpoints = sorted((out / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    restored = subs.restore_state(checkpoints[-1], like=demo.new_state(seed=5))
    assert float(demo.evaluate_step(restored, demo.split_digits().validation)["accuracy"]) > 0.95


def test_the_split_is_fixed_and_standardised_by_the_training_part_alone() -> None:
    digits, again = demo.split_digits(), demo.split_digits()
    assert [len(part[1]) for part, _ in demo._parts(digits)] == [1257, 270, 270]
    images = digits.train[0]
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std() == pytest.approx(1, abs=1e-5)
    assert digits.test[0].mean() != pytest.approx(0, abs=1e-5)
    for (part, _), (other, _) in zip(demo._parts(digits), demo._parts(again), strict=True):
        assert np.array_equal(part[0], other[0])
    seen = {image.tobytes() for image in digits.train[0]}
    assert not seen & {image.tobytes() for image in digits.test[0]}


def test_without_scikit_learn_it_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "load_digits", None)
    problem = demo.run_demo(tmp_path / "out")
    assert problem is not None
    assert "eventtrain[demo]" in problem
    assert not (tmp_path / "out").exists()


def test_each_promise_that_is_not_kept_is_a_problem() -> None:
    story = demo.Story(Console(quiet=True))
    cause = et.Cause(event="epoch_completed", step=1, subscriber="ReduceLROnPlateau")
    cut = et.HyperparamChanged(name="learning_rate", path="x", old=1.0, new=0.1, cause=cause)
    commit = et.CheckpointCommitted(path="x", size_bytes=1, duration_s=1.0)
    assert "LR" not in str(demo._problem(0.5, story, "early stopping"))
    assert "0.5000" in str(demo._problem(0.5, story, "early stopping"))
    assert "never cut" in str(demo._problem(0.98, story, "early stopping"))
    story.tell(cut)
    assert "no checkpoint" in str(demo._problem(0.98, story, "early stopping"))
    story.tell(commit)
    assert "EarlyStopping" in str(demo._problem(0.98, story, "completed"))
    assert demo._problem(0.98, story, "early stopping: val_loss") is None
