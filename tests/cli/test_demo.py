"""The demo keeps what it promises, and says so when it does not."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli import demo
from eventtrain.events.commands import ScaleHyperparam


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MEASURED_STEPS", 100)
    monkeypatch.setattr(demo, "MEASURED_PAIRS", 2)
    text = io.StringIO()
    out = tmp_path / "out"
    problem = demo.run_demo(out, console=Console(file=text, width=200))
    shown = text.getvalue()
    assert problem is None, shown
    found = re.search(r"Accuracy on the test set: (0\.\d+)", shown)
    assert found is not None
    assert float(found[1]) >= 0.97
    for line in (
        r"LR +step 39: learning_rate 0.00033 -> 0.00067, by LearningRateScheduler on epoch_started: schedule",
        r"LR +step \d+: learning_rate .* by ReduceLROnPlateau on epoch_completed: plateau",
        r"LR +step 299: learning_rate 0.001 -> 0.0007, by GradientSpike on step_completed: spike",
        r"alert +loss not finite: loss = nan at step 313",
        r"restored +step 377: state of step 300, TerminateOnNaN/\d",
        r"LR +step 377: learning_rate 0.0007 -> 0.00035, by TerminateOnNaN on step_completed: rollback",
        r"restored +step \d+: weights of step \d+, EarlyStopping/best",
        r"checkpoint +step \d+: step-\d+ committed, ",
        r"TerminateOnNaN +│ \d+ x take_snapshot +│ step 377: rollback: loss is nan at step 313",
        r" +│ 1 x restore ",
        r"EarlyStopping +│ \d+ x take_snapshot +│ step \d+: early stopping: val_loss has not improved for",
        r"GradientSpike +│ 1 x scale_hyperparam +│ step 299: spike: grad_norm",
        r"LearningRateScheduler +│ 3 x set_hyperparam +│ step 78: schedule, epoch 3",
    ):
        assert re.search(line, shown), line
    assert re.search(r"run completed at step \d+: early stopping: val_loss has not improved", shown)
    for word in ("bare jitted loop", "with all subscribers", "JSONLLogger", "Checkpointer", "events.jsonl"):
        assert word in shown
    assert "failed" not in shown
    events = [et.parse_event(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = [event.step for event in events if isinstance(event, et.StepCompleted)]
    assert steps == list(range(1, len(steps) + 1))
    assert str(out / "report.html") in shown
    assert str(out / "curves.png") in shown
    assert shown.rstrip().endswith(f"eventtrain dashboard {out}")
    with Image.open(out / "curves.png") as image:
        image.verify()
    report = (out / "report.html").read_text()
    assert report.count("<svg") == 4
    for word in ("Handwritten digits", "early stopping: val_loss", "rollback: loss is nan", "all resolved"):
        assert word in report, word
    checkpoints = sorted((out / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    restored = subs.restore_state(checkpoints[-1], like=demo.new_state(seed=5))
    assert float(demo.evaluate_step(restored, demo.split_digits()[1])["accuracy"]) > 0.95


def test_the_split_is_fixed_and_standardised_by_the_training_part_alone() -> None:
    parts, again = demo.split_digits(), demo.split_digits()
    assert [len(labels) for _, labels in parts] == [1257, 270, 270]
    (train, _), _, (test, _) = parts
    assert train.mean() == pytest.approx(0, abs=1e-5)
    assert train.std() == pytest.approx(1, abs=1e-5)
    assert test.mean() != pytest.approx(0, abs=1e-5)
    for (images, _), (other, _) in zip(parts, again, strict=True):
        assert np.array_equal(images, other)
    seen = {image.tobytes() for image in train}
    assert not seen & {image.tobytes() for image in test}


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_without_what_it_needs_it_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else object())
    problem = demo.run_demo(tmp_path / "out")
    assert problem is not None
    assert "eventtrain[demo]" in problem
    assert not (tmp_path / "out").exists()


def test_warm_up_ends_with_the_learning_rate_of_the_optimiser_and_then_leaves_it_alone() -> None:
    assert demo.warm_up(0, 1.0) == pytest.approx(demo.LEARNING_RATE / 3)
    assert demo.warm_up(2, 1.0) == demo.LEARNING_RATE
    assert demo.warm_up(3, 0.25) == 0.25


def test_two_batches_of_the_run_are_spoiled() -> None:
    loader = et.ArrayLoader((np.ones((6, 64), np.float32), np.arange(6)), 2, shuffle=False)
    batches = demo.SpoiledBatches(loader)
    kinds = {
        epoch: [float(images[0, 0]) for images, _ in batches(epoch)]
        for epoch in range(10)
        if epoch in (5, 6, 8)
    }
    assert len(batches) == 3
    assert kinds[5] == [1, 1, 1]
    assert kinds[6] == [30, 1, 1]
    assert np.isnan(kinds[8]).tolist() == [True, False, False]
    assert all(images.dtype == np.float32 for images, _ in batches(8))


def test_each_promise_that_is_not_kept_is_a_problem() -> None:
    printer = demo.EventPrinter(Console(quiet=True))

    def missing() -> str:
        return str(demo._problem(0.98, printer, "early stopping: val_loss"))

    def decided(subscriber: str) -> et.CommandApplied:
        cause = et.Cause(event="epoch_completed", step=1, subscriber=subscriber)
        return et.CommandApplied(command=ScaleHyperparam(name="learning_rate", factor=0.1, cause=cause))

    assert "0.5000" in str(demo._problem(0.5, printer, "early stopping"))
    for named, event in (
        ("never cut", decided("ReduceLROnPlateau")),
        ("found no spike", decided("GradientSpike")),
        ("never rolled back", et.CheckpointRestored(part="all", restored_step=1)),
        ("best weights", et.CheckpointRestored(part="params", restored_step=1)),
        ("no checkpoint", et.CheckpointCommitted(path="x", size_bytes=1, duration_s=1.0)),
    ):
        assert named in missing()
        printer.handle(event)
    assert "EarlyStopping" in str(demo._problem(0.98, printer, "completed"))
    assert demo._problem(0.98, printer, "early stopping: val_loss") is None
