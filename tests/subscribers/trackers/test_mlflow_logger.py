"""MLflowLogger: a run in MLflow, read back with MLflow's own client from SQLite."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.trackers import mlflow_logger, tracker
from eventtrain.subscribers.trackers.tracker import TrackerThread
from eventtrain.testing import ScriptedStep
from eventtrain.validation.optional_imports import MissingModule
from tests.conftest import python_path
from tests.subscribers.trackers.tracked_runs import context
from tests.support.saved_in_memory import MemoryCheckpointer

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'eventtrain[mlflow]'")
from eventtrain.subscribers.trackers.mlflow_store import KEY_LIMIT, Keys, MLflowRun, key_for  # noqa: E402

# MLflow itself, when it first maps its tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

SECRET = "s3cr3t-passw0rd"
EXPERIMENTS = (f"experiment {number}" for number in count(1))


@pytest.fixture
def uri(mlflow_uri: str) -> str:
    return mlflow_uri


class Store:
    """MLflow's own view of one experiment."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.experiment = experiment
        self.client = mlflow.MlflowClient(tracking_uri=uri)

    def logger(self, **options: Any) -> subs.MLflowLogger:
        return subs.MLflowLogger(self.uri, experiment=self.experiment, **{"every": 1, **options})

    @property
    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name(self.experiment)
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    @property
    def run(self) -> Any:
        (run,) = self.runs
        return run

    def history(self, key: str) -> list[tuple[int, float]]:
        """Step and value, in the order in which MLflow has them."""
        history = self.client.get_metric_history(self.run.info.run_id, key)
        return sorted((metric.step, metric.value) for metric in history)


@pytest.fixture
def store(uri: str) -> Store:
    return Store(uri, next(EXPERIMENTS))


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch + state["w"][0], "odd name (1)": -batch}


def eval_fn(state: Any, batch: Any) -> Any:
    return {"loss": batch}


def data(epoch: int) -> list[Any]:
    return [np.float32(epoch), np.float32(epoch + 1)]


def fit(
    run_dir: Path, *subscribers: et.Subscriber, epochs: int = 2, step: Any = step_fn, **options: Any
) -> list[Any]:
    """Trains for epochs of two steps, and returns what subscribers got wrong."""
    made = {key: options.pop(key) for key in ("backend", "run_id") if key in options}
    trainer = et.Trainer(
        step, {"w": jnp.zeros(2)}, eval_fn=eval_fn, subscribers=subscribers, run_dir=run_dir, **made
    )
    failed: list[et.Event] = []

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.Event) -> None:
        failed.append(event)

    options = {"data": data, **options}
    trainer.fit(options.pop("data"), epochs=epochs, **options)
    return failed


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_run_is_a_run_in_mlflow_with_metrics_params_tags_and_status(
    tmp_path: Path, store: Store, backend: str
) -> None:
    logger = store.logger(
        params={"optimiser": "sgd", "layers": 3}, tags={"team": "vision", "mlflow.note.content": "first"}
    )
    assert fit(tmp_path, logger, run_id="run-7", backend=backend, eval_data=[np.float32(0.25)]) == []
    run = store.run
    assert (run.info.run_name, run.info.status, run.info.run_id) == ("run-7", "FINISHED", logger.run_id)
    assert run.data.params == {"optimiser": "sgd", "layers": "3"}
    tags = {"team": "vision", "mlflow.note.content": "first"}
    ours = {"eventtrain.run_id": "run-7", "eventtrain.stop_reason": "completed"}
    assert (tags | ours).items() <= run.data.tags.items()
    assert store.history("step/loss") == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0)]
    assert store.history("step/odd name _1_") == [(1, 0.0), (2, -1.0), (3, -1.0), (4, -2.0)]
    assert store.history("epoch/loss") == [(2, 0.5), (4, 3.0)]
    assert store.history("eval/loss") == [(2, 0.25), (4, 0.25)]
    assert set(run.data.metrics) == {
        "step/loss",
        "step/odd name _1_",
        "epoch/loss",
        "epoch/odd name _1_",
        "epoch/val_loss",
        "eval/loss",
    }


