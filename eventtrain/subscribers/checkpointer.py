"""``Checkpointer``: snapshots made durable, by a thread of its own, while training goes on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from eventtrain.control import KeptSnapshot
from eventtrain.errors import BusClosed, ConfigurationError
from eventtrain.events import CheckpointCommitted, CheckpointFailed, CheckpointStarted, Event, SnapshotTaken
from eventtrain.subscriber import RunContext, Subscriber
from eventtrain.subscribers.checkpoint_store import Committed, Store, restore_state

__all__ = ["Checkpointer", "restore_state"]

logger = logging.getLogger("eventtrain")

T = TypeVar("T")

BACKLOG_WARNING_S = 30.0
"""A snapshot that waited so long to be written is worth a warning: each one holds a whole state on the device."""


class Checkpointer(Subscriber):
    """Writes checkpoints of exactly the scheduled steps, and those that ``control.checkpoint(tag)`` asks for.

    Args:
        directory: relative to ``run_dir``; made if missing. Each checkpoint is a folder ``step-00000100`` in it,
            ``step-00000100-<tag>`` where a command gave a tag. What lies there is never overwritten.
        every: steps; ``every_epochs``: epochs; ``every_s``: seconds. Any of them, also several or none.
        max_to_keep: once a new checkpoint is committed, the oldest ones of this run beyond so many are deleted.
            None keeps all.

    CheckpointCommitted is published when the checkpoint stands on disk, synced, under its final name;
    CheckpointFailed with the reason when that did not come about. The loop waits for neither. Checkpoints are written
    one after the other; a snapshot that waits for its turn holds a state on the device, so schedule them further
    apart than writing takes.
    """

    disable_after = None  # one full disk must not end all checkpoints

    def __init__(
        self,
        directory: str | Path,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
        max_to_keep: int | None = 3,
    ) -> None:
        for name, value in (("every", every), ("every_epochs", every_epochs), ("max_to_keep", max_to_keep)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"Checkpointer({name}={value!r}): needs a whole number of at least 1, or None."
                )
        if every_s is not None and not every_s > 0:
            raise ConfigurationError(
                f"Checkpointer(every_s={every_s!r}): needs a positive number of seconds, or None."
            )
        self._directory = Path(directory)
        self._schedule: dict[str, Any] = {"every": every, "every_epochs": every_epochs, "every_s": every_s}
        self._max_to_keep = max_to_keep
        self._run: RunContext | None = None
        self._store: Store | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._kept: list[Path] = []

    @property
    def _name(self) -> str:
        return self.name or type(self).__name__

    async def start(self, run: RunContext) -> None:
        """Make the directory, remove what killed runs left half-written, tell the loop the schedule."""
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain {self._name}")
        directory = (run.run_dir / self._directory).absolute()
        self._store = await self._on_thread(lambda: Store(directory))
        self._kept = await self._on_thread(lambda: self._opened.committed_by(run.run_id))
        run.schedule_checkpoints(self._name, **self._schedule)

    async def stop(self) -> None:
        """Wait for what is being written, then close Orbax. Raises what failed in it and was not told before."""
        thread, store = self._thread, self._store
        if thread is None:
            return
        try:
            if store is not None:
                await self._on_thread(store.close)
        finally:
            self._thread = self._store = None
            thread.shutdown(wait=False)

    async def on_snapshot_taken(self, event: SnapshotTaken) -> None:
        """Write the snapshot, if it is for this Checkpointer; returns when that is done."""
        if event.purpose != "checkpoint" or event.requested_by not in (None, self._name) or self._run is None:
            return
        waited_s = (datetime.now(UTC) - event.time).total_seconds()
        if waited_s > BACKLOG_WARNING_S:
            logger.warning(
                "The snapshot of step %d waited %.0f s to be written and held a state on the device meanwhile. "
                "Schedule checkpoints further apart.", event.step, waited_s,
            )  # fmt: skip
        began_s = monotonic()
        name = _folder_name(event)
        path = self._opened.directory / name
        snapshot = None
        try:
            snapshot = claimed = self._run.claim(event)
            if claimed.device.released:  # refused for lack of room, which the loop has said
                return
            path = await self._on_thread(lambda: self._opened.free_path(_checked(name)))
            await self._say(CheckpointStarted(step=event.step, path=str(path), tag=event.tag))
            committed = await self._on_thread(lambda: self._write(path, claimed, event))
        except Exception as error:
            logger.error("The checkpoint of step %d failed: %s: %s", event.step, type(error).__name__, error)
            await self._say(
                CheckpointFailed(
                    step=event.step, path=str(path), tag=event.tag, error=f"{type(error).__name__}: {error}"
                )
            )
            return
        finally:
            if snapshot is not None:
                snapshot.release()
        await self._say(
            CheckpointCommitted(
                step=event.step,
                path=str(committed.path),
                tag=event.tag,
                size_bytes=committed.size_bytes,
                duration_s=monotonic() - began_s,
            )
        )
        await self._delete_oldest(committed.path)

    def _write(self, path: Path, snapshot: KeptSnapshot, event: SnapshotTaken) -> Committed:
        host_state = snapshot.device.host_state()
        snapshot.release()  # the device gets its memory back before the slow part
        return self._opened.write(
            path,
            host_state,
            {
                "run_id": event.run_id,
                "step": event.step,
                "epoch": event.epoch,
                "tag": event.tag,
                "time": datetime.now(UTC).isoformat(),
            },
        )

    async def _delete_oldest(self, newest: Path) -> None:
        self._kept.append(newest)
        while self._max_to_keep is not None and len(self._kept) > self._max_to_keep:
            oldest = self._kept.pop(0)
            try:
                await self._on_thread(lambda path=oldest: self._opened.delete(path))
            except OSError as error:
                logger.warning("The old checkpoint %s could not be deleted: %s", oldest, error)

    @property
    def _opened(self) -> Store:
        assert self._store is not None
        return self._store

    async def _on_thread(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the thread that owns Orbax; cancelled, it is left to finish there."""
        assert self._thread is not None
        future = self._thread.submit(function)
        return await anyio.to_thread.run_sync(
            future.result, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
        )

    async def _say(self, event: Event) -> None:
        assert self._run is not None
        try:
            await self._run.publish_async(event)
        except BusClosed:
            logger.warning("The bus is closed, so nobody hears of %s (step %d)", event.kind, event.step)


def _folder_name(event: SnapshotTaken) -> str:
    name = f"step-{event.step:08d}"
    return name if event.tag == f"step-{event.step}" else f"{name}-{event.tag}"


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", name):
        raise ConfigurationError(
            f"The tag of {name!r} cannot be part of a folder's name: use at most 180 letters, digits, '_', '-' and '.'."
        )
    return name
