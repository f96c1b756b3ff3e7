"""Checkpoints to be written without a run: a state, a complete cut, and what a Checkpointer's thread publishes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import eventtrain as et
from eventtrain.bus.barrier import Barrier, SubscriptionCheckpoint
from eventtrain.bus.bus import core_of
from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.command_queue import RunPart
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.requests import CheckpointRequest
from eventtrain.control.run_state import LoopRecord, StreamRecord
from eventtrain.device.snapshot import Snapshot
from eventtrain.device.state import split_state
from eventtrain.subscribers.checkpointing.retention import Retention
from eventtrain.subscribers.checkpointing.writer import CheckpointWriter, PendingCheckpoint, WriteOptions


def state_of(step: int) -> dict[str, Any]:
    return {
        "params": {"w": jnp.full(50, step, jnp.float32)},
        "count": jnp.int32(step),
        "none": jnp.zeros((0, 2)),
    }


def complete_cut(step: int, shares: Mapping[str, SubscriptionCheckpoint] | None = None) -> Barrier[RunPart]:
    cut = Barrier(step, RunPart())
    cut.run.loop = LoopRecord(
        step=step, epoch=0, batch=step, in_epoch=True, epoch_first_step=0, start_step=0, start_epoch=0
    )
    cut.run.stream = StreamRecord()
    for name, share in (shares or {}).items():
        cut.add(name, share)
    cut.expect(shares or {}, seq=step)
    return cut


class Writing:
    """A ``CheckpointWriter`` with everything it published."""

    def __init__(self, directory: Path, retention: Retention | None = None, **options: Any) -> None:
        options = {"retries": 0, "retry_delay_s": 0.0, **options}
        self.events: list[et.Event] = []
        self.request = CheckpointRequest("owner")
        plane = ControlPlane(core_of(et.EventBus()))
        plane.requests.checkpoints.append(self.request)
        self.handover = plane.handover
        self.writer = CheckpointWriter(
            directory,
            self.events.append,
            owner="owner",
            runs=frozenset({"run"}),
            params={"['w']": "['params']['w']"},
            retention=retention or Retention(),
            options=WriteOptions(**options),
        )
        self.writer.open().result(30)

    def claim(self, step: int, cut: Barrier[RunPart] | None = None) -> ClaimedSnapshot:
        leaves, structure = split_state(state_of(step))
        snapshot = Snapshot(step, [jnp.asarray(leaf) for leaf in leaves], structure)
        taken = et.SnapshotTaken(step=step, tag=f"step-{step}", requested_by="owner")
        self.handover.offer(snapshot, {}, cut or complete_cut(step), [self.request], taken)
        claimed = self.handover.claim("owner", step, "owner")
        assert claimed is not None
        return claimed

    def job(
        self, step: int, cut: Barrier[RunPart] | None = None, tag: str | None = None, **metrics: float
    ) -> PendingCheckpoint:
        name = f"step-{step:08d}" if tag is None else f"step-{step:08d}-{tag}"
        event = et.SnapshotTaken(step=step, tag=tag or f"step-{step}", run_id="run")
        return PendingCheckpoint(self.claim(step, cut), event, name, metrics)

    def write(
        self, step: int, *, cut: Barrier[RunPart] | None = None, tag: str | None = None, **metrics: float
    ) -> et.Event:
        """Write one checkpoint and return what was said of it last."""
        self.writer.submit(self.job(step, cut, tag, **metrics))
        self.writer.written().result(60)
        return self.events[-1]

    def close(self) -> None:
        self.writer.close().result(30)