def test_samples_are_files_of_the_run(tmp_path: Path, store: Store) -> None:
    store.client.create_experiment(store.experiment, artifact_location=(tmp_path / "files").as_uri())
    table = subs.Sample(lambda state: {"i": state["w"]}, every=4, name="a b")
    text = subs.Sample(lambda state: state["w"], every=2, name="text", decode=lambda w: f"{len(w)} values")
    assert fit(tmp_path, store.logger(), table, text) == []
    found = {
        file.path: Path(store.client.download_artifacts(store.run.info.run_id, file.path)).read_text()
        for folder in ("samples/a b", "samples/text")
        for file in store.client.list_artifacts(store.run.info.run_id, folder)
    }
    assert found.keys() == {
        "samples/a b/step-00000004.json", "samples/text/step-00000002.txt", "samples/text/step-00000004.txt"
    }  # fmt: skip
    assert found["samples/text/step-00000002.txt"] == "2 values"
    assert json.loads(found["samples/a b/step-00000004.json"])["columns"] == ["i"]


def contents(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")
    }


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arrays_of_metrics_are_files_of_the_run(tmp_path: Path, store: Store) -> None:
    store.client.create_experiment(store.experiment, artifact_location=(tmp_path / "files").as_uri())
    logger = store.logger()
    await logger.start(context(tmp_path))
    confusion = np.array([[3, 1], [0, 4]], np.float32)
    await logger.handle(
        et.EvalCompleted(
            step=5, epoch=0, steps=1, duration_s=0.1, metrics={}, arrays={"confusion": confusion}
        )
    )
    curve = {"a/b": np.array([0.5, np.nan])}
    await logger.handle(et.EpochCompleted(step=6, epoch=0, steps=6, duration_s=0.1, metrics={}, arrays=curve))
    await logger.stop()
    folder = tmp_path / "files" / str(logger.run_id) / "artifacts"
    assert contents(folder) == {
        "eval/confusion/step-00000005.json": [[3, 1], [0, 4]],
        "epoch/a/b/step-00000006.json": [0.5, "NaN"],
    }


def test_only_every_so_many_steps_are_logged(tmp_path: Path, store: Store) -> None:
    fit(tmp_path, store.logger(every=3), epochs=5)
    assert [step for step, _ in store.history("step/loss")] == [3, 6, 9]
    assert len(store.history("epoch/loss")) == 5


def test_no_steps_are_logged_where_none_are_wanted(tmp_path: Path, store: Store) -> None:
    fit(tmp_path, store.logger(every=0))
    assert store.history("step/loss") == []
    assert len(store.history("epoch/loss")) == 2


def test_more_values_than_fit_one_request_arrive(tmp_path: Path, store: Store) -> None:
    batches = [np.float32(index) for index in range(1200)]
    assert fit(tmp_path, store.logger(), data=batches, epochs=1) == []
    assert [step for step, _ in store.history("step/loss")] == list(range(1, 1201))
    assert [value for _, value in store.history("step/odd name _1_")] == [
        -float(index) for index in range(1200)
    ]


def test_hyperparameters_have_the_values_that_steps_were_computed_with(tmp_path: Path, store: Store) -> None:
    script = ScriptedStep({"loss": [1.0]}, steps_per_epoch=2, learning_rate=0.5)
    scheduler = subs.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch))
    et.Trainer(script.step_fn, script.state, subscribers=[store.logger(), scheduler], run_dir=tmp_path).fit(
        script.data, epochs=3
    )
    curve = dict(store.history("hyperparams/learning_rate"))
    used = dict(store.history("step/learning_rate"))
    assert curve == {step: used[step] for step in curve}
    assert curve[6] == pytest.approx(0.5 / 2 / 3)


def test_nan_and_infinities_arrive_as_mlflow_has_them(tmp_path: Path, store: Store) -> None:
    values = [np.float32(x) for x in ("nan", "inf", "-inf")]
    assert fit(tmp_path, store.logger(), data=values, epochs=1) == []
    odd = dict(store.history("step/odd name _1_"))
    assert np.isnan(odd[1])
    assert odd[2] < -1e308  # SQL has no infinity: MLflow takes the largest number for it
    assert odd[3] > 1e308


