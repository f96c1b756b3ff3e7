"""PlotCurves: pictures that readers of PNG, SVG and PDF accept, with the pixels of the metrics in them."""

from __future__ import annotations

import errno
import io
import json
import math
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import anyio
import anyio.to_thread
import numpy as np
import pytest
from PIL import Image

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.run_series import MOST_CURVES, RunSeries
from eventtrain.subscribers.reports import plot_curves, plotting
from eventtrain.testing import RecordingSubscriber, ScriptedStep
from eventtrain.validation.optional_imports import MissingModule
from tests.support.models import batches, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer

pytestmark = pytest.mark.filterwarnings("error")


def scripted(run_dir: Path, *subscribers: et.Subscriber, steps: int = 4, **metrics: Any) -> tuple[Any, Any]:
    metrics = metrics or {"loss": [3.0, 2.5, 2.0, 1.5, 1.25, 1.0]}
    script = ScriptedStep(
        metrics, eval_metrics={"loss": [2.0, 1.5, 1.0]}, steps_per_epoch=steps, learning_rate=0.5
    )
    trainer = et.Trainer(
        script.step_fn, script.state, eval_fn=script.eval_fn, subscribers=subscribers, run_dir=run_dir
    )
    return trainer, script


def fit(run_dir: Path, *subscribers: et.Subscriber, epochs: int = 3, **options: Any) -> et.FitResult:
    trainer, script = scripted(run_dir, *subscribers, **options)
    return trainer.fit(script.data, epochs=epochs, eval_data=script.eval_data, progress=False)


