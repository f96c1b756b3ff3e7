"""A sample is made from the state of exactly its boundary, and no step waits for its value."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared.images import png
from eventtrain.subscribers.monitoring.sample import MOST_WAITING
from eventtrain.testing import RecordingSubscriber


def step_fn(state: Any, batch: Any) -> Any:
    return {"params": {"w": state["params"]["w"] + batch}}, {"loss": batch}


def trainer(run_dir: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer[Any]:
    state = {"params": {"w": np.zeros(2, np.float32)}}
    return et.Trainer(step_fn, state, subscribers=subscribers, run_dir=run_dir, **options)


DATA = [np.float32(1)] * 5


def weights(state: Any) -> Any:
    return state["params"]["w"]


def taken(recorder: RecordingSubscriber, name: str = "sample") -> dict[int, Any]:
    return {event.step: event.value for event in recorder.of(et.SampleTaken) if event.name == name}


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_sample_has_the_state_of_its_boundary_and_the_last_one_too(
    steps_per_call: int, tmp_path: Path
) -> None:
    recorder = RecordingSubscriber()
    by_step, by_epoch = subs.Sample(weights, every=3), subs.Sample(weights, every_epochs=2, name="epochs")
    run = trainer(tmp_path, by_step, by_epoch, recorder, steps_per_call=steps_per_call)
    run.fit(DATA, steps=12, progress=False)
    assert {step: value.tolist() for step, value in taken(recorder).items()} == {
        step: [step, step] for step in (3, 6, 9, 12)
    }
    assert {step: value.tolist() for step, value in taken(recorder, "epochs").items()} == {10: [10, 10]}


def test_a_command_takes_effect_at_the_boundary_that_its_lag_gives(tmp_path: Path) -> None:
    recorder = RecordingSubscriber()
    run = trainer(tmp_path, subs.Sample(weights, name="here"), recorder)

    @run.on(et.StepCompleted, lag=2, where=lambda event: event.step == 3)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.sample("here")
        control.sample("hero")

    run.fit(DATA, steps=10, progress=False)
    assert {step: value.tolist() for step, value in taken(recorder, "here").items()} == {5: [5, 5]}
    (rejected,) = recorder.of(et.CommandRejected)
    assert "Did you mean 'here'?" in rejected.reason


def test_it_sees_the_weights_for_predictions(tmp_path: Path) -> None:
    recorder = RecordingSubscriber()
    average = et.EMA(0.5, use_for={"predict"})
    run = trainer(tmp_path, subs.Sample(weights, every=4), recorder, step_extensions=[average])
    run.fit(DATA, steps=4, progress=False)
    assert taken(recorder)[4][0] < 4


@pytest.mark.parametrize(
    ("options", "media", "value"),
    [
        ({}, "array", np.array([2, 2], np.float32)),
        ({"decode": lambda w: f"w = {w[0]:.0f}"}, "text", "w = 2"),
        ({"decode": lambda w: {"i": w, "who": ["a", "b"]}}, "table", {"i": (2.0, 2.0), "who": ("a", "b")}),
        (
            {"decode": lambda w: np.full((3, 2, 3), 7, np.uint8)},
            "image",
            png(np.full((3, 2, 3), 7, np.uint8)),
        ),
        (
            {"decode": lambda w: w[None, :] / 4, "media": "image"},
            "image",
            png(np.full((1, 2, 1), 128, np.uint8)),
        ),
    ],
)
def test_the_media_is_that_of_the_value_and_json_gives_it_back(
    options: dict[str, Any], media: str, value: Any, tmp_path: Path
) -> None:
    log = subs.JSONLLogger("events.jsonl")
    trainer(tmp_path, subs.Sample(weights, every=2, **options), log).fit(DATA, steps=2, progress=False)
    (event,) = et.read_events(tmp_path, kinds=et.SampleTaken)
    assert event == et.SampleTaken(name="sample", media=media, value=value).model_copy(  # pyright: ignore
        update={name: getattr(event, name) for name in et.Event.model_fields}
    )
    if media == "array":
        assert not event.value.flags.writeable


def test_a_png_file_has_the_pixels() -> None:
    generator = np.random.default_rng(0)
    for channels in (1, 3, 4):
        image = generator.integers(0, 256, (5, 7, channels), np.uint8)
        read = np.asarray(Image.open(io.BytesIO(png(image))))
        assert np.array_equal(read.reshape(image.shape), image)


def test_a_value_that_does_not_fit_its_media_is_refused() -> None:
    for media, value in (
        ("text", b"x"),
        ("image", b"no PNG"),
        ("image", np.zeros((2, 2), np.uint8)),
        ("array", np.array(["x"])),
        ("table", {"a": [1], "b": [1, 2]}),
        ("table", {"a": [object()]}),
        ("sound", "x"),
    ):
        with pytest.raises(ValueError, match=r"media|text|image|array|table|columns"):
            et.SampleTaken(name="s", media=media, value=value)  # pyright: ignore[reportArgumentType]


def test_a_sample_that_fails_is_reported_and_training_continues(tmp_path: Path) -> None:
    recorder = RecordingSubscriber()
    sample = subs.Sample(weights, every=2, decode=lambda w: [][0])
    result = trainer(tmp_path, sample, recorder).fit(DATA, steps=4, progress=False)
    assert result.step == 4
    assert [(e.subscriber, e.step) for e in recorder.of(et.SubscriberFailed)] == [
        ("Sample", 2),
        ("Sample", 4),
    ]
    assert "IndexError" in recorder.of(et.SubscriberFailed)[0].error


def test_a_function_that_cannot_be_traced_fails_the_run_before_its_first_step(tmp_path: Path) -> None:
    for fn in (lambda state: state["parms"], lambda state: "text"):
        recorder = RecordingSubscriber()
        run = trainer(tmp_path, subs.Sample(fn, every=2, name="broken"), recorder)
        with pytest.raises(et.StepError, match="sample 'broken'"):
            run.fit(DATA, steps=4, progress=False)
        assert recorder.of(et.StepCompleted) == []


def test_no_step_waits_for_a_slow_sample_and_what_is_too_much_is_left_out(tmp_path: Path) -> None:
    recorder, release = RecordingSubscriber(), threading.Event()
    sample = subs.Sample(weights, every=1, decode=lambda w: release.wait(60) and w)
    run = trainer(tmp_path, sample, recorder)

    @run.on(et.StepCompleted, where=lambda event: event.step == 20)
    async def let_go(event: et.StepCompleted) -> None:
        release.set()

    run.fit(DATA, steps=20, progress=False)
    assert list(taken(recorder))[:MOST_WAITING] == list(range(1, MOST_WAITING + 1))
    left_out = [event.step for event in recorder.of(et.SubscriberFailed)]
    assert left_out[0] == MOST_WAITING + 1
    assert sorted([*taken(recorder), *left_out]) == list(range(1, 21))


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [subs.Sample(weights, name="one"), subs.Sample(weights, name="one")]
    with pytest.raises(et.ConfigurationError, match="named 'one'"):
        trainer(tmp_path, *twice).fit(DATA, steps=1, progress=False)