@pytest.mark.parametrize(
    ("end", "status"), [("stop", "FINISHED"), ("interrupt", "KILLED"), ("failure", "FAILED")]
)
def test_the_run_in_mlflow_ends_as_ours(tmp_path: Path, store: Store, end: str, status: str) -> None:
    class Ender(et.Subscriber):
        lag = 0

        async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 2 and end == "stop":
                control.stop("enough")

    def batches(epoch: int) -> Iterator[Any]:
        yield from data(epoch)
        if end == "interrupt":
            signal.raise_signal(signal.SIGINT)
        if end == "failure":
            raise ValueError("the data broke")
        yield from data(epoch)

    try:
        fit(tmp_path, store.logger(), Ender(), data=batches, epochs=1)
    except (KeyboardInterrupt, ValueError):
        assert end != "stop"
    assert store.run.info.status == status
    reasons = {"stop": "enough", "interrupt": "interrupted", "failure": "failed"}
    assert store.run.data.tags["eventtrain.stop_reason"] == reasons[end]


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_run_that_resumes_goes_on_with_its_run_in_mlflow_and_each_step_is_there_once(
    tmp_path: Path, store: Store, backend: str
) -> None:
    checkpointer = MemoryCheckpointer(every=3)
    options: dict[str, Any] = {"eval_data": [np.float32(0.25)], "backend": backend}
    params = {"layers": 3}
    assert fit(tmp_path, checkpointer, store.logger(params=params), epochs=4, **options) == []
    first = store.run.info.run_id
    # As if it had been killed after step 8: that much is in MLflow, and the checkpoint of step 3 is the newest.
    resumed = store.logger(params={**params, "layers": 4, "late": True})
    assert fit(tmp_path, checkpointer, resumed, epochs=6, resume=3, **options) == []
    assert resumed.run_id == first
    assert store.run.data.params == {"layers": "3", "late": "True"}
    assert [step for step, _ in store.history("step/loss")] == list(range(1, 13))
    assert [step for step, _ in store.history("eval/loss")] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in store.history("epoch/loss")] == [2, 4, 6, 8, 10, 12]
    assert store.run.info.status == "FINISHED"


def test_a_run_whose_id_the_checkpoint_does_not_know_is_found(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where MLflow was slow when the checkpoint was written, or its answer was lost."""
    first, second = store.logger(), store.logger()
    fit(tmp_path, first)
    saved = {**first.state_dict(), "run_id": None}
    second.load_state_dict(saved)
    fit(tmp_path, second)
    assert second.run_id == first.run_id == store.run.info.run_id


def test_training_again_goes_on_with_the_same_run(tmp_path: Path, store: Store) -> None:
    trainer = et.Trainer(step_fn, {"w": jnp.zeros(2)}, subscribers=[store.logger()], run_dir=tmp_path)
    for _ in range(2):
        trainer.fit(data, epochs=1)
    assert [step for step, _ in store.history("step/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("state", ["deleted", "unknown"])
def test_a_run_that_mlflow_does_not_have_any_more_is_made_anew(
    tmp_path: Path, store: Store, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, store.logger())
    gone = "0" * 32
    if state == "deleted":
        gone = store.run.info.run_id
        store.client.delete_run(gone)
    logger = store.logger()
    logger.load_state_dict(mlflow_logger.MLflowLoggerState(run_id=gone, token=state).to_json())
    assert fit(tmp_path, logger) == []
    assert logger.run_id in {run.info.run_id for run in store.runs} - {gone}
    assert f"MLflow has no run {gone}" in caplog.text


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(et.StateError, match="version 7"):
        subs.MLflowLogger("sqlite://").load_state_dict({"version": 7})


KILLED = """
    import os, signal, sys
    import anyio
    import numpy as np, jax.numpy as jnp
    import eventtrain as et
    from eventtrain import subscribers as subs
    from eventtrain.subscribers.trackers import tracker

    uri, experiment, run_dir, kill = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "kill"
    logger = subs.MLflowLogger(uri, experiment=experiment, every=1)
    tracker.FLUSH_TIMEOUT_S = 120.0  # the machine may be busy

    class Killer(et.Subscriber):
        lag = 0
        async def on_step_completed(self, event, control):
            if kill and event.step == 17:
                committed = os.path.join(run_dir, "checkpoints", "step-00000010")
                while logger._newest.step < 17 or not os.path.exists(committed):
                    await anyio.sleep(0.01)
                await logger.flush()  # what is behind the checkpoint lies in MLflow as well
                os.kill(os.getpid(), signal.SIGKILL)

    et.Trainer(
        lambda state, batch: ({"w": state["w"] + batch}, {"loss": batch}),
        {"w": jnp.zeros(2)},
        subscribers=[subs.Checkpointer("checkpoints", every=10), logger, Killer()],
        run_dir=run_dir,
    ).fit([np.float32(n) for n in range(5)], epochs=5, resume=True)
"""


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_is_killed_and_resumes_has_each_step_once(tmp_path: Path, store: Store) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    assert store.runs == []
    env = os.environ | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"}
    run = partial(subprocess.run, env=env, timeout=240, capture_output=True, text=True)
    command = [sys.executable, str(script), store.uri, store.experiment, str(tmp_path / "run")]
    killed = run([*command, "kill"])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert store.run.info.status == "RUNNING"
    before = store.history("step/loss")
    assert [step for step, _ in before] == list(range(1, 18))
    resumed = run([*command, "go on"])
    assert resumed.returncode == 0, resumed.stderr
    assert store.history("step/loss") == [(step, float((step - 1) % 5)) for step in range(1, 26)]
    assert store.run.info.status == "FINISHED"


# --- targets that are slow, dead or lie ---------------------------------------------------------------------------


class Fake:
    """Stands for a run in MLflow; what is in ``errors`` is raised, one for each request."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.status = ""
        self.errors: list[et.StorageError] = []
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, *args: Any, **options: Any) -> Fake:
        return self

    def open(self) -> None:
        self._answer()
        self.run_id = "id"

    def describe(self, params: Any, tags: Any) -> None:
        self._answer()

    def log(self, rows: Any) -> None:
        self._answer()
        self.rows += rows

    def close(self, status: str, tags: Any) -> None:
        self._answer()
        self.status = status

    def _answer(self) -> None:
        self.hold.wait(60)
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake()
    monkeypatch.setattr(mlflow_logger.mlflow_store, "MLflowRun", fake)
    yield fake
    fake.hold.set()


