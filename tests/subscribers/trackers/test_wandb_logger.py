"""WandbLogger: real offline runs, whose files are read back; and a server that never answers."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers.trackers.tracked_runs import (
    ODD,
    context,
    curves_of,
    data,
    failures,
    own_environment,
    run_and_kill,
    scripted_run,
    wait_for_snapshots,
    window,
)

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
pytest.importorskip("wandb", reason="not installed: pip install 'eventtrain[wandb]'")

from eventtrain.subscribers.trackers import wandb_logger, wandb_run

KEY = "5ec7e75ec7e75ec7e75ec7e75ec7e75ec7e75ec7"
"""An API key as W&B has them."""


@dataclass
class Written:
    """What is in the offline files of all attempts, in order."""

    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    @property
    def curves(self) -> dict[str, dict[int, Any]]:
        return curves_of(self.rows)


def read(folder: Path, finished: int = 1) -> Written:
    """What is there once so many runs have ended in the files: W&B's own process writes them, a moment later."""
    end = time.monotonic() + 60
    while len((written := read_now(folder)).exit_codes) < finished:
        assert time.monotonic() < end, written
        time.sleep(0.05)
    return written


def read_now(folder: Path) -> Written:
    written = Written()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for _, record in wandb_run.records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    keys = list(item.nested_key) or [item.key]
                    inner = row
                    for key in keys[:-1]:
                        inner = inner.setdefault(key, {})
                    inner[keys[-1]] = json.loads(item.value_json)
                rest = {name: value for name, value in row.items() if not name.startswith("_")}
                written.rows.append((record.history.step.num, rest))
            elif kind == "config":
                written.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "run":
                written.ids.add(record.run.run_id)
                written.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "exit":
                written.exit_codes.append(record.exit.exit_code)
    return written


def logger(**options: Any) -> subs.WandbLogger:
    return subs.WandbLogger("project", mode="offline", **options)


# --- what is in the files -------------------------------------------------------------------------------------


class Sample(et.Event):
    note: str


@pytest.fixture(scope="module")
def rich(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, subs.WandbLogger, list[Any], Written]]:
    """One run with everything in it, which several tests look at."""
    folder = tmp_path_factory.mktemp("rich")
    long = "x" * 100_000  # in several fragments, over several blocks
    tracker = logger(
        hparams={"batch_size": 8, "long": long},
        histogram_every=1,
        program=True,
        api_key=KEY,
        record={
            et.EpochCompleted: lambda event: {
                "grey": np.linspace(0, 1, 12).reshape(3, 4), "colours": np.zeros((2, 5, 4)), "vector": np.arange(9.0)
            },
            Sample: lambda event: {"words": event.note, "number": event.step},
            et.StepCompleted: lambda event: {"twice": 2 * event.metrics["loss"]},  # told before its window
        },
    )  # fmt: skip
    trainer = scripted_run(folder, tracker)
    failed = failures(trainer)
    wait_for_snapshots(trainer)

    @trainer.on(et.EpochCompleted, lag=0)
    async def decide(event: et.EpochCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.5 / (event.epoch + 2))
        trainer.bus.publish(Sample(step=event.step, note="<b>not bold</b>"))

    trainer.fit(data(), epochs=3, eval_data=data(1))
    return folder, tracker, failed, read(folder)


def test_curves_of_steps_epochs_evaluations_and_hyperparams_are_read_back(rich: Any) -> None:
    _, _, failed, written = rich
    found = written.curves
    assert failed == []
    assert found["step/loss"] == {k: pytest.approx(1 / k) for k in range(1, 16)}
    assert found["twice"] == {k: pytest.approx(2 / k) for k in range(1, 16)}
    assert found["epoch/loss"][5] == pytest.approx(np.mean([1 / k for k in range(1, 6)]))
    assert found["epoch/val_loss"] == {5: 2.0, 10: 3.0, 15: 4.0} == found["eval/loss"]
    rates = {1: 0.5, 5: 0.5, 6: 0.25, 10: 0.25, 11: 0.5 / 3, 15: 0.5 / 3}
    assert found["hyperparams/learning_rate"] == {step: pytest.approx(rate) for step, rate in rates.items()}
    assert [step for step, _ in written.rows] == list(range(1, 16))  # what belongs to one step is one row
    assert written.exit_codes == [0]


