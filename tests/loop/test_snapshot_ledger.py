from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.device.pinned_memory import PinnedPool
from eventtrain.device.snapshot import Snapshot
from tests.support import saved_in_memory
from tests.support.accelerator import as_on_an_accelerator


class Checkpointer2(subs.Checkpointer):
    """A second one, under another name."""


class Reading(et.Subscriber):
    events = et.RunStarted

    async def start(self, run: et.RunContext) -> None:
        run.read_snapshots()

    async def handle(self, event: et.Event, control: et.Control) -> None: ...


def of_weights(**options: Any) -> subs.Checkpointer:
    return subs.Checkpointer("weights", every=2, save_weights_only=True, **options)


@pytest.mark.parametrize(
    ("make", "snapshot", "states"),
    [
        (lambda: [subs.Checkpointer("ck", every=2, max_in_flight=3)], "keep", 3),
        (
            lambda: [subs.Checkpointer("ck", every=2), Checkpointer2("other", every=3, max_in_flight=3)],
            "keep",
            5,
        ),
        (lambda: [of_weights(max_in_flight=4)], "keep", 3.6),  # of the large leaf
        (lambda: [of_weights(max_in_flight=4), Checkpointer2("ck", every=3, max_in_flight=1)], "keep", 4.6),
        (lambda: [of_weights(max_in_flight=4)], "host", 4),  # all is copied at once
        (lambda: [Reading()], "keep", 0.9),  # the largest leaf
        (lambda: [subs.JSONLLogger("log.jsonl")], "keep", 0),
        (lambda: [subs.JSONLLogger("log.jsonl")], "host", 1),
    ],
)
def test_host_memory_is_pinned_before_the_first_step_for_whatever_leaves_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Any,
    snapshot: Any,
    states: float,
) -> None:
    as_on_an_accelerator(monkeypatch)
    caplog.set_level(logging.INFO, "eventtrain")
    state = {"large": jnp.zeros(900), "small": jnp.zeros(100)}
    trainer = et.Trainer(
        lambda state, batch: ({name: leaf + batch for name, leaf in state.items()}, {}),
        state,
        params=lambda state: state["large"],
        snapshot=snapshot,
        subscribers=make(),
        run_dir=tmp_path,
    )
    warmed, pinned_bytes = PinnedPool.warmed, []

    def noting(*args: Any, **options: Any) -> PinnedPool:
        assert trainer.step == 0
        pool = warmed(*args, **options)
        pinned_bytes.append(pool.limit_bytes)
        return pool

    monkeypatch.setattr(PinnedPool, "warmed", noting)
    trainer.fit([np.float32(1)] * 4, epochs=1)
    assert sum(pinned_bytes) == pytest.approx(states * 4000, abs=100)  # and the counter of the extensions
    assert caplog.text.count("Pinned ") == (1 if states else 0)


def test_a_snapshot_that_was_copied_to_the_host_counts_in_the_pool_and_is_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_an_accelerator(monkeypatch)
    pools: list[PinnedPool] = []
    warmed = PinnedPool.warmed

    def noting(leaves: Any) -> PinnedPool:
        pools.append(warmed(leaves))
        return pools[-1]

    monkeypatch.setattr(PinnedPool, "warmed", noting)
    trainer = et.Trainer(
        lambda state, batch: (state + batch, {}), jnp.zeros(1000), snapshot="host", run_dir=tmp_path
    )
    room: dict[int, bool] = {}

    @trainer.on(et.StepCompleted, lag=0)
    async def look(event: et.StepCompleted, control: et.Control) -> None:
        room[event.step] = pools[0].has_room(4000)
        if event.step == 2:
            control.snapshot("one")
        elif event.step == 4:
            assert (await control.snapshots["one"].to_host()).tolist() == [2.0] * 1000
            assert not pools[0].has_room(4000)
            control.snapshots["one"].release()

    trainer.fit([np.float32(1)] * 6, epochs=1)
    assert room == {1: True, 2: True, 3: False, 4: False, 5: True, 6: True}


def stepping(tmp_path: Path, *subscribers: et.Subscriber, **options: Any) -> et.Trainer[Any]:
    return et.Trainer(
        lambda state, batch: (state + batch, {}),
        jnp.zeros(()),
        params=lambda state: state,
        subscribers=subscribers,
        run_dir=tmp_path,
        **options,
    )


class Keeping(et.Subscriber):
    """Keeps step 2 for the end of the run."""

    events = et.StepCompleted
    lag = 0

    def __init__(self, where: Any = lambda run: True) -> None:
        self._where = where

    async def start(self, run: et.RunContext) -> None:
        run.restore_at_end("two", "all", where=lambda: self._where(run))

    async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 2:
            control.snapshot("two")


@pytest.mark.parametrize("at", ["checkpoint", "end"])
def test_another_thread_may_release_a_snapshot_while_the_run_looks_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    share = Snapshot.share
    checkpoints = saved_in_memory.MemoryCheckpointer(every=4)
    trainer = stepping(tmp_path, Keeping(), *([checkpoints] if at == "checkpoint" else []))

    def released_just_before(snapshot: Snapshot) -> Snapshot:
        assert snapshot.tag == "two"
        snapshot.release()  # as another thread does
        return share(snapshot)

    monkeypatch.setattr(Snapshot, "share", released_just_before)
    result = trainer.fit([np.float32(1)] * 6, epochs=1)
    assert result.stop_reason == "completed"
    assert trainer.state == 6
    assert all(not saved.host_kept for saved in checkpoints.saved.values())


def test_a_snapshot_that_is_released_while_the_end_asks_whether_to_restore_it_is_restored(
    tmp_path: Path,
) -> None:
    def where(run: et.RunContext) -> bool:
        run.control.snapshots["two"].release()
        return True

    trainer = stepping(tmp_path, Keeping(where))
    trainer.fit([np.float32(1)] * 6, epochs=1)
    assert trainer.state == 2


def test_a_handle_from_before_the_first_step_of_a_resumed_run_releases_the_snapshot(tmp_path: Path) -> None:
    """The arrays of the step extensions are added to the snapshot when the step is compiled."""

    class Releasing(et.Subscriber):
        events = et.StepCompleted
        lag = 0
        found: tuple[str, ...] | None = None

        async def start(self, run: et.RunContext) -> None:
            self._kept = run.control.snapshots.get("two")

        async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
            if self._kept is not None and event.step == 5:
                self.found = self._kept.device.extension_paths
                self._kept.release()
                assert "two" not in control.snapshots

    checkpoints = saved_in_memory.MemoryCheckpointer(every=4)
    for resume in (False, 4):
        releasing = Releasing()
        options: dict[str, Any] = {"step_extensions": [et.EMA(0.5)]}
        trainer = stepping(tmp_path / str(resume), Keeping(), checkpoints, releasing, **options)
        trainer.fit([np.float32(1)] * 6, epochs=1, resume=resume)
    assert releasing.found
    assert "released" in repr(releasing._kept.device)
    assert trainer.state == 6  # nothing was left to be restored
