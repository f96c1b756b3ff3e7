"""A Checkpointer without a disk: every cut goes through JSON and host arrays, and any of them can be resumed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
import jax
import numpy as np

import eventtrain as et
from eventtrain.control.run_state import BEFORE_END, RunRecord


@dataclass(frozen=True)
class InMemory:
    """One checkpoint."""

    step: int
    facts: RunRecord
    host_state: Any
    host_extensions: Mapping[str, np.ndarray[Any, Any]]
    host_kept: Mapping[str, tuple[int, Any, Any]]
    time: datetime
    path: Path = Path("memory")

    def state(self, like: Any) -> Any:
        return jax.tree.map(put, self.host_state, like)

    def extensions(self, like: Mapping[str, Any], tag: str | None = None) -> list[Any]:
        extensions = self.host_extensions if tag is None else self.host_kept[tag][2]
        assert list(like) == list(extensions)
        return [put(extensions[path], wanted) for path, wanted in like.items()]

    def kept(self, like: Any, *, before_end: bool) -> dict[str, tuple[int, Any]]:
        return {
            tag: (step, jax.tree.map(put, state, like))
            for tag, (step, state, _) in self.host_kept.items()
            if tag.startswith(BEFORE_END) == before_end
        }


def copied(snapshot: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {path: np.array(leaf) for path, leaf in snapshot.extensions_by_path().items()}


def put(value: Any, like: Any) -> Any:
    assert (value.shape, value.dtype) == (like.shape, like.dtype)
    return jax.device_put(value, like.sharding)


class MemoryCheckpointer(et.Subscriber):
    """Keeps every checkpoint; resumes from the one that ``resume=step`` names."""

    resumes_runs = True

    def __init__(self, *, at_end: bool = False, **schedule: Any) -> None:
        self.saved: dict[int, InMemory] = {}
        self._schedule = schedule
        self._at_end = at_end
        self._run: et.RunContext | None = None

    async def start(self, run: et.RunContext) -> None:
        self._run = run
        run.schedule_checkpoints("memory", **self._schedule)
        assert run._plane is not None
        run._plane.requests.checkpoints[-1].at_end = self._at_end

    async def on_snapshot_taken(self, event: et.SnapshotTaken) -> None:
        if event.purpose == "checkpoint":
            assert self._run is not None
            claimed = self._run.claim("memory", event)
            await anyio.to_thread.run_sync(self._keep, claimed, event.step)

    def _keep(self, claimed: Any, step: int) -> None:
        facts = claimed.record(30.0)
        self.saved[step] = InMemory(
            step,
            RunRecord.model_validate(json.loads(facts.model_dump_json())),
            claimed.snapshot.device.host_state(),
            copied(claimed.snapshot.device),
            {tag: (kept.step, kept.host_state(), copied(kept)) for tag, kept in claimed.kept.items()},
            datetime.now(UTC),
        )
        claimed.finish()

    def saved_run(self, run_dir: Path, which: Any) -> InMemory | None:
        return self.saved[which]
