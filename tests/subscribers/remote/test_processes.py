"""Uploads of a run of several processes: each sends its own files, and what is said to be there is there, whole.

Threads stand for processes, and a fabricated checkpoint for one that they have written.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.errors import PeerLost
from eventtrain.loop.agreement.channel import Channel
from eventtrain.subscribers.checkpointing.directory import files_in
from eventtrain.subscribers.remote.upload_manifest import UploadManifest
from tests.support.key_values import KeyValues

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'eventtrain[upload]'")

COUNT = 3
QUICK: dict[str, Any] = {"retries": 0, "retry_delay_s": 0.01}


def step_fn(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with checkpoints of the steps 1 and 2, to which the files of two more processes were added."""
    path = tmp_path_factory.mktemp("trained")
    trainer = et.Trainer(
        step_fn,
        {"w": jnp.zeros(3)},
        subscribers=[subs.Checkpointer("checkpoints", every=1), subs.JSONLLogger("run.jsonl")],
        run_dir=path,
    )
    trainer.fit([np.float32(n) for n in range(2)], epochs=1)
    for checkpoint in (path / "checkpoints").iterdir():
        for index in (1, 2):
            folder = checkpoint / f"arrays/ocdbt.process_{index}/d"
            folder.mkdir(parents=True)
            (folder / "shard").write_bytes(bytes([index]) * 1000)
    return path


class Exchange(Channel):
    """The keys of one run. A wait for them raises once a process is ``lost``."""

    lost = False

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        found = super().wait_for(key, 0.05)
        if found is None and self.lost:
            raise PeerLost("Process 2 of the run is lost: it was killed", 2)
        return found


class Processes:
    """An uploader in each process."""

    def __init__(self, run_dir: Path, urls: Sequence[Path], **options: Any) -> None:
        self.run_dir = run_dir
        self.values = KeyValues()
        self.exchange = Exchange(self.values, "exchange/")
        self.said: list[list[Any]] = [[] for _ in urls]
        self.uploaders = [subs.Uploader(str(url), **{**QUICK, **options}) for url in urls]

    async def start(self, *indices: int) -> None:
        control: Any = None
        for index in indices or range(COUNT):
            await self.uploaders[index].start(
                et.RunContext(
                    "run-1",
                    self.run_dir,
                    control,
                    self.said[index].append,
                    process_index=index,
                    process_count=COUNT,
                    exchange=self.exchange,
                )
            )

    async def commit(self, *steps: int) -> None:
        for step in steps:
            path = str(self.run_dir / "checkpoints" / f"step-{step:08d}")
            event = et.CheckpointCommitted(path=path, step=step, tag=None, size_bytes=0, duration_s=0)
            for uploader in self.uploaders:
                await uploader.on_checkpoint_committed(event.model_copy())

    async def stop(self, *indices: int) -> None:
        async with anyio.create_task_group() as group:
            for index in indices or range(COUNT):
                group.start_soon(self.uploaders[index].stop)


