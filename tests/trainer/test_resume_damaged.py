"""Checkpoints that cannot be read, or come from elsewhere: refused or left out by name, never taken for another run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.checkpointing.manifest import MANIFEST, sealed
from tests.support.models import batches, make_trainer, record


class Early(et.Subscriber):
    """A decider that sends nothing."""

    lag = 4

    async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
        pass


def new_trainer(tmp_path: Path) -> et.Trainer:
    checkpointer = subs.Checkpointer("ck", every=2, max_to_keep=None)
    return make_trainer(tmp_path, subscribers=[checkpointer, subs.JSONLLogger("e.jsonl"), Early()])


def broken_off(tmp_path: Path) -> list[Path]:
    """Returns the checkpoints of the steps 2, 4 and 5 of a run whose data failed."""

    def data(epoch: int) -> Iterator[Any]:
        yield from batches(5)
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        new_trainer(tmp_path).fit(data, epochs=2)
    return sorted((tmp_path / "run/ck").iterdir())


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("")


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_arrays(folder: Path) -> None:
    next((folder / "arrays").rglob("manifest.ocdbt")).write_bytes(b"")


def lose_arrays(folder: Path) -> None:
    (folder / "arrays").rename(folder.parent.parent / f"{folder.name} arrays")


DAMAGES = [empty_manifest, lose_manifest, cut_arrays, lose_arrays]


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_no_checkpoint_can_be_read_nothing_is_trained_and_no_log_is_cut(
    tmp_path: Path, damage: Any
) -> None:
    folders = broken_off(tmp_path)
    for folder in folders:
        damage(folder)
    log = (tmp_path / "run/e.jsonl").read_bytes()
    trainer = new_trainer(tmp_path)
    with pytest.raises(et.SnapshotError, match=r"None of the checkpoints in .*ck can be read") as caught:
        trainer.fit(batches(8), epochs=2, resume=True)
    assert all(folder.name in str(caught.value) for folder in folders)
    assert trainer.step == 0
    assert (tmp_path / "run/e.jsonl").read_bytes() == log
    assert trainer.fit(batches(8), epochs=1).step == 8  # on request


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_newest_cannot_be_read_the_run_resumes_from_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    damage(broken_off(tmp_path)[-1])
    trainer = new_trainer(tmp_path)
    seen = record(trainer, et.RunResumed)
    assert trainer.fit(batches(8), epochs=2, resume=True).step == 16
    assert [event.step for event in seen] == [4]
    assert "The run resumes from" in caplog.text
    assert "step-00000004; checkpoints that cannot be read are left out: " in caplog.text
    assert "step-00000005" in caplog.text


def order(kind: str, subscriber: str) -> dict[str, Any]:
    command = {"kind": kind, "due": 6}
    return {"command": command, "cause_step": 5, "cause_seq": 1, "subscriber": subscriber, "issue": 0}


def with_facts(folder: Path, part: str, changes: dict[str, Any]) -> None:
    """Changes a manifest as somebody would who knows the format."""
    data = json.loads((folder / MANIFEST).read_text())
    data["facts"][part].update(changes)
    (folder / MANIFEST).write_text(json.dumps(sealed(data)))


@pytest.mark.parametrize("kind", ["stop", "pause"])
def test_a_command_of_no_subscriber_neither_ends_nor_holds_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with_facts(broken_off(tmp_path)[-1], "loop", {"orders": [order(kind, "nobody")]})
    assert new_trainer(tmp_path).fit(batches(8), epochs=2, resume=True).step == 16
    assert f"A {kind} that nobody sent before the checkpoint is left out" in caplog.text


def test_a_pending_stop_is_said_when_the_run_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_facts(broken_off(tmp_path)[-1], "loop", {"orders": [order("stop", "Early")]})
    assert new_trainer(tmp_path).fit(batches(8), epochs=2, resume=True).step == 6
    assert "The run resumes with a stop that Early sent before the checkpoint, due at step 6" in caplog.text


def test_events_that_a_subscription_does_not_take_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event = et.EpochStarted(step=5, epoch=0, hyperparams={}, seq=1).model_dump(mode="json")
    folder = broken_off(tmp_path)[-1]
    share = {"kind": "saved_share", "unhandled": [event], "decided_on": [True]}
    with_facts(folder, "shares", {"Early": share})
    trainer = new_trainer(tmp_path)
    failed = record(trainer, et.SubscriberFailed)
    assert trainer.fit(batches(8), epochs=2, resume=True).step == 16
    assert not failed
    assert "1 events that Early had not handled at the checkpoint are left out" in caplog.text


@pytest.mark.parametrize("changes", [{"step": 0}, {"epoch": 5}, {"data": {"x": 1}}, {"orders": [{}]}])
def test_a_record_that_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    folders = broken_off(tmp_path)
    for folder in folders:
        with_facts(folder, "loop", changes)
    with pytest.raises(et.SnapshotError, match="None of the checkpoints"):
        new_trainer(tmp_path).fit(batches(8), epochs=2, resume=True)
    with pytest.raises(et.SnapshotError, match=r"Cannot be read: .*is damaged"):
        new_trainer(tmp_path).fit(batches(8), epochs=2, resume=5)