def test_config_images_text_histograms_and_the_compiled_step_are_there(rich: Any) -> None:
    folder, _, _, written = rich
    assert written.config["batch_size"] == 8
    assert len(written.config["long"]) == 100_000
    assert written.config["learning_rate"] == 0.5
    found = written.curves
    assert found["grey"][5]["_type"] == "image-file"
    assert (found["colours"][10]["width"], found["colours"][10]["height"]) == (5, 2)
    assert sum(found["vector"][15]["values"]) == 9
    assert set(found["number"].values()) <= {5, 10, 15}
    files = {path.name: path for path in folder.glob("wandb/*/files/**/*") if path.is_file()}
    assert "HloModule" in files["program-hlo.txt"].read_text()
    assert "lambda" in files["program-jaxpr.txt"].read_text()
    html = next(path for name, path in files.items() if name.endswith(".html"))
    assert "&lt;b&gt;not bold&lt;/b&gt;" in html.read_text()
    histograms = list(found["histograms/params/weight"].values())
    steps = list(found["histograms/step"].values())
    assert histograms
    assert len(set(steps)) == len(steps) == len(histograms)
    for step, histogram in zip(steps, histograms, strict=True):  # weight counts the steps
        assert histogram["bins"][0] < step < histogram["bins"][-1]


def test_the_key_is_shown_nowhere(rich: Any) -> None:
    folder, tracker, failed, _ = rich
    assert KEY not in repr(vars(tracker)) + repr(failed) + json.dumps(tracker.state_dict())
    found = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert found == []