def test_a_slow_mlflow_delays_no_step_and_nothing_is_lost(tmp_path: Path, fake: Fake) -> None:
    fake.hold.clear()
    at_the_last_step: list[int] = []

    class Release(et.Subscriber):
        lag = 0
        every = 400

        async def on_step_completed(self, event: et.StepCompleted) -> None:
            at_the_last_step.append(len(fake.rows))
            fake.hold.set()

    assert fit(tmp_path, subs.MLflowLogger("sqlite://", every=1), Release(), epochs=200) == []
    assert at_the_last_step == [0]
    assert [row[2] for row in fake.rows if row[0] == "step/loss"] == list(range(1, 401))
    assert fake.status == "FINISHED"


def test_an_mlflow_that_hangs_is_not_waited_for_beyond_the_time_given(
    tmp_path: Path, fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.hold.clear()
    logger = subs.MLflowLogger("sqlite://", every=1, finish_timeout_s=0.2)
    monkeypatch.setattr("eventtrain.subscribers.trackers.tracker.FLUSH_TIMEOUT_S", 0.01)
    fit(tmp_path, logger, MemoryCheckpointer(every=2), epochs=5)
    assert fake.rows == []
    assert "MLflow did not take everything within 0.2 s after the run; it lacks" in caplog.text
    assert "MLflow lacks rows of steps before this checkpoint" in caplog.text


def test_what_waits_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200
    monkeypatch.setattr(tracker, "TrackerThread", partial(TrackerThread, row_limit=limit))
    fake.hold.clear()
    logger = subs.MLflowLogger("sqlite://", every=1)
    said: list[str] = []
    trainer = et.Trainer(step_fn, {"w": jnp.zeros(2)}, subscribers=[logger], run_dir=tmp_path)

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.SubscriberFailed) -> None:
        said.append(event.error)

    @trainer.on(et.RunCompleted)
    async def release(event: et.RunCompleted) -> None:
        fake.hold.set()

    trainer.fit(data, epochs=500)
    assert said[0].startswith("MLflow is slower than the run")
    lost = int(said[-1].removeprefix("MLflow: ").split()[0])
    logged = len({(row[0].split("/")[0], row[2]) for row in fake.rows})
    assert 0 < logged <= limit
    assert (logged, lost) == (logger.statistics.written, logger.statistics.lost)
    assert logged + lost == 1000 + 500


def test_what_may_pass_is_tried_again_in_order(tmp_path: Path, fake: Fake) -> None:
    fake.errors = [et.StorageError("busy", may_pass=True)] * 2
    failed = fit(tmp_path, subs.MLflowLogger("sqlite://", every=1), epochs=20)
    assert [event.error for event in failed] == ["MLflow: busy"]
    assert [row[2] for row in fake.rows if row[0] == "step/loss"] == list(range(1, 41))


