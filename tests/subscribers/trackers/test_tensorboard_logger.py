"""TensorBoardLogger, read back with TensorBoard's own EventAccumulator: every curve has every step once."""

from __future__ import annotations

import errno
import io
import os
import resource
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

import eventtrain as et
from eventtrain import subscribers as subs
from tests.subscribers.trackers.tracked_runs import (
    ODD,
    Lowering,
    context,
    data,
    failures,
    run_and_kill,
    scripted_run,
    wait_for_snapshots,
    window,
)
from tests.support.stateful_metrics import Confusion, measured, scored, uneven

REASON = "not installed: pip install 'eventtrain[tensorboard]' tensorboard"
pytest.importorskip("tensorboardX", reason=REASON)
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=REASON)

from tensorboardX.crc32c import crc32c  # noqa: E402
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData  # noqa: E402

from eventtrain.subscribers._shared import atomic_files  # noqa: E402
from eventtrain.subscribers.trackers import tensorboard_file as event_file  # noqa: E402
from eventtrain.subscribers.trackers import tensorboard_logger  # noqa: E402
from eventtrain.validation.optional_imports import MissingModule  # noqa: E402

ALL = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
"""As many as there are."""


def read(folder: Path) -> Any:
    found = accumulator.EventAccumulator(str(folder), size_guidance=ALL)
    found.Reload()
    return found


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value; no step twice."""
    found = read(folder)
    result: dict[str, dict[int, float]] = {}
    for tag in found.Tags()["scalars"]:
        points = found.Scalars(tag)
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), tag
        result[tag] = {point.step: point.value for point in points}
    return result


def texts(folder: Path) -> dict[str, str]:
    found = read(folder)
    return {
        tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]
    }


def single(values: Any) -> Any:
    return np.float32(values).tolist()


# --- what is in the files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_curves_of_steps_epochs_evaluations_and_hyperparams_are_read_back(
    tmp_path: Path, backend: str
) -> None:
    trainer = scripted_run(tmp_path, subs.TensorBoardLogger(), backend=backend)
    failed = failures(trainer)

    @trainer.on(et.StepCompleted, where=lambda event: event.step in (3, 10), lag=0)
    async def twice(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 9.0)
        control.set_hyperparam("learning_rate", event.step / 100)

    trainer.fit(data(), epochs=3, eval_data=data(1))
    found = curves(tmp_path / "tensorboard")
    assert failed == []
    assert found["step/loss"] == {k: single(1 / k) for k in range(1, 16)}
    assert found["epoch/loss"].keys() == found["eval/loss"].keys() == {5, 10, 15}
    assert found["epoch/loss"][5] == pytest.approx(np.mean([1 / k for k in range(1, 6)]))
    assert found["epoch/val_loss"] == {5: 2.0, 10: 3.0, 15: 4.0}
    # At 4 and 11 the last of what was set at boundaries 3 and 10; at 10 what step 10 was computed with.
    assert found["hyperparams/learning_rate"] == {
        step: single(value)
        for step, value in ((1, 0.5), (4, 0.03), (5, 0.03), (10, 0.03), (11, 0.1), (15, 0.1))
    }
    for step, value in found["hyperparams/learning_rate"].items():
        assert found["step/learning_rate"][step] == value


def test_only_steps_that_are_due_have_a_point(tmp_path: Path) -> None:
    scripted_run(tmp_path, subs.TensorBoardLogger("logs/tb", every=4)).fit(data(), epochs=3)
    found = curves(tmp_path / "logs" / "tb")
    assert found["step/loss"] == {k: single(1 / k) for k in (4, 8, 12)}
    assert found["epoch/loss"].keys() == {5, 10, 15}


async def test_odd_names_and_values_are_read_back_as_they_are(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger()
    await logger.start(context(tmp_path))
    values = [0.5, float("nan"), float("inf"), float("-inf"), 1e300, -0.0]
    columns = {name: np.array(values) + index for index, name in enumerate(ODD)}
    await logger.handle(window(1, 6, **columns, count=np.arange(2**53, 2**53 + 6), flag=np.ones(6, bool)))
    await logger.stop()
    found = await anyio.to_thread.run_sync(curves, tmp_path / "tensorboard")
    assert found.keys() == {
        *(f"step/{name}" for name in ODD if "alone" not in name), "step/\\ud800 alone", "step/count", "step/flag"
    }  # fmt: skip
    for index, name in enumerate(ODD):
        read_back = list(found[f"step/{name}".replace("\ud800", "\\ud800")].values())
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(read_back, (np.array(values) + index).astype(np.float32))
    assert set(found["step/count"].values()) == {2.0**53, 2.0**53 + 8} or found["step/count"][1] == 2.0**53


def test_the_run_is_a_row_of_the_hparams_page(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger(hparams={"batch_size": 8, "model": "größe\ud800", "augment": True})
    scripted_run(tmp_path, logger).fit(data(), epochs=2)
    metadata = read(tmp_path / "tensorboard").summary_metadata
    session, experiment = (
        HParamsPluginData.FromString(metadata[f"_hparams_/{name}"].plugin_data.content)
        for name in ("session_start_info", "experiment")
    )
    shown = session.session_start_info.hparams
    assert shown["learning_rate"].number_value == 0.5
    assert shown["batch_size"].number_value == 8
    assert shown["model"].string_value == "größe\\ud800"
    assert shown["augment"].bool_value is True
    assert {info.name.tag for info in experiment.experiment.metric_infos} == {
        "epoch/loss", "epoch/learning_rate"
    }  # fmt: skip


class Sample(et.Event):
    note: str


def test_what_functions_give_for_events_is_shown_also_for_events_of_the_users(tmp_path: Path) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (7, 3), (255, 0, 0)).save(file, format="png")
    grey, colours = np.linspace(0, 1, 12).reshape(3, 4), np.full((2, 5, 4), 200, np.uint8)
    logger = subs.TensorBoardLogger(
        record={
            et.EpochCompleted: lambda event: {
                "grey": grey, "colours": colours, "file": file.getvalue(), "vector": np.arange(10), "epoch": event.epoch
            },
            Sample: lambda event: {"words": event.note, "matrix": np.array([[np.nan, 2.0]])},
        }
    )  # fmt: skip
    trainer = scripted_run(tmp_path, logger)

    @trainer.on(et.EpochCompleted, lag=0)
    async def say(event: et.EpochCompleted) -> None:
        trainer.bus.publish(Sample(step=event.step, note=f"**after** {event.epoch}"))

    trainer.fit(data(), epochs=2)
    folder = tmp_path / "tensorboard"
    found = read(folder)
    assert texts(folder)["words"] == "**after** 1"
    assert curves(folder)["epoch"] == {5: 0.0, 10: 1.0}
    assert [found.Histograms("vector")[i].histogram_value.num for i in (0, 1)] == [10, 10]
    shown = {tag: found.Images(tag) for tag in found.Tags()["images"]}
    assert shown.keys() == {"grey", "colours", "file", "matrix"}
    assert [image.step for image in shown["grey"]] == [5, 10]

    def pixels(name: str) -> Any:
        return np.asarray(Image.open(io.BytesIO(shown[name][0].encoded_image_string)))

    np.testing.assert_array_equal(pixels("grey")[:, :, 0], (grey * 255 + 0.5).astype(np.uint8))
    np.testing.assert_array_equal(pixels("colours"), colours)
    np.testing.assert_array_equal(pixels("matrix")[:, :, 0], [[0, 255]])
    assert pixels("file").shape == (3, 7, 3)


def test_arrays_of_metrics_are_images_and_histograms_and_tables_of_the_report(tmp_path: Path) -> None:
    from PIL import Image

    def eval_fn(state: Any, batch: Any) -> dict[str, Any]:
        return {**measured(state, batch), "curve": Confusion(jnp.arange(3.0))}

    trainer = et.Trainer(
        lambda state, batch: (state, {"loss": state["w"]}),
        {"w": jnp.zeros(())},
        eval_fn=eval_fn,
        subscribers=[subs.TensorBoardLogger(), subs.Report()],
        run_dir=tmp_path,
    )
    examples = scored()
    trainer.fit(uneven(examples), epochs=1, eval_data=uneven(examples))
    found = read(tmp_path / "tensorboard")
    assert found.Histograms("eval/curve")[0].histogram_value.num == 3
    image = np.asarray(Image.open(io.BytesIO(found.Images("eval/confusion")[0].encoded_image_string)))
    counts = confusion_matrix(examples["class"], examples["predicted"])
    assert image.shape == (255, 255, 3)
    shades = image[42::85, 42::85, 0].astype(int)
    assert (shades.min(), shades.max()) == (0, 255)
    assert (shades.ravel().argsort(kind="stable") == counts.ravel().argsort(kind="stable")).all()
    report = (tmp_path / "report.md").read_text()
    assert "## val\\_confusion" in report
    for index, row in enumerate(counts):
        assert f"| {index} | " + " | ".join(map(str, row)) + " |" in report


def test_a_function_that_raises_or_gives_nonsense_costs_its_own_rows_only_and_is_named(
    tmp_path: Path,
) -> None:
    def record(event: et.EpochCompleted) -> dict[str, Any]:
        if event.epoch == 0:
            raise KeyError("no such thing")
        return {"odd": np.zeros((2, 2, 2))} if event.epoch == 1 else {"broken": b"no PNG"}

    logger = subs.TensorBoardLogger(record={et.EpochCompleted: record})
    trainer = scripted_run(tmp_path, logger)
    failed = failures(trainer)
    trainer.fit(data(), epochs=3)
    assert [event.error.partition("tensorboard: ")[2] for event in failed if "lost" not in event.error] == [
        "record[EpochCompleted] raised KeyError: 'no such thing'",
        "'odd' cannot be recorded: an image is [height, width] or [height, width, 1, 3 or 4], not [2, 2, 2]",
        failed[-2].error.partition("tensorboard: ")[2],
    ]
    assert "'broken' cannot be recorded: it is not an image file" in failed[-2].error
    assert logger.statistics.lost == 3
    assert len(curves(tmp_path / "tensorboard")["step/loss"]) == 15


def test_samples_are_shown_by_what_they_are(tmp_path: Path) -> None:
    samples = (
        subs.Sample(
            lambda state: state["step"], every=5, name="text", decode=lambda step: f"step **{step}**"
        ),
        subs.Sample(lambda state: jnp.ones((2, 3)), every=5, name="image", media="image"),
        subs.Sample(lambda state: jnp.ones((2, 3)), every=5, name="array"),
        subs.Sample(lambda state: {"a": jnp.arange(2)}, every=5, name="table"),
    )
    scripted_run(tmp_path, subs.TensorBoardLogger(), *samples).fit(data(), epochs=2)
    folder = tmp_path / "tensorboard"
    found = read(folder)
    assert texts(folder)["samples/text"] == "step **10**"
    assert texts(folder)["samples/table"] == "| a |\n|---|\n| 0 |\n| 1 |"
    assert [image.step for image in found.Images("samples/image")] == [5, 10]
    assert found.Histograms("samples/array")[0].histogram_value.num == 6


def test_the_compiled_step_is_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_run(tmp_path, subs.TensorBoardLogger(program=True)).fit(data(), epochs=2)
    found = texts(tmp_path / "tensorboard")
    assert "lambda" in found["program/jaxpr"]
    assert "HloModule" in found["program/hlo"]


def test_traces_lie_where_the_same_tensorboard_finds_them(tmp_path: Path) -> None:
    profiler = subs.Profiler(((3, 4),), directory="tensorboard")
    scripted_run(tmp_path, subs.TensorBoardLogger(), profiler).fit(data(), epochs=2)
    folder = tmp_path / "tensorboard"
    assert list(folder.glob("steps-3-4/plugins/profile/*/*.xplane.pb"))
    assert curves(folder)["step/loss"].keys() == set(range(1, 11))


# --- histograms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{"histogram_every": 2}, {"histogram_every_epochs": 1}])
def test_histograms_are_of_the_params_of_their_step_and_every_snapshot_is_released(
    tmp_path: Path, schedule: dict[str, int]
) -> None:
    trainer = scripted_run(tmp_path, subs.TensorBoardLogger(**schedule))
    failed = failures(trainer)
    wait_for_snapshots(trainer)
    trainer.fit(data(), epochs=4)
    assert failed == []
    found = read(tmp_path / "tensorboard").Histograms("histograms/params/weight")
    assert found
    for entry in found:  # weight counts the steps
        value = entry.histogram_value
        assert (value.num, value.min, value.max, value.sum) == (1, entry.step, entry.step, entry.step)
    assert not trainer.control.snapshots


async def test_arrays_are_chosen_by_name_and_what_is_not_finite_is_counted(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    weights = jnp.array([1.0, jnp.nan, jnp.inf, 4.0])
    state = {"params": {"w": weights, "b": jnp.zeros(2)}, "extra": (jnp.full(3, 7), jnp.full(2, jnp.nan))}
    logger = subs.TensorBoardLogger(histogram_every_epochs=1, arrays=("params/w", "extra/*"))
    trainer = et.Trainer(step, state, subscribers=[logger], run_dir=tmp_path)
    wait_for_snapshots(trainer)
    await trainer.fit_async([np.float32(1)] * 3, epochs=2)
    found = await anyio.to_thread.run_sync(read, tmp_path / "tensorboard")
    assert set(found.Tags()["histograms"]) == {"histograms/params/w", "histograms/extra/0"}
    value = found.Histograms("histograms/params/w")[0].histogram_value
    assert (value.num, value.min, value.max) == (2, 1.0, 4.0)
    assert found.Scalars("histograms/params/w/nonfinite")[0].value == 2
    assert found.Scalars("histograms/extra/1/nonfinite")[0].value == 2
    value = found.Histograms("histograms/extra/0")[0].histogram_value
    assert (value.num, sum(value.bucket)) == (3, 3)


@pytest.mark.parametrize(
    "values", [[0.0], [1.7e308, -1.7e308], [1.7e308] * 3, [5e-324, 0.0], [1e-300, 1.0], [-3.0]]
)
def test_a_histogram_of_extreme_values_holds_each_of_them(values: list[float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    from eventtrain.subscribers.trackers import tensorboard_records

    (record,) = tensorboard_records.histogram(window(1, 1), 1, "x", np.array(values))
    found = Event.FromString(record).summary.value[0].histo
    assert (found.num, sum(found.bucket), found.min, found.max) == (
        len(values), len(values), min(values), max(values)
    )  # fmt: skip


def test_names_that_no_array_has_are_said_with_those_there_are(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger(histogram_every_epochs=1, arrays=("parms/*",))
    trainer = scripted_run(tmp_path, logger)
    failed = failures(trainer)
    wait_for_snapshots(trainer)
    trainer.fit(data(), epochs=3)
    assert (
        "no array of the state is called parms/*; there are eval_script/loss, opt_state/" in failed[0].error
    )


# --- a run that goes on ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.allow_blocking
def test_after_kill_and_resume_every_curve_has_every_step_exactly_once(tmp_path: Path) -> None:
    tracker = "subs.TensorBoardLogger(histogram_every=3, flush_interval_s=0.01)"
    seen = "import time; time.sleep(0.5)"  # rows after the checkpoint are in the file
    run_and_kill(tmp_path, tracker, 12, seen)
    run_and_kill(tmp_path, tracker, 24, seen)
    run_and_kill(tmp_path, tracker, None)
    trainer = scripted_run(tmp_path / "whole", subs.TensorBoardLogger())
    trainer.subscribe(Lowering())
    trainer.fit(data(), epochs=6, eval_data=data(1))
    expected = curves(tmp_path / "whole" / "tensorboard")
    folder = tmp_path / "run" / "tensorboard"
    assert curves(folder) == expected
    assert expected["step/loss"].keys() == set(range(1, 31))
    assert list(folder.glob("events.out.cut.*"))  # of one of the kills at least
    histograms = read(folder).Histograms("histograms/params/weight")
    steps = [entry.step for entry in histograms]
    assert steps == sorted(set(steps))


async def test_what_was_written_after_the_checkpoint_is_cut_off_kept_beside_and_written_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tensorboard"
    logger = subs.TensorBoardLogger()
    await logger.start(context(tmp_path))
    await logger.handle(et.RunStarted(step=0))
    await logger.handle(et.EpochStarted(step=0, epoch=0, hyperparams={"lr": 0.5}))
    await logger.handle(window(1, 3))
    await logger.handle(et.HyperparamChanged(step=3, name="lr", path="p", old=0.5, new=0.1))
    await logger.flush()
    saved = logger.state_dict()

    async def go_on(one: subs.TensorBoardLogger) -> None:
        # At the boundary of the checkpoint itself, too: purging by the step alone would double these or lose them.
        epoch = et.EpochCompleted(
            step=3, epoch=0, metrics={"loss": 1.0}, hyperparams={"lr": 0.1}, steps=3, duration_s=0
        )
        await one.handle(epoch)
        await one.handle(window(4, 5))

    await go_on(logger)
    await logger.stop()
    before = await anyio.to_thread.run_sync(curves, folder)
    (first,) = await anyio.to_thread.run_sync(event_file.own_files, folder)
    whole = await anyio.Path(first).read_bytes()
    for attempt in (1, 2):
        resumed = subs.TensorBoardLogger()
        resumed.load_state_dict(saved)
        await resumed.start(context(tmp_path, resumed=True))
        await resumed.handle(et.RunResumed(step=3, epoch=0, batch=3, path=""))
        await go_on(resumed)
        await resumed.stop()
        assert await anyio.to_thread.run_sync(curves, folder) == before
        assert len(await anyio.to_thread.run_sync(event_file.own_files, folder)) == 2
        assert len(await anyio.to_thread.run_sync(lambda: list(folder.glob("events.out.cut.*")))) == attempt
    tail = folder / first.name.replace("tfevents", "cut")
    assert await anyio.Path(first).read_bytes() + await anyio.Path(tail).read_bytes() == whole


async def test_a_reader_that_is_open_meanwhile_forgets_what_is_written_again(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger()
    await logger.start(context(tmp_path))
    await logger.handle(et.RunStarted(step=0))
    await logger.handle(window(1, 3))
    await logger.flush()
    saved = logger.state_dict()
    await logger.handle(window(4, 9))
    await logger.stop()
    reader = await anyio.to_thread.run_sync(read, tmp_path / "tensorboard")
    assert len(reader.Scalars("step/loss")) == 9
    resumed = subs.TensorBoardLogger()
    resumed.load_state_dict(saved)
    await resumed.start(context(tmp_path, resumed=True))
    await resumed.handle(et.RunResumed(step=3, epoch=0, batch=3, path=""))
    await resumed.handle(window(4, 5))
    await resumed.stop()
    await anyio.to_thread.run_sync(reader.Reload)
    assert [point.step for point in reader.Scalars("step/loss")] == [1, 2, 3, 4, 5]


async def test_a_run_that_finds_nothing_to_resume_from_sets_the_earlier_attempt_aside(tmp_path: Path) -> None:
    for restarts in (False, True):
        logger = subs.TensorBoardLogger()
        await logger.start(context(tmp_path, restarts=restarts))
        await logger.handle(et.RunStarted(step=0))
        await logger.handle(window(1, 3 if not restarts else 2))
        await logger.stop()
    found = await anyio.to_thread.run_sync(curves, tmp_path / "tensorboard")
    assert found["step/loss"].keys() == {1, 2}


async def test_a_state_of_another_directory_cuts_nothing_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger()
    await logger.start(context(tmp_path))
    await logger.handle(window(1, 3))
    await logger.stop()
    other = subs.TensorBoardLogger("other")
    state = other.state_dict()
    again = subs.TensorBoardLogger()
    again.load_state_dict(state)
    await again.start(context(tmp_path))
    await again.stop()
    assert len(await anyio.to_thread.run_sync(event_file.own_files, tmp_path / "tensorboard")) == 2
    with pytest.raises(et.errors.StateError, match="file"):
        again.load_state_dict({**state, "file": "../../precious"})


def test_a_second_fit_goes_on_and_another_trainers_run_hides_the_first(tmp_path: Path) -> None:
    logger = subs.TensorBoardLogger()
    trainer = scripted_run(tmp_path, logger)
    trainer.fit(data(), epochs=1)
    trainer.fit(data(), epochs=1)
    found = curves(tmp_path / "tensorboard")
    assert found["step/loss"].keys() == set(range(1, 11))
    assert found["hyperparams/learning_rate"].keys() == {1, 5, 10}
    scripted_run(tmp_path, logger).fit(data(), epochs=1)
    found = curves(tmp_path / "tensorboard")
    assert found["step/loss"].keys() == set(range(1, 6))
    assert found["hyperparams/learning_rate"].keys() == {1, 5}


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_a_full_disk_loses_tears_and_doubles_nothing(tmp_path: Path) -> None:
    """A limit on the file size is a real write error: the kernel takes a part of a record and refuses the rest."""
    file = event_file.new_event_file(tmp_path)
    records = [bytes([i]) * 50 for i in range(200)]
    file.append(records[:100])
    before = file.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 333, hard))
    try:
        for _ in range(2):
            with pytest.raises(et.StorageError, match="too large") as caught:
                file.append(records[100:])
            assert caught.value.may_pass
            assert file.path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.append(records[100:])
    assert file.path.read_bytes() == b"".join(map(event_file.framed, records))
    assert file.size_bytes == len(file.path.read_bytes())


def test_a_full_disk_is_said_once_and_every_row_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = subs.TensorBoardLogger()
    trainer = scripted_run(tmp_path, logger)
    failed, broken, write = failures(trainer), threading.Event(), os.write

    def failing(descriptor: int, data: Any) -> int:
        if broken.is_set():
            write(descriptor, data[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(atomic_files.os, "write", failing)

    @trainer.on(et.EpochStarted, lag=0)
    async def schedule(event: et.EpochStarted) -> None:
        if event.epoch == 1:
            broken.set()
        elif event.epoch == 3:
            while not failed:  # noqa: ASYNC110  # the disk stays full until that was said
                await anyio.sleep(0.01)
            broken.clear()

    trainer.fit(data(), epochs=4)
    found = curves(tmp_path / "tensorboard")
    assert found["step/loss"].keys() == set(range(1, 21))
    assert found["epoch/loss"].keys() == {5, 10, 15, 20}
    assert len(failed) == 1
    assert "No space left" in failed[0].error
    assert str(tmp_path) in failed[0].error


def test_a_disk_that_hangs_delays_neither_training_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, write = threading.Event(), os.write

    def hanging(descriptor: int, data: Any) -> int:
        if threading.current_thread() is not threading.main_thread():  # which writes to the lock of run_dir
            hold.wait(120)
        return write(descriptor, data)

    monkeypatch.setattr(atomic_files.os, "write", hanging)
    monkeypatch.setattr("eventtrain.subscribers.trackers.tracker.FLUSH_TIMEOUT_S", 0.1)
    logger = subs.TensorBoardLogger(finish_timeout_s=0.2, histogram_every=1)
    checkpointer = subs.Checkpointer("checkpoints", every_epochs=1)
    trainer = scripted_run(tmp_path, checkpointer, logger)
    failed, committed = failures(trainer), []

    @trainer.on(et.CheckpointCommitted)
    async def note(event: et.CheckpointCommitted) -> None:
        committed.append(event.step)

    result = trainer.fit(data(), epochs=3)
    hold.set()
    assert result.step == 15
    assert committed == [5, 10, 15]
    assert [event.event_kind for event in failed] == ["stop"]
    assert "did not take everything within 0.2 s after the run" in failed[0].error
    assert not trainer.control.snapshots


async def test_a_directory_that_cannot_be_made_fails_the_start_by_name(tmp_path: Path) -> None:
    await anyio.Path(tmp_path / "tensorboard").write_text("a file")
    logger = subs.TensorBoardLogger()
    with pytest.raises(et.ConfigurationError, match=r"TensorBoardLogger cannot write .*tensorboard"):
        await logger.start(context(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"directory": "../elsewhere"}, "leads out of run_dir"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"histogram_every": 0}, "histogram_every must be an integer >= 1 or None, got 0"),
        ({"arrays": ("params/*",)}, "requires a schedule"),
        ({"record": {"EpochCompleted": len}}, "record must map event classes"),
        ({"hparams": {"layers": [1, 2]}}, "layers"),
        ({"finish_timeout_s": -1}, "finish_timeout_s must be a finite number >= 0, got -1"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(et.ConfigurationError, match=text):
        subs.TensorBoardLogger(**options)


def test_without_tensorboardx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'tensorboardX'")
    missing = MissingModule(error, "tensorboard", "TensorBoardLogger")
    monkeypatch.setattr(tensorboard_logger, "tensorboard_records", missing)
    with pytest.raises(
        et.ConfigurationError, match=r"No module named 'tensorboardX'.*'eventtrain\[tensorboard\]'"
    ):
        subs.TensorBoardLogger()


# --- the file itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 64, 1000])
def test_checksums_and_frames_are_those_of_tensorboardx(size: int) -> None:
    record = np.random.default_rng(size).bytes(size)
    assert event_file.crc32c(record) == crc32c(record)
    (length,) = struct.unpack_from("<Q", event_file.framed(record))
    assert length == size
    assert len(event_file.framed(record)) == size + 16


def test_a_new_file_is_read_after_all_that_lie_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        event_file.time, "time_ns", lambda: 1_700_000_000_000_000_000
    )  # a clock that stands still
    files = [event_file.new_event_file(tmp_path).path for _ in range(3)]
    assert files == sorted(files) == event_file.own_files(tmp_path)
    assert Counter(path.name for path in files).most_common(1)[0][1] == 1