async def test_odd_names_and_values_are_read_back_as_they_are(
    tmp_path: Path, anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if anyio_backend_name == "asyncio":  # and on uvloop and trio: a run of W&B's takes seconds
        pytest.skip("the run of the other tests is on asyncio")
    said: list[Any] = []
    tracker = logger(directory="here")
    with caplog.at_level(logging.DEBUG):
        await tracker.start(context(tmp_path, said))
        columns = {name: np.array([0.5, np.nan, np.inf, -np.inf]) for name in ODD}
        await tracker.handle(window(1, 4, **columns, big=np.arange(2**60, 2**60 + 4)))
        await tracker.stop()
    written = await anyio.to_thread.run_sync(read, tmp_path / "here")
    found = written.curves
    assert said == []
    assert found.keys() == {f"step/{name}".replace("\ud800", "\\ud800") for name in (*ODD, "big")}
    for name in ODD:
        values = list(found[f"step/{name}".replace("\ud800", "\\ud800")].values())
        assert str(values[1]) in ("nan", "NaN")
        assert [float(value) for value in (values[0], *values[2:])] == [0.5, np.inf, -np.inf]
    assert list(found["step/big"].values()) == list(range(2**60, 2**60 + 4))


def pages(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.html"))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arrays_of_metrics_and_samples_are_in_the_files(tmp_path: Path) -> None:
    said: list[Any] = []
    tracker = logger()
    await tracker.start(context(tmp_path, said))
    scores = {"confusion": np.array([[3.0, 1.0], [0.0, 4.0]]), "f1": np.array([0.75, 0.8])}
    events = [
        et.EvalCompleted(step=1, epoch=0, steps=1, duration_s=0.1, metrics={"loss": 0.5}, arrays=scores),
        et.EpochCompleted(step=1, epoch=0, steps=1, duration_s=0.1, metrics={}, arrays={"f1": scores["f1"]}),
        et.SampleTaken(step=1, name="text", media="text", value="a <b>"),
        et.SampleTaken(step=1, name="table", media="table", value={"n": [1, 2]}),
        et.SampleTaken(step=1, name="noise", media="array", value=np.ones((2, 3))),
    ]
    for event in events:
        await tracker.handle(event)
    await tracker.stop()
    found = (await anyio.to_thread.run_sync(read, tmp_path)).curves
    assert said == []
    assert found["eval/loss"] == {1: 0.5}
    image = found["eval/confusion"][1]
    assert (image["_type"], image["width"], image["height"]) == ("image-file", 256, 256)
    assert [sum(found[name][1]["values"]) for name in ("eval/f1", "epoch/f1", "samples/noise")] == [2, 2, 6]
    texts = pages(tmp_path)
    assert "a &lt;b&gt;" in texts
    assert "| n |" in texts
    assert {found[f"samples/{name}"][1]["_type"] for name in ("text", "table")} == {"html-file"}


# --- a run that goes on ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.allow_blocking
def test_after_kill_and_resume_every_step_is_in_the_files_exactly_once(tmp_path: Path) -> None:
    tracker = 'subs.WandbLogger("project", mode="offline")'
    run_and_kill(tmp_path, tracker, 12)
    said = run_and_kill(tmp_path, tracker, None)
    end = time.monotonic() + 60
    while True:
        written = read_now(tmp_path / "run")
        steps = Counter(step for step, row in written.rows if "step/loss" in row)
        if 30 in steps or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert len(written.ids) == 1
    assert steps == dict.fromkeys(range(1, 31), 1), said
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 2


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.allow_blocking
def test_every_row_is_there_when_the_kill_came_right_after_the_last_checkpoint(tmp_path: Path) -> None:
    tracker = 'subs.WandbLogger("project", mode="offline")'
    # W&B's own process has what it was told within the last second in memory only, and so the whole of the last row.
    run_and_kill(tmp_path, tracker, 30, "if newest < 30: return", every=6)
    said = run_and_kill(tmp_path, tracker, None, every=6)
    written = read(tmp_path / "run")
    steps = Counter(step for step, row in written.rows if "step/loss" in row)
    assert steps == dict.fromkeys(range(1, 31), 1), said
    assert written.curves["hyperparams/learning_rate"].keys() >= {1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26}


def test_a_second_fit_goes_on_with_the_same_run_and_another_trainers_is_another(tmp_path: Path) -> None:
    tracker = logger(every=2)
    trainer = scripted_run(tmp_path, tracker)
    for _ in range(2):
        trainer.fit(data(), epochs=1)
    first = tracker.wandb_id
    written = read(tmp_path, finished=2)
    assert written.ids == {first}
    assert written.curves["step/loss"].keys() == {2, 4, 6, 8, 10}
    assert written.curves["epoch/loss"].keys() == {5, 10}


class Fake:
    """Stands for a run of W&B's; ``fails`` is raised, and while ``hold`` is clear it hangs."""

    def __init__(self) -> None:
        self.options: list[Any] = []
        self.jobs: list[tuple[str, Any]] = []
        self.fails: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, run_id: str, folder: Path, **options: Any) -> Fake:
        self.options.append(SimpleNamespace(run_id=run_id, folder=folder, **options))
        return self

    def _do(self, name: str, what: Any = None) -> None:
        self.hold.wait(60)
        if self.fails is not None:
            raise self.fails
        self.jobs.append((name, what))

    def open(self) -> None:
        self._do("open")

    def log(self, rows: Any) -> None:
        self._do("log", rows)

    def log_window(self, event: et.StepsCompleted, every: int, points: Any) -> None:
        self._do("log_window", event)

    def unwritten_rows(self) -> dict[int, dict[str, float]]:
        return {}

    def configure(self, values: Any) -> None:
        self._do("configure", values)

    def finish(self, exit_code: int) -> None:
        self._do("finish", exit_code)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake()
    monkeypatch.setattr(wandb_run, "WandbRun", fake)
    yield fake
    fake.hold.set()


async def test_a_run_that_resumes_goes_on_with_its_id_and_a_new_one_gets_another(
    tmp_path: Path, fake: Fake
) -> None:
    tracker = logger()
    await tracker.start(context(tmp_path))
    await tracker.handle(et.EpochStarted(step=0, epoch=0, hyperparams={"lr": 0.5}))
    state = json.loads(json.dumps(tracker.state_dict()))
    await tracker.stop()
    again = logger()
    again.load_state_dict(state)
    await again.start(context(tmp_path, resumed=True))
    await again.handle(et.EpochStarted(step=0, epoch=0, hyperparams={"lr": 0.5}))
    await again.stop()
    fresh = logger()
    await fresh.start(context(tmp_path, restarts=True))
    await fresh.stop()
    ids = [options.run_id for options in fake.options]
    assert ids[0] == ids[1] == tracker.wandb_id == again.wandb_id != ids[2]
    assert [options.resumes for options in fake.options] == [False, True, False]
    assert [what for name, what in fake.jobs if name == "configure"] == [{"lr": 0.5}]
    with pytest.raises(et.errors.StateError, match="cannot load its state: wandb_id"):
        again.load_state_dict({**state, "wandb_id": "../../precious"})


async def test_a_failed_run_is_said_to_have_failed(tmp_path: Path, fake: Fake) -> None:
    tracker = logger()
    await tracker.start(context(tmp_path))
    await tracker.handle(et.RunFailed(step=0, error="ValueError: no"))
    await tracker.stop()
    assert fake.jobs[-1] == ("finish", 1)


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_a_tracker_that_hangs_delays_neither_training_nor_checkpoints_nor_the_end(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventtrain.subscribers.trackers.tracker.FLUSH_TIMEOUT_S", 0.1)
    fake.hold.clear()
    tracker = logger(finish_timeout_s=0.2, histogram_every=1)
    trainer = scripted_run(tmp_path, subs.Checkpointer("checkpoints", every_epochs=1), tracker)
    failed = failures(trainer)
    committed: list[int] = []

    @trainer.on(et.CheckpointCommitted)
    async def note(event: et.CheckpointCommitted) -> None:
        committed.append(event.step)

    assert trainer.fit(data(), epochs=3).step == 15
    assert committed == [5, 10, 15]
    assert [event.event_kind for event in failed] == ["stop"]
    assert "W&B did not take everything within 0.2 s after the run" in failed[0].error
    assert not trainer.control.snapshots


def test_a_run_that_cannot_be_opened_costs_its_rows_and_is_said_once(tmp_path: Path, fake: Fake) -> None:
    fake.fails = et.StorageError("W&B failed: AuthenticationError")
    tracker = logger()
    trainer = scripted_run(tmp_path, tracker)
    failed = failures(trainer)
    trainer.fit(data(), epochs=2)
    texts = [event.error for event in failed]
    assert texts[0] == "the files of W&B: W&B failed: AuthenticationError"
    assert len(texts) == 2
    assert "rows were lost" in texts[1]
    assert tracker.statistics.lost >= 12


HANGING = """
import time
from pathlib import Path
import logging
logging.basicConfig(level=logging.DEBUG)
from eventtrain import subscribers as subs
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers.trackers.tracked_runs import data, failures, scripted_run

if __name__ == "__main__":
    tracker = subs.WandbLogger(
        "project", api_key={key!r}, base_url={url!r}, init_timeout_s=1.0, finish_timeout_s=2.0
    )
    trainer = scripted_run(Path("run"), tracker)
    failed = failures(trainer)
    began = time.monotonic()
    assert trainer.fit(data(), epochs=3).step == 15
    print("TOOK", time.monotonic() - began)
    print("SAID", *(event.error for event in failed), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.allow_blocking
def test_a_server_that_never_answers_delays_the_end_by_the_timeout_and_shows_no_key(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        script = HANGING.format(key=KEY, url=url)
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=own_environment() | {"WANDB_ERROR_REPORTING": "false"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    took_s = float(next(line for line in output.splitlines() if line.startswith("TOOK")).split()[1])
    assert took_s < 60
    assert "W&B: W&B failed: CommError" in output or "W&B did not take everything within 2 s" in output
    assert KEY not in output
    found = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert found == [tmp_path / "script.py"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"project": "a/b"}, "project='a/b'.* must be a name without"),
        ({"mode": "disabled"}, "mode must be .* got 'disabled'"),
        ({"directory": "../elsewhere"}, "leads out of run_dir"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"arrays": ("params/*",)}, "requires a schedule"),
        ({"record": {"EpochCompleted": len}}, "record must map event classes"),
        ({"init_timeout_s": 0}, "init_timeout_s must be a finite number > 0, got 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(et.ConfigurationError, match=text):
        subs.WandbLogger(**{"project": "project", "mode": "offline", **options})


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{KEY}@host",
        f"https://{KEY}@host/",
        f"https://host?key={KEY}",
        f"https://host#{KEY}",
        f"https://[{KEY}",
        f"{KEY}://host",
        f"{KEY}",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(et.ConfigurationError, match="base_url") as caught:
        logger(base_url=url)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_without_a_key_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb_run.wandb, "login", lambda host=None, prompt=True, verify=True: False)
    with pytest.raises(et.ConfigurationError, match="has no API key"):
        await subs.WandbLogger("project").start(context(tmp_path))


def test_without_wandb_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'wandb'"), "wandb", "WandbLogger")
    monkeypatch.setattr(wandb_logger, "wandb_run", missing)
    with pytest.raises(et.ConfigurationError, match=r"No module named 'wandb'.*'eventtrain\[wandb\]'"):
        logger()


def test_a_file_that_is_torn_is_read_up_to_there(rich: Any, tmp_path: Path) -> None:
    folder, tracker, _, _ = rich
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    whole = path.read_bytes()
    rows = {}
    for size in (0, 7, 10, len(whole) // 2, len(whole) - 1, len(whole)):
        torn = tmp_path / f"wandb/offline-run-{size}-{tracker.wandb_id}" / path.name
        torn.parent.mkdir(parents=True)
        torn.write_bytes(whole[:size])
        rows[size] = sum(
            record.WhichOneof("record_type") == "history" for _, record in wandb_run.records(torn)
        )
    assert rows[0] == rows[7] == rows[10] == 0
    assert rows[len(whole)] == 15
    assert wandb_run.last_step(tmp_path, tracker.wandb_id) == 15
    assert wandb_run.last_step(tmp_path, "another") == -1


@pytest.mark.parametrize(
    ("variable", "mode", "expected"),
    [
        (None, None, "online"),
        ("", None, "online"),
        ("offline", None, "offline"),
        ("dryrun", None, "offline"),
        ("offline", "online", "online"),
        ("disabled", "offline", "offline"),
    ],
)
def test_the_mode_of_the_environment_counts_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: Any, expected: str
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert subs.WandbLogger("project", mode=mode)._arguments["mode"] == expected


@pytest.mark.parametrize("variable", ["disabled", "nonsense"])
def test_a_mode_of_the_environment_that_logs_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.raises(et.ConfigurationError, match='WANDB_MODE must be "online" or "offline"'):
        subs.WandbLogger("project")