def test_a_request_that_is_repeated_doubles_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MLflowRun(
        mlflow_logger.SecretStr(store.uri), experiment=store.experiment, run_name="x", token="t", run_id=None
    )
    rows = [("step/loss", float(step), step, 1000 + step) for step in range(1500)]
    real = mlflow.MlflowClient.log_batch
    fails = iter([False, True])

    def log_batch(*args: Any, **options: Any) -> None:
        real(*args, **options)
        if next(fails, False):
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    with pytest.raises(et.StorageError, match="ConnectionError") as caught:
        run.log(rows)
    assert caught.value.may_pass
    run.log(rows)
    assert store.history("step/loss") == [(step, value) for _, value, step, _ in rows]


@pytest.mark.parametrize("place", ["dead server", "silent server", "driver", "sqlite", "scheme"])
def test_an_mlflow_that_cannot_be_reached_costs_no_run_and_its_password_is_shown_nowhere(
    tmp_path: Path, place: str, caplog: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:  # it never answers
        port = server.getsockname()[1]
        if place != "silent server":
            server.close()
        uri = {
            "dead server": f"http://me:{SECRET}@127.0.0.1:{port}/{SECRET}?token={SECRET}",
            "silent server": f"http://me:{SECRET}@127.0.0.1:{port}/{SECRET}?token={SECRET}",
            "driver": f"mssql+pymssql://me:{SECRET}@127.0.0.1:{port}/x",
            "sqlite": f"sqlite:///{tmp_path}/file/x.db?password={SECRET}",
            "scheme": f"nonsense://{SECRET}",
        }[place]
        monkeypatch.setattr("eventtrain.subscribers.trackers.tracker.FLUSH_TIMEOUT_S", 0.2)
        logger = subs.MLflowLogger(uri, every=1, finish_timeout_s=1)
        run_dir = tmp_path / "run"
        checkpointer = subs.Checkpointer("checkpoints", every_epochs=1)
        failed = fit(run_dir, checkpointer, subs.JSONLLogger("x.jsonl"), logger, epochs=3)
    assert {event.subscriber for event in failed} <= {"MLflowLogger"}
    assert failed or "MLflow did not take everything" in caplog.text
    assert len(list((run_dir / "checkpoints").iterdir())) > 0
    shown = [repr(logger), str(vars(logger)), str(logger.state_dict()), caplog.text, *capfd.readouterr()]
    shown += [event.model_dump_json() for event in failed]
    shown += [record.exc_text or "" for record in caplog.records]
    shown += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


# --- names and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("loss", "loss"),
        ("train/loss", "train/loss"),
        ("Verlust ü", "Verlust ü"),
        ('a"b\nc,d\t', "a_b_c_d_"),
        ("/a//b/", "a/b"),
        ("../../etc/passwd", "etc/passwd"),
        ("a/./b", "a/b"),
        ("...", "_"),
        ("", "_"),
        ("x" * 300, "x" * KEY_LIMIT),
        ("\udcff", "_"),
    ],
)
def test_names_become_keys_that_mlflow_takes(store: Store, name: str, key: str) -> None:
    assert key_for(name) == key
    mlflow.utils.validation._validate_metric_name(key)
    mlflow.utils.validation._validate_length_limit("key", mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH, key)


def test_two_names_never_share_a_key() -> None:
    keys = Keys()
    names = ["a(1)", "a_1_", "a[1]", "x" * 251, "x" * 250]
    found = [keys[name] for name in names]
    assert len(set(found)) == len(names)
    assert max(map(len, found)) <= KEY_LIMIT
    assert [keys[name] for name in names] == found
    assert found[0] == "a_1_"


def test_many_and_long_params_and_tags_arrive(store: Store) -> None:
    run = MLflowRun(
        mlflow_logger.SecretStr(store.uri), experiment=store.experiment, run_name="x", token="t", run_id=None
    )
    run.describe({f"p{n}": "v" * 7000 for n in range(250)}, {f"t{n}": "v" for n in range(250)})
    found = store.run.data
    assert len(found.params) == 250
    assert set(found.params.values()) == {"v" * 6000}
    assert len([tag for tag in found.tags if tag.startswith("t")]) == 250


@pytest.mark.parametrize("wrong", [{"every": -1}, {"every": 1.5}, {"finish_timeout_s": "1"}])
def test_arguments_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match=f"MLflowLogger.{next(iter(wrong))}=.* must be"):
        subs.MLflowLogger("sqlite://", **wrong)


def test_without_mlflow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'mlflow'"), "mlflow", "MLflowLogger")
    monkeypatch.setattr(mlflow_logger, "mlflow_store", missing)
    with pytest.raises(et.ConfigurationError, match=r"No module named 'mlflow'.*'eventtrain\[mlflow\]'"):
        subs.MLflowLogger("sqlite://")