def pixels(path: Path, colour: str) -> int:
    """How many pixels have a colour like this, or a shade of it on the paper."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return int((np.abs(image - wanted).sum(axis=2) < 40).sum())


def window(first: int, **metrics: Any) -> et.StepsCompleted:
    columns = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    last = first + len(next(iter(columns.values()))) - 1
    return et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=0, metrics=columns)


def test_the_picture_shows_training_evaluation_and_the_changes_of_the_learning_rate(tmp_path: Path) -> None:
    trainer, script = scripted(tmp_path, subs.PlotCurves())

    @trainer.on(et.EpochCompleted, lag=0)
    async def shrink(event: et.EpochCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    trainer.fit(script.data, epochs=3, eval_data=script.eval_data)
    path = tmp_path / "curves.png"
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"
        assert image.size[0] > 1000
    for colour in (plotting.LIGHT.train, plotting.LIGHT.evaluation, plotting.LIGHT.mark):
        assert pixels(path, colour) > 200, colour
    assert pixels(path, plotting.LIGHT.bad) == 0
    assert not [path for path in tmp_path.glob(".*") if path.name != ".eventtrain.attempts"]
    fit(tmp_path / "plain", subs.PlotCurves(metrics=("accuracy",), hyperparams=()))
    assert pixels(tmp_path / "plain/curves.png", plotting.LIGHT.train) == 0


def test_each_metric_is_drawn_with_its_twin_and_only_those_that_are_wanted() -> None:
    series = RunSeries()
    series.add(et.EpochStarted(step=0, epoch=0, hyperparams={"learning_rate": 0.1, "b1": 0.9}))
    series.add(window(1, loss=[2.0, 1.0], accuracy=[0.1, 0.2]))
    series.add(et.EvalCompleted(step=2, epoch=0, metrics={"loss": 0.5, "bleu": 3.0}, steps=1, duration_s=0))
    series.add(
        et.EpochCompleted(
            step=2, epoch=0, metrics={"loss": 1.5, "val_loss": 9.0}, hyperparams={}, steps=2, duration_s=0
        )
    )
    panels = {panel.name: panel for panel in series.panels(("learning_rate",))}
    assert list(panels) == ["loss", "accuracy", "val_bleu", "learning_rate"]
    assert panels["loss"].steps is not None
    assert panels["loss"].steps.points().means.tolist() == [2.0, 1.0]
    assert panels["loss"].epochs is not None
    assert panels["loss"].epochs.points().means.tolist() == [1.5]
    assert panels["loss"].evaluations is not None
    assert panels["loss"].evaluations.points().means.tolist() == [0.5]  # where it was measured, once
    for wanted, shown in (
        (("accuracy", "val_loss"), ["accuracy", "loss"]),
        (("val_bleu",), ["val_bleu"]),
        (("no such",), []),
    ):
        chosen = RunSeries(
            metrics=wanted, steps=series.steps, epochs=series.epochs, evaluations=series.evaluations
        )
        assert [panel.name for panel in chosen.panels(())] == shown


def test_the_learning_rate_jumps_where_it_was_changed() -> None:
    series = RunSeries()
    series.add(et.EpochStarted(step=0, epoch=0, hyperparams={"learning_rate": 0.5}))
    cause = et.Cause(event="epoch_completed", step=5, subscriber="ReduceLROnPlateau")
    series.add(
        et.HyperparamChanged(
            step=7, name="learning_rate", path="p", old=0.5, new=0.25, reason="flat", cause=cause
        )
    )
    series.add(
        et.EpochCompleted(
            step=9, epoch=0, metrics={}, hyperparams={"learning_rate": 0.25}, steps=9, duration_s=0
        )
    )
    points = series.hyperparams["learning_rate"].points()
    assert list(zip(points.steps, points.means, strict=True)) == [(0, 0.5), (7, 0.5), (7, 0.25), (9, 0.25)]
    assert (series.changes[0].by, series.changes[0].reason, series.changes[0].step) == (
        "ReduceLROnPlateau",
        "flat",
        7,
    )


def test_a_spike_of_one_step_in_a_million_is_in_the_picture(tmp_path: Path) -> None:
    def drawn(spike: float) -> int:
        curve = Curve()
        values = np.random.default_rng(0).normal(1.0, 0.01, size=1_000_000)
        values[700_000] = spike
        curve.add(np.arange(1, 1_000_001), values)
        series = RunSeries(steps={"loss": curve})
        data = plotting.picture(series.panels(), [], "png", scale="linear")
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        blue = np.abs(image - [0, 114, 178]).sum(axis=2) < 400
        return int(np.ptp(np.flatnonzero(blue[50:250].any(axis=1))))

    assert drawn(1.0) > 100  # the band fills the panel
    series = RunSeries(steps={"loss": Curve()})
    values = np.ones(1_000_000)
    values[700_000] = 50.0
    series.steps["loss"].add(np.arange(1, 1_000_001), values)
    with_spike = plotting.picture(series.panels(), [], "png", scale="linear")
    assert drawn(50.0) > 100  # the spike reaches to the top
    image = np.asarray(Image.open(io.BytesIO(with_spike)).convert("RGB")).astype(int)
    upper = image[60:140]  # above the flat curve there is nothing but the spike
    assert (np.abs(upper - [255, 255, 255]).sum(axis=2) > 100).sum() > 20


def test_what_is_not_finite_leaves_a_gap_with_a_mark(tmp_path: Path) -> None:
    loss = [1.0, math.nan, math.inf, -math.inf, 2.0, 1.0]
    fit(tmp_path, subs.PlotCurves("a.png", hyperparams=()), loss=loss, steps=6, epochs=1)
    assert pixels(tmp_path / "a.png", plotting.LIGHT.bad) > 20
    fit(tmp_path, subs.PlotCurves("b.png"), loss=[math.nan], steps=3)
    assert pixels(tmp_path / "b.png", plotting.LIGHT.bad) > 20


@pytest.mark.parametrize(
    "values",
    [
        [1.7e308, -1.7e308, 1.0],
        [5e-324, 1.0, 1e-300],
        [1e-200, 1e200],
        [0.0] * 3,
        [math.nan] * 3,
        [math.inf, -math.inf],
        [1.0],
        [1e-7, 1.0000001e-7],
        [1e16, 1e16 + 2],
        [-1e-5, 1e5],
        [0.001, 0.5],
        [1.7e308] * 5000,
    ],
    ids=lambda values: repr(values[:3]),
)
def test_any_values_can_be_drawn(values: list[float]) -> None:
    series = RunSeries()
    series.add(window(1, loss=values))
    series.add(et.EvalCompleted(step=1, epoch=0, metrics={"loss": values[0]}, steps=1, duration_s=0))
    for scale in ("auto", "log"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Image.open(io.BytesIO(plotting.picture(series.panels(), [], "png", scale=scale))).verify()
            assert "<path" in plotting.fragment(series.panels()[0], [], scale=scale)
        assert said == []


@pytest.mark.parametrize("values", [[1e13, 3e13], [1e-26, 2e-26], [1e7 + 1, 1e7 + 2]])
def test_the_power_of_ten_of_an_axis_is_seen_and_covers_nothing(
    values: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    saved = vars(plotting)["_saved"]
    monkeypatch.setattr(
        plotting, "_saved", lambda figure, kind: figures.append(figure) or saved(figure, kind)
    )
    series = RunSeries()
    series.add(window(1, **{"the name of the metric": values}))
    plotting.picture(series.panels(), [], "png")
    plotting.fragment(series.panels()[0], [])
    for figure in figures:
        figure.canvas.draw()
        (place,) = figure.axes
        power = place.yaxis.get_offset_text()
        assert "1e" in power.get_text()
        box = power.get_window_extent()
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(text.get_window_extent()) for text in figure.texts if text.get_text())


def test_each_suffix_gives_a_file_that_its_readers_accept(tmp_path: Path) -> None:
    for name in ("deep/er/a.png", "a.SVG", "a.pdf"):
        fit(tmp_path, subs.PlotCurves(name))
    Image.open(tmp_path / "deep/er/a.png").verify()
    root = ElementTree.parse(tmp_path / "a.SVG").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    data = (tmp_path / "a.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert data.rstrip().endswith(b"%%EOF")


ODD = [
    "$x^{",
    "_hidden",
    "a,b\n\tc",
    "<b>&amp;",
    "损失",
    "\\frac",
    "x" * 300,
    "",
    "%d",
    "\x00\x07",
    "\U0001f600",
]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_odd_names_are_drawn_as_they_are_without_a_warning(kind: str) -> None:
    series = RunSeries()
    series.add(window(1, **{name: [1.0, 2.0, 3.0] for name in (ODD if kind == "png" else ODD[:6])}))
    changed = et.HyperparamChanged(step=2, name="_$rate", path="", old=1, new=2)
    series.add(changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = plotting.picture(series.panels(), series.changes, kind, title="$\\bad{ 损", note="</svg> $")
        fragments = [plotting.fragment(panel, series.changes) for panel in series.panels()[:2]]
    assert said == []
    assert len(data) > 1000
    if kind == "svg":
        ElementTree.fromstring(data)
    for fragment in fragments:
        ElementTree.fromstring(fragment.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_more_metrics_than_can_be_shown_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    shown: list[int] = []

    def picture(panels: Any, changes: Any, **options: Any) -> bytes:
        notes.append(options["note"])
        shown.append(len(panels))
        return b"picture"

    monkeypatch.setattr(plotting, "picture", picture)
    fit(tmp_path, subs.PlotCurves(), **{f"m{n}": [1.0] for n in range(60)})
    assert shown == [25]
    assert "38 more metrics are not drawn" in notes[0]  # m0 to m59, learning_rate and val_loss
    series = RunSeries()
    series.add(window(1, **{f"m{n}": [1.0] for n in range(MOST_CURVES + 50)}))
    assert len(series.steps) == MOST_CURVES
    assert len(series.left_out) == 50
    assert "are left out" in caplog.text


def test_every_so_many_epochs_it_is_drawn_and_the_file_is_always_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    trainer, script = scripted(tmp_path, subs.PlotCurves(every_epochs=2))
    path = tmp_path / "curves.png"

    @trainer.on(et.EpochStarted, lag=0)
    def wait(event: et.EpochStarted) -> None:
        deadline = threading.Event()
        for _ in range(1000):
            if event.epoch < 2 or path.exists():
                break
            deadline.wait(0.02)
        if path.exists():
            with Image.open(path) as image:
                seen.append((event.epoch, image.size[0]))

    trainer.fit(script.data, epochs=4, eval_data=script.eval_data)
    assert [epoch for epoch, _ in seen] == [2, 3]


async def test_while_one_is_drawn_only_the_newest_of_those_due_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, notes = threading.Event(), threading.Event(), []

    def picture(panels: Any, changes: Any, **options: Any) -> bytes:
        notes.append(options["note"])
        begun.set()
        go.wait(20)
        return b"picture"

    monkeypatch.setattr(plotting, "picture", picture)
    plot = subs.PlotCurves(every_epochs=1)
    control: Any = None
    await plot.start(et.RunContext("run", tmp_path, control, lambda event: None))
    for epoch in range(50):
        await plot.handle(et.EpochCompleted(step=epoch + 1, epoch=epoch, metrics={}, steps=1, duration_s=0))
        await anyio.to_thread.run_sync(begun.wait)
    go.set()
    await plot.stop()
    assert notes[:1] == ["so far, at step 1"]
    assert notes[1:-1] in ([], ["so far, at step 50"])
    assert len(notes) <= 3


@pytest.mark.parametrize("reason", ["failed", "stopped"])
def test_a_run_that_fails_or_is_stopped_is_drawn_and_says_so(
    tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    whole = plotting.picture

    def picture(panels: Any, changes: Any, **options: Any) -> bytes:
        notes.append(options["note"])
        return whole(panels, changes, **options)

    monkeypatch.setattr(plotting, "picture", picture)
    trainer, script = scripted(tmp_path, subs.PlotCurves())

    @trainer.on(et.EpochCompleted, lag=0, on_error="fail")
    async def end(event: et.EpochCompleted, control: et.Control) -> None:
        if reason == "failed":
            raise RuntimeError("no more")
        control.stop("enough")

    if reason == "failed":
        with pytest.raises(et.SubscriberError):
            trainer.fit(script.data, epochs=3)
        assert "failed, SubscriberError" in notes[0]
    else:
        trainer.fit(script.data, epochs=3)
        assert notes == ["step 4: enough"]
    Image.open(tmp_path / "curves.png").verify()


def test_what_cannot_be_written_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReplacesTheFolder(et.Subscriber):
        async def on_run_started(self, event: et.RunStarted) -> None:
            await anyio.Path(tmp_path / "file").rmdir()
            await anyio.Path(tmp_path / "file").write_text("no folder")

    failed = RecordingSubscriber(et.SubscriberFailed)
    result = fit(tmp_path, subs.PlotCurves("file/curves.png", every_epochs=1), failed, ReplacesTheFolder())
    assert result.step == 12
    errors = [event.error for event in failed.of(et.SubscriberFailed)]
    assert errors
    assert all("cannot write" in error and "file/curves.png" in error for error in errors)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fit(tmp_path, subs.PlotCurves())
    before = (tmp_path / "curves.png").read_bytes()
    monkeypatch.setattr(atomic_files.os, "fsync", full)
    failed.recorded.clear()
    assert fit(tmp_path, subs.PlotCurves(), failed).step == 12
    assert "No space left on device" in failed.of(et.SubscriberFailed)[-1].error
    assert (tmp_path / "curves.png").read_bytes() == before
    assert not [path for path in tmp_path.glob(".*") if path.name != ".eventtrain.attempts"]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(*given: Any, **options: Any) -> bytes:
        raise ValueError("no such axis")

    monkeypatch.setattr(plotting, "picture", picture)
    failed = RecordingSubscriber(et.SubscriberFailed)
    assert fit(tmp_path, subs.PlotCurves(every_epochs=3), failed).step == 12
    assert [event.error for event in failed.of(et.SubscriberFailed)][-1] == "ValueError: no such axis"


def test_a_disk_that_hangs_delays_the_end_by_no_more_than_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(plot_curves, "write_atomically", lambda path, data: released.wait(60))
    failed = RecordingSubscriber(et.SubscriberFailed)
    try:
        assert fit(tmp_path, subs.PlotCurves(finish_timeout_s=0.2), failed).step == 12
    finally:
        released.set()
    assert "was not drawn within 0.2 s" in failed.of(et.SubscriberFailed)[-1].error


def test_a_resumed_run_draws_the_whole_run(tmp_path: Path) -> None:
    def trainer(*others: et.Subscriber) -> tuple[et.Trainer, Any]:
        plot = subs.PlotCurves()
        return et.Trainer(step_fn, new_state(), subscribers=[plot, *others], run_dir=tmp_path), plot

    data, keeper = batches(4), MemoryCheckpointer(every=1)
    whole, expected = trainer(keeper)
    whole.fit(data, epochs=3)
    for step in (4, 6):
        resumed, plot = trainer(keeper)
        resumed.fit(data, epochs=3, resume=step)
        assert plot.state_dict() == expected.state_dict()
        assert len(plot._series.steps["loss"]) == 12
        assert (tmp_path / "curves.png").stat().st_size > 1000
    assert len(json.dumps(expected.state_dict())) < 20_000
    fresh, plot = trainer(subs.Checkpointer("ck", at_end=False))
    fresh.fit(data, epochs=1)
    fresh.fit(data, epochs=1, resume=True)  # nothing was saved: it begins anew
    assert len(plot._series.steps["loss"]) == 4


def test_evaluations_outside_of_the_run_are_not_drawn(tmp_path: Path) -> None:
    plot = subs.PlotCurves()
    trainer, script = scripted(tmp_path, plot)
    trainer.fit(script.data, epochs=1, eval_data=script.eval_data)
    trainer.evaluate(script.eval_data)
    assert len(plot._series.evaluations["val_loss"]) == 1


def test_no_event_is_built_for_a_step_and_none_at_all_where_steps_are_not_wanted() -> None:
    assert et.StepCompleted not in subs.PlotCurves().events
    assert et.StepsCompleted not in subs.PlotCurves(steps=False).events


def test_nothing_of_pyplot_is_loaded() -> None:
    assert "matplotlib.pyplot" not in {
        module.__name__ for module in vars(plotting).values() if isinstance(module, ModuleType)
    }
    assert "pyplot" not in (Path(plotting.__file__).read_text().replace("nothing of pyplot", ""))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path": "../curves.png"}, "leads out of run_dir"),
        ({"path": "a/../../curves.png"}, "leads out of run_dir"),
        ({"path": "curves.jpg"}, "must be one of .png, .svg, .pdf"),
        ({"path": "curves"}, "must be one of"),
        ({"every_epochs": 0}, "every_epochs=0"),
        ({"scale": "cubic"}, "scale='cubic'"),
        ({"theme": "sepia"}, "theme='sepia'"),
        ({"metrics": "loss"}, "must be tuples of names"),
        ({"finish_timeout_s": -1}, "finish_timeout_s=-1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError, match=r"PlotCurves\(") as caught:
        subs.PlotCurves(**arguments)
    assert said in str(caught.value)


def test_without_matplotlib_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'matplotlib'"), "plots", "PlotCurves")
    monkeypatch.setattr(plot_curves, "plotting", missing)
    with pytest.raises(et.ConfigurationError, match=r"pip install 'eventtrain\[plots\]'"):
        subs.PlotCurves()
    assert "eventtrain.subscribers.reports.plotting" in sys.modules


async def test_it_is_drawn_on_every_event_loop_without_blocking_it(tmp_path: Path) -> None:
    trainer, script = scripted(tmp_path, subs.PlotCurves(every_epochs=1))
    await trainer.fit_async(script.data, epochs=2, eval_data=script.eval_data)
    image = await anyio.to_thread.run_sync(Image.open, tmp_path / "curves.png")
    image.verify()
