"""ModelRegistry: committed checkpoints are versions in MLflow's registry, with the metrics of their epoch."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers.trackers import model_registry
from eventtrain.validation.optional_imports import MissingModule

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'eventtrain[mlflow]'")
from eventtrain.subscribers.trackers.mlflow_store import MLflowRegistry  # noqa: E402

# MLflow itself, when it first maps its tables.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

SECRET = "s3cr3t-passw0rd"
NAMES = (f"model-{number}" for number in count(1))


@pytest.fixture
def uri(mlflow_uri: str) -> str:
    return mlflow_uri


@pytest.fixture
def name() -> str:
    return next(NAMES)


@pytest.fixture
def client(uri: str) -> Any:
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def versions(client: Any, name: str) -> list[Any]:
    """In the order in which they were registered."""
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch, "odd name (1)": -batch}


def fit(run_dir: Path, *subscribers: et.Subscriber, epochs: int = 2, **options: Any) -> list[Any]:
    """Trains for epochs of two steps, and returns what subscribers got wrong."""
    made = {key: options.pop(key) for key in ("backend", "run_id") if key in options}
    trainer = et.Trainer(step_fn, {"w": jnp.zeros(2)}, subscribers=subscribers, run_dir=run_dir, **made)
    failed: list[et.Event] = []

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.Event) -> None:
        failed.append(event)

    trainer.fit(lambda epoch: [np.float32(epoch), np.float32(epoch + 1)], epochs=epochs, **options)
    return failed


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_committed_checkpoint_is_a_version_with_source_tags_and_metrics(
    tmp_path: Path, uri: str, name: str, client: Any, backend: str
) -> None:
    registry = subs.ModelRegistry(name, uri, tags={"team": "vision"}, experiment=f"experiment of {name}")
    checkpointer = subs.Checkpointer("checkpoints", every_epochs=1)
    assert fit(tmp_path, checkpointer, registry, run_id="run-7", backend=backend) == []
    found = versions(client, name)
    assert [version.source for version in found] == [
        str(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (2, 4)
    ]
    assert [version.tags for version in found] == [
        {
            "step": str(2 * epoch + 2),
            "epoch": str(epoch),
            "tag": f"step-{2 * epoch + 2}",
            "run_id": "run-7",
            "team": "vision",
            "metrics.loss": repr(epoch + 0.5),
            "metrics.odd name _1_": repr(-epoch - 0.5),
        }
        for epoch in (0, 1)
    ]
    (run_id,) = {version.run_id for version in found}
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("run-7", "FINISHED")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(2, 0.5), (4, 1.5)]
    assert client.get_experiment(run.info.experiment_id).name == f"experiment of {name}"
    state = et.load_state(found[-1].source, like={"w": jnp.zeros(2)})
    assert state["w"].tolist() == [4.0, 4.0]


def test_what_is_not_committed_is_not_registered(
    tmp_path: Path, uri: str, name: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, name: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(atomic_files, "rename", refuse)
    fit(
        tmp_path,
        subs.Checkpointer("checkpoints", every=1, retries=0),
        subs.ModelRegistry(name, uri),
        epochs=1,
    )
    assert versions(client, name) == []


def test_the_url_of_an_upload_is_registered_once_it_is_there(
    tmp_path: Path, uri: str, name: str, client: Any
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'eventtrain[upload]'")
    uploader = subs.Uploader((tmp_path / "store").as_uri(), logs=())
    registry = subs.ModelRegistry(name, uri, source="upload")
    assert fit(tmp_path / "run", subs.Checkpointer("checkpoints"), uploader, registry) == []
    (version,) = versions(client, name)
    assert version.source == (tmp_path / "store/checkpoints/step-00000004").as_uri()
    assert subs.download_checkpoint(version.source, tmp_path / "back").name == "step-00000004"


def test_only_the_checkpoints_of_one_directory_are_registered(
    tmp_path: Path, uri: str, name: str, client: Any
) -> None:
    best = subs.Checkpointer("best", monitor="loss", mode="max", save_best_only=True, save_weights_only=True)
    best.name = "best"
    registry = subs.ModelRegistry(name, uri, directory="best", metrics=("loss",))
    assert fit(tmp_path, subs.Checkpointer("checkpoints", every=1), best, registry, epochs=3) == []
    found = versions(client, name)
    assert [Path(version.source).parent for version in found] == [tmp_path / "best"] * 3
    assert [key for key in found[-1].tags if key.startswith("metrics.")] == ["metrics.loss"]


class Fake:
    """Stands for MLflow; ``fails`` says what goes wrong."""

    def __init__(self) -> None:
        self.added: list[Any] = []
        self.there: set[str] = set()
        self.status = ""
        self.errors: list[et.StorageError] = []
        self.hold = threading.Event()
        self.hold.set()

    def add(self, source: str, **details: Any) -> str:
        self.hold.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        self.added.append(SimpleNamespace(source=source, **details))
        return str(len(self.added))

    def has(self, source: str) -> bool:
        return source in self.there

    def close(self, status: str) -> None:
        self.status = status


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    fake = Fake()
    monkeypatch.setattr(model_registry.mlflow_store, "MLflowRegistry", lambda *args, **options: fake)
    yield fake
    fake.hold.set()


async def started(tmp_path: Path, **options: Any) -> tuple[subs.ModelRegistry, list[et.Event]]:
    said: list[et.Event] = []
    registry = subs.ModelRegistry("model", "sqlite://", retry_delay_s=0, **options)
    control: Any = None
    await registry.start(et.RunContext("run", tmp_path, control, said.append))
    return registry, said


def committed(step: int, path: str = "") -> et.CheckpointCommitted:
    return et.CheckpointCommitted(
        path=path or f"ck/step-{step}", tag="best", step=step, size_bytes=0, duration_s=0
    )


def epoch(number: int, step: int, loss: float) -> et.EpochCompleted:
    return et.EpochCompleted(epoch=number, step=step, metrics={"loss": loss}, steps=4, duration_s=0)


async def test_a_checkpoint_has_the_metrics_of_its_own_epoch_however_late_it_is_committed(
    tmp_path: Path, fake: Fake
) -> None:
    registry, _ = await started(tmp_path)
    await registry.handle(committed(3))
    for number in range(3):
        await registry.handle(epoch(number, 4 * number + 4, float(number)))
    for step in (4, 7, 8, 100):
        await registry.handle(committed(step))
    await registry.stop()
    assert [version.metrics for version in fake.added] == [
        {},
        {"loss": 0.0},
        {"loss": 0.0},
        {"loss": 1.0},
        {"loss": 2.0},
    ]
    assert fake.added[0].tags == {"step": "3", "run_id": "run", "tag": "best"}


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (et.RunCompleted(reason="completed"), "FINISHED"),
        (et.RunCompleted(reason="preempted"), "KILLED"),
        (et.RunFailed(error="x"), "FAILED"),
    ],
)
async def test_the_run_of_mlflows_ends_as_ours(tmp_path: Path, fake: Fake, last: Any, status: str) -> None:
    registry, _ = await started(tmp_path)
    await registry.handle(last)
    await registry.stop()
    assert fake.status == status


async def test_a_run_that_resumes_registers_what_is_not_registered_yet(tmp_path: Path, fake: Fake) -> None:
    fake.there = {"ck/step-4"}
    registry, said = await started(tmp_path)
    for step in (4, 8):
        await registry.handle(et.RunResumed(epoch=1, batch=0, step=step, path=f"ck/step-{step}"))
    await registry.stop()
    assert [version.source for version in fake.added] == ["ck/step-8"]
    assert said == []


def test_what_is_there_is_found_on_any_page(uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mlflow.MlflowClient.search_model_versions
    monkeypatch.setattr(
        mlflow.MlflowClient,
        "search_model_versions",
        lambda self, text, page_token=None: real(self, text, max_results=1, page_token=page_token),
    )
    registry = MLflowRegistry(name, model_registry.SecretStr(uri), experiment="x", run_name="y")
    for source in ("a", "b", "c"):
        assert not registry.has(source)
        registry.add(source, step=1, metrics={}, tags={})
    assert [registry.has(source) for source in ("a", "b", "c", "d")] == [True, True, True, False]


async def test_what_may_pass_is_tried_again_and_the_order_is_kept(tmp_path: Path, fake: Fake) -> None:
    fake.errors = [et.StorageError("busy", may_pass=True)] * 2
    registry, said = await started(tmp_path)
    for step in (1, 2, 3):
        await registry.handle(committed(step))
    await registry.stop()
    assert [version.step for version in fake.added] == [1, 2, 3]
    assert said == []


@pytest.mark.parametrize("errors", [[et.StorageError("no")], [et.StorageError("busy", may_pass=True)] * 3])
async def test_what_cannot_be_registered_is_said(
    tmp_path: Path, fake: Fake, errors: list[et.StorageError]
) -> None:
    fake.errors = list(errors)
    registry, said = await started(tmp_path)
    await registry.handle(committed(1))
    await registry.handle(committed(2))
    await registry.stop()
    (failed,) = said
    assert isinstance(failed, et.SubscriberFailed)
    assert (failed.step, failed.subscriber, failed.event_kind) == (1, "ModelRegistry", "checkpoint_committed")
    assert f"ck/step-1 was not registered: {errors[0]} (attempt {len(errors)})" in failed.error
    assert [version.step for version in fake.added] == [2]


async def test_the_end_of_a_run_waits_no_longer_than_told_and_names_what_is_left(
    tmp_path: Path, fake: Fake
) -> None:
    fake.hold.clear()
    registry, _ = await started(tmp_path, finish_timeout_s=0.1)
    await registry.handle(committed(1))
    with anyio.fail_after(10), pytest.raises(et.SubscriberError, match="ck/step-1"):
        await registry.stop()


def test_a_slow_registry_delays_no_step(tmp_path: Path, fake: Fake) -> None:
    fake.hold.clear()
    registry = subs.ModelRegistry("model", "sqlite://")
    at_the_last_step: list[int] = []

    class Release(et.Subscriber):
        lag = 0
        every = 40

        async def on_step_completed(self, event: et.StepCompleted) -> None:
            at_the_last_step.append(len(fake.added))
            fake.hold.set()

    assert fit(tmp_path, subs.Checkpointer("checkpoints", every=10), registry, Release(), epochs=20) == []
    assert at_the_last_step == [0]
    assert [version.step for version in fake.added] == [10, 20, 30, 40]


@pytest.mark.parametrize("place", ["server", "driver", "sqlite", "scheme"])
def test_a_registry_that_cannot_be_reached_costs_no_run_and_its_password_is_shown_nowhere(
    tmp_path: Path, place: str, caplog: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "file").write_text("")
    uri = {
        "server": f"http://me:{SECRET}@127.0.0.1:{port}/{SECRET}?token={SECRET}",
        "driver": f"mssql+pymssql://me:{SECRET}@127.0.0.1:{port}/x",
        "sqlite": f"sqlite:///{tmp_path}/file/x.db?password={SECRET}",
        "scheme": f"nonsense://{SECRET}",
    }[place]
    registry = subs.ModelRegistry("model", uri, retries=0)
    run_dir = tmp_path / "run"
    failed = fit(run_dir, subs.Checkpointer("checkpoints"), subs.JSONLLogger("x.jsonl"), registry)
    assert [(event.subscriber, event.event_kind) for event in failed] == [
        ("ModelRegistry", "checkpoint_committed")
    ]
    shown = [repr(registry), str(vars(registry)), caplog.text, *capfd.readouterr()]
    shown += [event.model_dump_json() for event in failed]
    shown += [record.exc_text or "" for record in caplog.records]
    shown += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize(
    ("named", "wrong"),
    [
        ("", {}),
        ("a/b", {}),
        ("a:b", {}),
        ("a'b", {}),
        ("a", {"source": "somewhere"}),
        ("a", {"retries": -1}),
        ("a", {"retry_delay_s": -1}),
        ("a", {"finish_timeout_s": float("nan")}),
    ],
)
def test_arguments_that_cannot_work_are_refused(named: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match=f"ModelRegistry.{next(iter(wrong), 'name')}=.* must be"):
        subs.ModelRegistry(named, "sqlite://", **wrong)


def test_without_mlflow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'mlflow'"), "mlflow", "ModelRegistry")
    monkeypatch.setattr(model_registry, "mlflow_store", missing)
    with pytest.raises(et.ConfigurationError, match=r"No module named 'mlflow'.*'eventtrain\[mlflow\]'"):
        subs.ModelRegistry("model", "sqlite://")


def test_a_file_describes_a_registry_and_its_uri_stays_secret(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        [[subscribers]]
        type = "model_registry"
        name = "digits"
        tracking_uri = "http://me:{SECRET}@host"
        directory = "best"
        tags = {{team = "vision"}}
        metrics = ["val_loss"]
        """
    )
    (loaded,) = et.load_subscribers(path)
    assert isinstance(loaded, subs.ModelRegistry)
    assert SECRET not in str(vars(loaded))
    config = et.subscriber_config(subs.ModelRegistry).model_validate_json(
        json.dumps({"type": "model_registry", "name": "x", "tracking_uri": SECRET})
    )
    assert SECRET not in repr(config)
