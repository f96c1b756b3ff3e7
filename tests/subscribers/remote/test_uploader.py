"""Uploader: what is said to be there is there, whole; what is not is said; and training waits for none of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli import main as cli
from eventtrain.subscribers.checkpointing.manifest import read_manifest
from eventtrain.subscribers.remote import object_store
from eventtrain.subscribers.remote import uploader as uploading
from eventtrain.subscribers.remote.object_store import ObjectStore
from eventtrain.subscribers.remote.upload_manifest import UploadedFile, UploadManifest
from eventtrain.validation.optional_imports import MissingModule
from tests.conftest import python_path

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'eventtrain[upload]'")
from tests.subscribers.remote import s3_server

SECRET = "s3cr3t-t0ken"
QUICK: dict[str, Any] = {"retries": 2, "retry_delay_s": 0.01}


def fit(
    run_dir: Path, *subscribers: et.Subscriber, steps: int = 4, every: int = 2, **options: Any
) -> list[Any]:
    """Trains, with a Checkpointer and a log, and returns the events about checkpoints and subscribers, in order."""
    names = ("backend", "drain_timeout_s")
    made = {name: options.pop(name) for name in names if name in options}
    listed = [subs.Checkpointer("checkpoints", every=every), subs.JSONLLogger("run.jsonl"), *subscribers]
    state = {"w": jnp.zeros(3), "n": jnp.int32(0)}
    trainer = et.Trainer(step_fn, state, subscribers=listed, run_dir=run_dir, **made)
    seen: list[et.Event] = []

    @trainer.on(
        (et.CheckpointCommitted, et.CheckpointUploaded, et.CheckpointUploadFailed, et.SubscriberFailed)
    )
    async def see(event: et.Event) -> None:
        seen.append(event)

    trainer.fit([np.float32(n) for n in range(steps)], epochs=1, **options)
    return seen


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch, "n": state["n"] + 1}, {"loss": batch}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of four steps with checkpoints of steps 2 and 4; not to be changed."""
    path = tmp_path_factory.mktemp("trained")
    fit(path)
    return path