class Sent:
    """Which thread has sent what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by: list[tuple[str, str]] = []
        put = subs_store().put

        def recorded(store: Any, path: str, *given: Any) -> str:
            self.by.append((store.url, path))
            return put(store, path, *given)

        monkeypatch.setattr(subs_store(), "put", recorded)


def subs_store() -> Any:
    from eventtrain.subscribers.remote.object_store import ObjectStore

    return ObjectStore


async def test_each_process_sends_its_own_files_and_process_0_the_manifest_last(
    run_dir: Path, stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent(monkeypatch)
    processes = Processes(run_dir, stores)
    await processes.start()
    await processes.commit(1, 2)
    await processes.stop()
    assert [event.kind for event in processes.said[0]] == ["checkpoint_uploaded"] * 2
    assert processes.said[1:] == [[], []]
    assert len(processes.values.values) == 2  # the first and the last message
    for step in (1, 2):
        checkpoint = f"checkpoints/step-{step:08d}"
        here = [
            (Path(url).name, path.removeprefix(f"{checkpoint}/"))
            for url, path in sent.by
            if path.startswith(checkpoint)
        ]
        for index in (1, 2):
            assert [path for name, path in here if name == f"store-{index}"] == [
                f"arrays/ocdbt.process_{index}/d/shard"
            ]
        assert here[-1] == ("store", "manifest.json")
        assert len(here) == len(set(here))
        await anyio.to_thread.run_sync(came_back, run_dir / checkpoint, stores[0], tmp_path / "back")


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    """One folder under the name that each process has for it."""
    (tmp_path / "store").mkdir()
    for index in (1, 2):
        (tmp_path / f"store-{index}").symlink_to(tmp_path / "store")
    return [tmp_path / name for name in ("store", "store-1", "store-2")]


def came_back(checkpoint: Path, store: Path, folder: Path) -> None:
    """Asserts that a downloaded checkpoint is the one that was uploaded."""
    back = subs.download_checkpoint(str(store), folder, checkpoint.name)
    files = [file.relative_to(checkpoint) for file in files_in(checkpoint)]
    assert len(files) > 5
    for file in files:
        assert (back / file).read_bytes() == (checkpoint / file).read_bytes()


async def test_a_store_that_is_not_the_same_for_all_processes_fails_the_upload_by_name(
    run_dir: Path, tmp_path: Path
) -> None:
    processes = Processes(run_dir, [tmp_path / name for name in ("store", "store", "elsewhere")])
    await processes.start()
    await processes.commit(1)
    await processes.stop()
    (failed,) = processes.said[0]
    assert failed.kind == "checkpoint_upload_failed"
    assert "arrays/ocdbt.process_2/d/shard, which another process has sent, is not at " in failed.error
    assert "All processes need the same store" in failed.error
    assert not list((tmp_path / "store").rglob("manifest.json"))


async def test_a_part_that_cannot_be_sent_fails_the_upload_with_its_process_and_not_the_next_one(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failing = subs_store().put, ["step-00000001/arrays/ocdbt.process_2"]

    def fails_once(store: Any, path: str, *given: Any) -> str:
        if any(part in path for part in failing):
            raise et.StorageError(f"{path}: HTTP status 403 AccessDenied")
        return put(store, path, *given)

    monkeypatch.setattr(subs_store(), "put", fails_once)
    processes = Processes(run_dir, [tmp_path / "store"] * COUNT)
    await processes.start()
    await processes.commit(1, 2)
    await processes.stop()
    failed, uploaded = processes.said[0]
    assert (failed.kind, failed.step) == ("checkpoint_upload_failed", 1)
    assert "could not be sent by process 2: " in failed.error
    assert "AccessDenied" in failed.error
    assert (uploaded.kind, uploaded.step) == ("checkpoint_uploaded", 2)
    (manifest,) = (tmp_path / "store").rglob("manifest.json")
    assert UploadManifest.parse(manifest.read_bytes()) is not None
    assert manifest.parent.name == "step-00000002"


async def test_a_file_that_its_process_does_not_see_is_not_left_out(run_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run_dir, tmp_path / "other")
    shutil.rmtree(other / "checkpoints/step-00000001/arrays/ocdbt.process_1")
    processes = Processes(run_dir, [tmp_path / "store"] * COUNT)
    await processes.start(0, 2)
    processes.run_dir = Path(other)
    await processes.start(1)
    processes.run_dir = run_dir
    await processes.commit(1)
    await processes.stop()
    (failed,) = processes.said[0]
    assert failed.error == "arrays/ocdbt.process_1/d/shard was not sent by the process that has written it"


async def test_the_loss_of_a_process_ends_the_wait_for_its_part(run_dir: Path, tmp_path: Path) -> None:
    processes = Processes(run_dir, [tmp_path / "store"] * COUNT)
    await processes.start(0, 1)
    await processes.commit(1)
    threading.Timer(0.3, lambda: setattr(processes.exchange, "lost", True)).start()
    await processes.stop(0, 1)
    (failed,) = processes.said[0]
    assert failed.error == "Process 2 of the run is lost: it was killed"


async def test_the_end_of_a_run_waits_no_longer_than_told_for_the_parts_of_others(
    run_dir: Path, tmp_path: Path
) -> None:
    processes = Processes(run_dir, [tmp_path / "store"] * COUNT, finish_timeout_s=0.3)
    await processes.start(0)
    await processes.commit(1)
    with pytest.raises(et.SubscriberError, match="Not everything was copied"):
        await processes.uploaders[0].stop()
    (failed,) = processes.said[0]
    assert failed.kind == "checkpoint_upload_failed"


async def test_a_process_does_not_wait_for_an_uploader_that_process_0_has_not_started(
    run_dir: Path, tmp_path: Path
) -> None:
    processes = Processes(run_dir, [tmp_path / "store"] * COUNT)
    await processes.start(1)
    with anyio.fail_after(20):
        await processes.stop(1)