@pytest.fixture
def trained(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of that directory."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.fixture(scope="session")
def s3() -> Iterator[int]:
    with s3_server.moto_server() as port:
        yield port


BUCKETS = count(1)


@pytest.fixture
def door(s3: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.Door]:
    """A bucket of its own behind a door; ``door.place`` is the URL for it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with s3_server.opened(s3) as door:
        door.bucket = f"bucket-{next(BUCKETS)}"
        s3_server.make_bucket(s3, door.bucket)
        yield door


@dataclass
class Place:
    """Where to upload to."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def uploader(self, **more: Any) -> subs.Uploader:
        return subs.Uploader(self.url, options=self.options, **{**QUICK, **more})

    def download(self, directory: Path, which: str | int = "newest", **more: Any) -> Path:
        return subs.download_checkpoint(self.url, directory, which, options=self.options, **{**QUICK, **more})


@pytest.fixture(params=["s3", "folder", "file-url"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        return at(request.getfixturevalue("door"))
    folder = tmp_path / "a store #1 %20"
    return Place(str(folder) if request.param == "folder" else folder.as_uri())


def at(door: s3_server.Door) -> Place:
    return Place(f"s3://{door.bucket}/runs/one", door.options())


class Harness:
    """An uploader beside a run that there is no trainer for."""

    def __init__(self, uploader: subs.Uploader, run_dir: Path) -> None:
        self.uploader = uploader
        self.run_dir = run_dir
        self.said: list[Any] = []
        self._changed = threading.Condition()

    def publish(self, event: et.Event) -> None:
        with self._changed:
            self.said.append(event)
            self._changed.notify_all()

    async def start(self) -> None:
        control: Any = None
        await self.uploader.start(et.RunContext("run-1", self.run_dir, control, self.publish))

    async def commit(self, path: Path, step: int = 0, tag: str | None = None) -> None:
        event = et.CheckpointCommitted(path=str(path), step=step, tag=tag, size_bytes=0, duration_s=0)
        await self.uploader.on_checkpoint_committed(event)

    async def until(self, number: int) -> None:
        """So many events were published."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.said) >= number, 20)

        assert await anyio.to_thread.run_sync(wait)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.said]


async def uploaded(uploader: subs.Uploader, run_dir: Path, *names: str) -> list[Any]:
    """What an uploader says of these checkpoints."""
    harness = Harness(uploader, run_dir)
    await harness.start()
    for name in names:
        await harness.commit(run_dir / "checkpoints" / name, int(name[-1]))
    await uploader.stop()
    return harness.said


def same_files(left: Path, right: Path) -> bool:
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (left, right)
    ]
    return files[0] == files[1] and len(files[0]) > 3


# --- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_a_run_committed_comes_back_bit_for_bit(place: Place, tmp_path: Path, backend: Any) -> None:
    run_dir = tmp_path / "run"
    seen = fit(run_dir, place.uploader(), steps=5, backend=backend)
    committed = [event for event in seen if isinstance(event, et.CheckpointCommitted)]
    there = [event for event in seen if isinstance(event, et.CheckpointUploaded)]
    assert [event.step for event in committed] == [event.step for event in there] == [2, 4, 5]
    assert [event.path for event in there] == [event.path for event in committed]
    assert [event.size_bytes for event in there] == [event.size_bytes for event in committed]
    assert not [event for event in seen if isinstance(event, et.SubscriberFailed)]
    back = place.download(tmp_path / "back")
    assert back == tmp_path / "back" / "step-00000005"
    assert same_files(back, run_dir / "checkpoints" / "step-00000005")
    state = et.load_state(back, like={"w": jnp.zeros(3), "n": jnp.int32(0)})
    assert (state["n"], state["w"].tolist()) == (5, [10.0] * 3)
    assert (
        subs.download_checkpoint(there[0].url, tmp_path / "by-url", options=place.options).name
        == "step-00000002"
    )


def test_a_run_goes_on_elsewhere_from_what_was_downloaded(place: Place, tmp_path: Path) -> None:
    fit(tmp_path / "here", place.uploader(), steps=4)
    elsewhere = tmp_path / "elsewhere"
    place.download(elsewhere / "checkpoints")
    state = {"w": jnp.zeros(3), "n": jnp.int32(0)}
    trainer = et.Trainer(step_fn, state, subscribers=[subs.Checkpointer("checkpoints")], run_dir=elsewhere)
    result = trainer.fit([np.float32(n) for n in range(4)], epochs=2, resume=True)
    assert (result.step, result.state["n"], result.state["w"].tolist()) == (8, 8, [12.0] * 3)


def test_a_log_goes_on_elsewhere_too_and_each_step_has_one_row(place: Place, tmp_path: Path) -> None:
    fit(tmp_path / "here", place.uploader(), steps=7)
    elsewhere = tmp_path / "elsewhere"
    path = place.download(elsewhere / "checkpoints", 4, logs=elsewhere)
    assert place.download(elsewhere / "checkpoints", 4, logs=elsewhere) == path
    fit(elsewhere, steps=7, resume=True)
    rows = [json.loads(line) for line in (elsewhere / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step_completed"] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["kind"] for row in rows].count("run_started") == 1


def test_a_log_that_lies_in_the_way_is_not_touched(place: Place, tmp_path: Path) -> None:
    fit(tmp_path / "here", place.uploader())
    (tmp_path / "run.jsonl").write_text("mine")
    with pytest.raises(et.SnapshotError, match=r"run\.jsonl"):
        place.download(tmp_path / "checkpoints", logs=tmp_path)
    assert (tmp_path / "run.jsonl").read_text() == "mine"
    url = f"{place.url}/checkpoints/step-00000004"
    with pytest.raises(et.SnapshotError, match="URL"):
        subs.download_checkpoint(url, tmp_path / "back", options=place.options, logs=tmp_path / "logs")


def test_a_store_that_is_not_there_is_not_made_by_asking(tmp_path: Path) -> None:
    with pytest.raises(et.StorageError, match="no such folder"):
        fetch(tmp_path / "typo", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


async def test_the_manifest_comes_last_and_checkpoints_in_their_order(
    trained: Path, door: s3_server.Door
) -> None:
    said = await uploaded(at(door).uploader(), trained, "step-00000004", "step-00000002")
    assert [event.step for event in said] == [4, 2]
    sent = [path.removeprefix("runs/one/") for path in door.put()]
    assert sent[0] == "run.jsonl"
    rest = [path.split("/", 2)[1:] for path in sent[1:]]
    assert sorted(name for name, _ in rest) == [name for name, _ in reversed(rest)]
    last = [
        max(i for i, (name, _) in enumerate(rest) if name == each)
        for each in ("step-00000004", "step-00000002")
    ]
    assert [rest[i][1] for i in last] == ["manifest.json"] * 2
    assert len(set(map(tuple, rest))) == len(rest)


async def test_the_manifest_tells_step_run_version_and_each_file(trained: Path, tmp_path: Path) -> None:
    await uploaded(Place(str(tmp_path / "store")).uploader(), trained, "step-00000004")
    manifest = UploadManifest.parse((tmp_path / "store/checkpoints/step-00000004/manifest.json").read_bytes())
    assert manifest is not None
    folder = trained / "checkpoints" / "step-00000004"
    facts = json.loads((folder / "eventtrain.json").read_text())
    assert (manifest.step, manifest.run_id, manifest.tag) == (4, facts["run_id"], facts["tag"])
    assert manifest.time == datetime.fromisoformat(facts["time"])
    assert (manifest.eventtrain, manifest.resumable) == (et.__version__, True)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert {file.path: file.size_bytes for file in manifest.files} == files


async def test_several_files_travel_at_once_and_no_more_than_that(
    trained: Path, door: s3_server.Door
) -> None:
    door.hold.clear()
    door.held = lambda method, path: method == "PUT" and "arrays" in path
    harness = Harness(at(door).uploader(max_concurrency=3), trained)
    await harness.start()
    await harness.commit(trained / "checkpoints" / "step-00000004")
    await anyio.to_thread.run_sync(door.wait_for, 3)
    door.hold.set()
    await harness.uploader.stop()
    assert harness.kinds() == ["checkpoint_uploaded"]
    assert door.most_at_once == 3


def big_checkpoint(tmp_path: Path) -> Path:
    """A run's directory with one checkpoint, one file of which travels in parts."""
    state = {"w": jnp.arange(5_000_000, dtype=jnp.float32) * jnp.float32(1.1)}
    trainer = et.Trainer(
        lambda state, batch: (state, {"loss": batch}),
        state,
        subscribers=[subs.Checkpointer("checkpoints")],
        run_dir=tmp_path / "big",
    )
    trainer.fit([np.float32(0)], epochs=1)
    return tmp_path / "big"


def test_a_large_file_travels_in_parts_and_is_not_read_back(tmp_path: Path, door: s3_server.Door) -> None:
    run_dir = big_checkpoint(tmp_path)
    said = anyio.run(uploaded, at(door).uploader(), run_dir, "step-00000001")
    assert [event.kind for event in said] == ["checkpoint_uploaded"]
    assert max(door.put().count(path) for path in door.put()) >= 2
    read = [path for method, path in door.requests if method == "GET"]
    assert [path for path in read if not path.endswith("manifest.json")] == []
    back = at(door).download(tmp_path / "back")
    assert same_files(back, run_dir / "checkpoints" / "step-00000001")


# --- what goes wrong ------------------------------------------------------------------------------------------


def for_the_first(number: int, status: int) -> Callable[[str, str], int | None]:
    """Refuse so many requests of each method and path."""
    left: dict[tuple[str, str], int] = {}

    def refuse(method: str, path: str) -> int | None:
        left[method, path] = left.get((method, path), number) - 1
        return status if left[method, path] >= 0 else None

    return refuse


def test_a_busy_server_is_asked_again(trained: Path, door: s3_server.Door, tmp_path: Path) -> None:
    door.refuse = for_the_first(1, 503)
    said = anyio.run(uploaded, at(door).uploader(), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_uploaded"]
    door.refuse = for_the_first(1, 500)
    back = at(door).download(tmp_path / "back")
    assert same_files(back, trained / "checkpoints" / "step-00000004")


async def test_a_server_that_fails_for_longer_than_a_request_is_asked_again_later(
    trained: Path, door: s3_server.Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_retries(monkeypatch)
    refuse = for_the_first(2, 500)
    door.refuse = lambda method, path: refuse(method, path) if method == "PUT" else None
    said = await uploaded(at(door).uploader(), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_uploaded"]


def without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore's own are off, so that ours are counted."""
    monkeypatch.setitem(object_store.REQUEST_RETRIES, "max_retries", 0)


@pytest.mark.parametrize(
    ("status", "tries", "words"),
    [
        (403, 1, "HTTP status 403 (attempt 1)"),
        (307, 1, "not followed"),
        (500, 3, "HTTP status 500 (attempt 3)"),
    ],
)
def test_what_a_server_refuses_is_said_and_nothing_looks_whole(
    trained: Path, door: s3_server.Door, monkeypatch: pytest.MonkeyPatch, status: int, tries: int, words: str
) -> None:
    without_retries(monkeypatch)
    door.refuse = lambda method, path: status if path.endswith("_METADATA") else None
    said = anyio.run(uploaded, at(door).uploader(max_concurrency=1), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_upload_failed"]
    assert words in said[0].error
    assert (said[0].url, said[0].step) == (at(door).url, 4)
    refused = [path for path in door.put() if path.endswith("_METADATA")]
    assert len(refused) == tries * len(set(refused))
    assert not [path for path in door.put() if path.endswith("manifest.json")]


def test_a_bucket_that_is_not_there_is_named_as_the_reason(trained: Path, door: s3_server.Door) -> None:
    place = Place("s3://another-bucket/x", door.options())
    said = anyio.run(uploaded, place.uploader(logs=()), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_upload_failed"]
    assert "NoSuchBucket" in said[0].error


def test_a_dead_server_costs_neither_the_run_nor_its_checkpoints(tmp_path: Path, caplog: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = Place("s3://bucket/x", {"endpoint": f"http://127.0.0.1:{port}", "allow_http": True, **KEYS})
    seen = fit(tmp_path, place.uploader(retries=0), steps=4)
    failed = [event for event in seen if isinstance(event, et.CheckpointUploadFailed)]
    assert [(event.step, "the connection was refused" in event.error) for event in failed] == [
        (2, True),
        (4, True),
    ]
    logs = [event for event in seen if isinstance(event, et.SubscriberFailed)]
    assert {(event.subscriber, "run.jsonl was not copied" in event.error) for event in logs} == {
        ("Uploader", True)
    }
    assert [record.levelno for record in caplog.records if "was not copied" in record.getMessage()]
    assert len(et.load_state(tmp_path / "checkpoints" / "step-00000004")) == 2


KEYS = {"access_key_id": "someone", "secret_access_key": "s3cr3t-key"}


def test_a_slow_store_delays_no_step(tmp_path: Path, door: s3_server.Door) -> None:
    door.hold.clear()
    there_at_the_last_step: list[list[str]] = []
    uploader = at(door).uploader()
    names = [f"step-{step:08d}" for step in (100, 200)]

    class Release(et.Subscriber):
        lag = 0
        every = 200

        async def on_step_completed(self, event: et.StepCompleted) -> None:
            await anyio.to_thread.run_sync(door.wait_for, 1)
            there_at_the_last_step.append([path for path in door.put() if "manifest.json" in path])
            door.hold.set()

    seen = fit(tmp_path, uploader, Release(), steps=200, every=100)
    assert there_at_the_last_step == [[]]
    there = [event for event in seen if isinstance(event, et.CheckpointUploaded)]
    assert [Path(event.path).name for event in there] == names


def test_what_arrives_changed_is_sent_again(trained: Path, door: s3_server.Door, tmp_path: Path) -> None:
    changed: set[str] = set()

    def change(method: str, path: str, body: bytes) -> bytes:
        if method != "PUT" or path in changed:
            return body
        changed.add(path)
        return bytes([body[0] ^ 1]) + body[1:]

    door.change = change
    said = anyio.run(uploaded, at(door).uploader(), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_uploaded"]
    assert len(door.put()) == 2 * len(changed)
    back = at(door).download(tmp_path / "back")
    assert same_files(back, trained / "checkpoints" / "step-00000004")


@pytest.mark.parametrize("harm", [lambda body: bytes([body[0] ^ 1]) + body[1:], lambda body: body[:-1]])
def test_what_always_arrives_changed_is_never_said_to_be_there(
    trained: Path, door: s3_server.Door, harm: Callable[[bytes], bytes]
) -> None:
    door.change = lambda method, path, body: harm(body) if path.endswith("_METADATA") and body else body
    said = anyio.run(uploaded, at(door).uploader(), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_upload_failed"]
    assert "what arrived is not what was sent (attempt 3)" in said[0].error
    assert not [path for path in door.put() if path.endswith("manifest.json")]


async def test_the_end_of_a_run_waits_as_long_as_it_was_told_and_says_what_is_missing(
    trained: Path, door: s3_server.Door
) -> None:
    door.hold.clear()
    harness = Harness(at(door).uploader(finish_timeout_s=0.1), trained)
    await harness.start()
    for step in (2, 4):
        await harness.commit(trained / "checkpoints" / f"step-0000000{step}", step, "best")
    with anyio.fail_after(10), pytest.raises(et.SubscriberError, match=r"within 0\.1 s"):
        await harness.uploader.stop()
    assert [(event.kind, event.step, event.tag) for event in harness.said] == [
        ("checkpoint_upload_failed", 2, "best"),
        ("checkpoint_upload_failed", 4, "best"),
    ]
    door.hold.set()
    await anyio.to_thread.run_sync(ended, "eventtrain Uploader")
    assert len(harness.said) == 2
    assert not [path for path in door.put() if path.endswith("manifest.json")]


def ended(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(20)
            assert not thread.is_alive()


def test_the_trainers_own_limit_ends_the_wait_too_and_what_is_missing_is_said(
    tmp_path: Path, door: s3_server.Door
) -> None:
    door.hold.clear()
    seen = fit(tmp_path, at(door).uploader(), drain_timeout_s=2.0)
    failed = [event for event in seen if isinstance(event, et.CheckpointUploadFailed)]
    assert [event.step for event in failed] == [2, 4]
    assert [event.event_kind for event in seen if isinstance(event, et.SubscriberFailed)] == ["stop"]
    door.hold.set()
    ended("eventtrain Uploader")


async def test_a_checkpoint_that_is_deleted_while_it_is_copied_arrives_whole(
    trained: Path, door: s3_server.Door, tmp_path: Path, run_dir: Path
) -> None:
    door.hold.clear()
    door.held = lambda method, path: method == "PUT" and "arrays" in path
    harness = Harness(at(door).uploader(max_concurrency=1), trained)
    await harness.start()
    await harness.commit(trained / "checkpoints" / "step-00000004")
    await anyio.to_thread.run_sync(door.wait_for, 1)
    shutil.rmtree(trained / "checkpoints")
    door.hold.set()
    await harness.uploader.stop()
    assert harness.kinds() == ["checkpoint_uploaded"]
    back = await anyio.to_thread.run_sync(at(door).download, tmp_path / "back")
    assert same_files(back, run_dir / "checkpoints" / "step-00000004")


async def test_a_checkpoint_that_is_deleted_before_its_turn_is_told_with_the_remedy(
    trained: Path, tmp_path: Path
) -> None:
    shutil.rmtree(trained / "checkpoints" / "step-00000002")
    said = await uploaded(
        Place(str(tmp_path / "store")).uploader(), trained, "step-00000002", "step-00000004"
    )
    assert [event.kind for event in said] == ["checkpoint_upload_failed", "checkpoint_uploaded"]
    assert "max_to_keep" in said[0].error


async def test_half_a_checkpoint_is_never_copied_as_a_whole_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted between the listing of its files and their opening; another one of its name takes its place."""
    folder = trained / "checkpoints" / "step-00000004"
    listing = uploading.files_in

    def deleted_meanwhile(path: Path) -> list[Path]:
        found = listing(path)
        kept = path.with_name("kept")
        path.rename(kept)
        shutil.copytree(kept, path)
        return found[1:]

    monkeypatch.setattr(uploading, "files_in", deleted_meanwhile)
    said = await uploaded(Place(str(tmp_path / "store")).uploader(), trained, folder.name)
    assert [event.kind for event in said] == ["checkpoint_upload_failed"]


async def test_a_folder_that_cannot_be_made_is_said(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = await uploaded(Place(str(tmp_path / "file" / "store")).uploader(logs=()), trained, "step-00000004")
    assert [event.kind for event in said] == ["checkpoint_upload_failed"]


def test_a_program_ends_though_its_store_hangs(tmp_path: Path, door: s3_server.Door, trained: Path) -> None:
    door.hold.clear()
    door.held = lambda method, path: method == "PUT" and "arrays" in path
    script = f"""
import json, sys
import anyio
from pathlib import Path
import eventtrain as et
from eventtrain import subscribers as subs

async def main():
    options = json.loads({json.dumps(json.dumps(door.options()))})
    uploader = subs.Uploader({at(door).url!r}, options=options, logs=(), finish_timeout_s=1.5)
    await uploader.start(et.RunContext("run", Path({str(trained)!r}), None, lambda event: print(event.kind)))
    path = {str(trained / "checkpoints" / "step-00000004")!r}
    await uploader.on_checkpoint_committed(et.CheckpointCommitted(path=path, size_bytes=0, duration_s=0))
    try:
        await uploader.stop()
    except et.SubscriberError:
        print("told")

anyio.run(main)
"""
    env = {**os.environ, "PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "checkpoint_upload_failed\ntold\n"), done.stderr


# --- again ----------------------------------------------------------------------------------------------------


async def test_a_run_that_resumes_copies_what_is_not_there_and_nothing_twice(
    trained: Path, door: s3_server.Door
) -> None:
    await uploaded(at(door).uploader(), trained, "step-00000002")
    before = len(door.put())
    harness = Harness(at(door).uploader(logs=()), trained)
    await harness.start()
    path = str(trained / "checkpoints" / "step-00000004")
    await harness.uploader.on_run_resumed(et.RunResumed(epoch=0, batch=4, path=path))
    await harness.uploader.stop()
    assert [(event.kind, event.step) for event in harness.said] == [("checkpoint_uploaded", 4)]
    assert {path.split("/")[3] for path in door.put()[before:]} == {"step-00000004"}


def test_another_checkpoint_of_the_same_name_is_not_touched(
    trained: Path, place: Place, tmp_path: Path
) -> None:
    anyio.run(uploaded, place.uploader(), trained, "step-00000004")
    mine = trained / "checkpoints" / "step-00000004"
    manifest = read_manifest(mine).model_copy(update={"time": datetime(2030, 1, 1, tzinfo=UTC)})
    (mine / "eventtrain.json").write_text(manifest.to_text())
    (said,) = anyio.run(uploaded, place.uploader(), trained, "step-00000004")
    assert said.url.endswith("checkpoints/step-00000004-2")
    for name in ("step-00000004", "step-00000004-2"):
        path = place.download(tmp_path / "back", f"checkpoints/{name}")
        assert path.name == name
    assert place.download(tmp_path / "newest").name == "step-00000004-2"


def test_a_log_goes_on_where_it_was_and_one_of_another_machine_is_kept(
    trained: Path, place: Place, tmp_path: Path
) -> None:
    log = trained / "run.jsonl"
    anyio.run(uploaded, place.uploader(), trained)
    with log.open("a") as file:
        file.write("{}\n")
    anyio.run(uploaded, place.uploader(), trained)
    assert names(place) == ["run.jsonl"]
    first = log.read_bytes()
    log.write_text("another machine's\n")
    anyio.run(uploaded, place.uploader(), trained)
    assert names(place) == ["run.jsonl", "run.jsonl.before-1"]
    store = ObjectStore("test", place.url, place.options, timeout_s=10)
    store.open()
    assert (store.read("run.jsonl"), store.read("run.jsonl.before-1")) == (b"another machine's\n", first)


def names(place: Place) -> list[str]:
    store = ObjectStore("test", place.url, place.options, timeout_s=10)
    store.open(make=False)
    return sorted(store.names())


async def test_a_log_that_did_not_change_is_not_sent_again(trained: Path, door: s3_server.Door) -> None:
    await uploaded(at(door).uploader(), trained, "step-00000002", "step-00000004")
    assert [path for path in door.put() if path.endswith("run.jsonl")] == ["runs/one/run.jsonl"]


async def test_the_run_id_may_stand_in_the_url(trained: Path, tmp_path: Path) -> None:
    (said,) = await uploaded(Place(str(tmp_path / "{run_id}")).uploader(), trained, "step-00000004")
    assert said.url == str(tmp_path / "run-1" / "checkpoints" / "step-00000004")


# --- downloads that must not be trusted -----------------------------------------------------------------------


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A folder with one uploaded checkpoint."""
    anyio.run(uploaded, Place(str(tmp_path / "store")).uploader(logs=()), trained, "step-00000004")
    return tmp_path / "store"


def fetch(store: Path, directory: Path, which: str | int = "newest") -> Path:
    return Place(str(store)).download(directory, which)


def edit(store: Path, **values: Any) -> None:
    """Change what the manifest says."""
    path = store / "checkpoints" / "step-00000004" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def files_of(store: Path) -> list[dict[str, Any]]:
    return json.loads((store / "checkpoints" / "step-00000004" / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
def test_what_is_not_what_was_uploaded_never_gets_its_name(store: Path, tmp_path: Path, harm: str) -> None:
    file = store / "checkpoints" / "step-00000004" / "arrays" / "_METADATA"
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if harm == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(et.StorageError, match="_METADATA"):
        fetch(store, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/outside",
        "a/../../outside",
        "",
        "a//b",
        "./a",
        "a/",
        "..\\outside",
        "C:/outside",
        "a\nb",
        "a\0b",
    ],
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(store: Path, tmp_path: Path, path: str) -> None:
    edit(store, files=[*files_of(store), {"path": path, "size_bytes": 0, "sha256": "0" * 64}])
    with pytest.raises(et.SnapshotError, match="There is no checkpoint"):
        fetch(store, tmp_path / "deep" / "back")
    assert not (tmp_path / "deep").exists()


@given(st.text(alphabet="ab./\\:\0C~ ", max_size=12) | st.text(max_size=6))
def test_every_path_that_is_taken_leads_below_the_folder(path: str) -> None:
    try:
        file = UploadedFile(path=path, size_bytes=0, sha256="0" * 64)
    except ValidationError:
        return
    base = Path("some") / "folder"
    assert os.path.normpath(base / file.path).startswith(f"{base}{os.sep}")
    assert os.path.normpath(base / file.path) == str(base / file.path)


@pytest.mark.parametrize(
    "values",
    [
        {"format": "something else"},
        {"schema_version": 2},
        {"step": -1},
        {"extra": 1},
        {"files": []},
        {"files": [{"path": "eventtrain.json", "size_bytes": 1, "sha256": "0" * 63}]},
        {"files": [{"path": "eventtrain.json", "size_bytes": 1, "sha256": "0" * 64}] * 2},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "0" * 64}]},
    ],
)
def test_a_manifest_that_is_not_valid_is_no_checkpoint(
    store: Path, tmp_path: Path, values: Any, caplog: Any
) -> None:
    edit(store, **values)
    with pytest.raises(et.SnapshotError, match="found: none"):
        fetch(store, tmp_path / "back")
    assert ("left out" in caplog.text) == ("format" not in values)


def test_what_has_no_manifest_does_not_exist(store: Path, tmp_path: Path) -> None:
    (store / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    with pytest.raises(et.SnapshotError, match="There is no checkpoint 'newest'"):
        fetch(store, tmp_path / "back")


def test_a_checkpoint_is_chosen_by_step_tag_name_or_path(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    fit(tmp_path / "run", place.uploader(), steps=5)
    choices = {2: 2, "step-4": 4, "step-00000002": 2, "checkpoints/step-00000004": 4, "newest": 5}
    for number, (which, step) in enumerate(choices.items()):
        path = place.download(tmp_path / f"back-{number}", which)
        assert json.loads((path / "eventtrain.json").read_text())["step"] == step
    with pytest.raises(
        et.SnapshotError, match=r"no checkpoint 3 at .*checkpoints/step-00000002, checkpoints/step"
    ):
        place.download(tmp_path / "back", 3)


def test_a_checkpoint_that_is_there_is_verified_and_another_one_is_not_touched(
    store: Path, tmp_path: Path
) -> None:
    path = fetch(store, tmp_path / "back")
    assert fetch(store, tmp_path / "back") == path
    (path / "arrays" / "_METADATA").write_text("mine")
    with pytest.raises(et.SnapshotError, match="differs"):
        fetch(store, tmp_path / "back")
    assert (path / "arrays" / "_METADATA").read_text() == "mine"


def test_the_command_line_fetches_a_checkpoint_and_the_logs(
    trained: Path, door: s3_server.Door, tmp_path: Path
) -> None:
    anyio.run(uploaded, at(door).uploader(), trained, "step-00000002", "step-00000004")
    options = [f"--option={key}={str(value).lower()}" for key, value in door.options().items()]
    call = [
        "checkpoints",
        "pull",
        at(door).url,
        str(tmp_path / "back"),
        "2",
        "--logs",
        str(tmp_path),
        *options,
    ]
    done = CliRunner().invoke(cli.app, call)
    assert (done.exit_code, Path(done.output.strip())) == (0, tmp_path / "back" / "step-00000002")
    assert (tmp_path / "run.jsonl").read_bytes() == (trained / "run.jsonl").read_bytes()
    call[4] = "99"
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 2
    assert "no checkpoint 99" in done.output


# --- arguments, secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{SECRET}:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"s3://bucket/x?key={SECRET}",
        f"s3://bucket/x#{SECRET}",
        f"https://host/{SECRET}",
        f"{SECRET}/relative",
        f"s3://[{SECRET}",
        f"file://{SECRET}/x",
        f"memory:///{SECRET}",
        "s3:///x",
        "",
    ],
)
def test_what_is_no_place_is_refused_without_quoting_it(url: str, tmp_path: Path) -> None:
    for make in (lambda: subs.Uploader(url), lambda: subs.download_checkpoint(url, tmp_path)):
        with pytest.raises(et.ConfigurationError) as caught:
            make()
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "value", [{"nonsense": SECRET}, {"connect_timeout": SECRET}, {"conditional_put": SECRET}]
)
def test_options_that_cannot_work_are_refused_without_quoting_them(value: dict[str, str]) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        subs.Uploader("s3://bucket/x", options=value)
    assert SECRET not in "".join(map(str, (caught.value, caught.value.__cause__)))
    assert ("'nonsense'" in str(caught.value)) == ("nonsense" in value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurrency": 0},
        {"retries": -1},
        {"retry_delay_s": -1},
        {"timeout_s": 0},
        {"finish_timeout_s": float("nan")},
        {"logs": ("../*",)},
        {"logs": ("/etc/*",)},
        {"logs": ("",)},
        {"options": {"region": "x"}},
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(et.ConfigurationError, match=f"Uploader.{next(iter(wrong))}="):
        subs.Uploader(str(tmp_path), **wrong)


@pytest.mark.parametrize("status", [None, 302, 400, 403, 404, 500, 503])
def test_the_secret_is_shown_nowhere(
    tmp_path: Path,
    door: s3_server.Door,
    status: int | None,
    caplog: Any,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(s3_server, "ECHO", SECRET)
    door.refuse = lambda method, path: status
    options = door.options(
        access_key_id=SECRET, secret_access_key=SECRET, session_token=SECRET, user_agent=SECRET
    )
    place = Place(f"s3://{door.bucket}/x", options)
    uploader = place.uploader(retries=1)
    run_dir = tmp_path / "run"
    seen = fit(run_dir, uploader)
    kinds = {event.kind for event in seen} - {"checkpoint_committed"}
    assert kinds == (
        {"checkpoint_uploaded"} if status is None else {"checkpoint_upload_failed", "subscriber_failed"}
    )
    shown = [repr(uploader), str(vars(uploader)), caplog.text, *capfd.readouterr()]
    try:
        place.download(tmp_path / "back", retries=1)
    except et.EventTrainError as error:
        shown += [repr(error), str(error), repr(error.__cause__)]
    shown += [event.model_dump_json() for event in seen]
    shown += [record.exc_text or "" for record in caplog.records]
    shown += [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


def test_a_file_describes_an_uploader_and_its_keys_stay_secret(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        [[subscribers]]
        type = "uploader"
        url = "s3://bucket/runs"
        logs = ["*.jsonl", "*.csv"]
        options = {{access_key_id = "me", secret_access_key = "{SECRET}", allow_http = true, region = "eu-central-1"}}
        """
    )
    (loaded,) = et.load_subscribers(path)
    assert isinstance(loaded, subs.Uploader)
    model = et.subscriber_config(subs.Uploader)
    config = model.model_validate_json(
        json.dumps({"type": "uploader", "url": "s3://b/x", "options": {"token": SECRET, "allow_http": True}})
    )
    assert SECRET not in repr(config)
    path.write_text(path.read_text().replace('"s3:', '"s4:').replace("logs", "lags"))
    with pytest.raises(et.ConfigurationError) as caught:
        et.load_subscribers(path)
    assert SECRET not in str(caught.value)


def test_without_obstore_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'obstore'"), "upload", "Uploader")
    monkeypatch.setattr(object_store, "obstore", missing)
    with pytest.raises(et.ConfigurationError, match=r"No module named 'obstore'.*'eventtrain\[upload\]'"):
        subs.Uploader(str(tmp_path))
