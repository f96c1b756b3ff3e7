"""``CheckpointWriter``: the thread that owns Orbax, and what it does for each checkpoint. Blocking; no event loop."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, TypeVar

from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.run_state import RunRecord
from eventtrain.errors import BusClosed, QueueFull, SnapshotError
from eventtrain.events import CheckpointCommitted, CheckpointFailed, CheckpointStarted, Event
from eventtrain.subscribers.checkpointing.directory import Committed, delete, free_path
from eventtrain.subscribers.checkpointing.manifest import (
    EXTENSIONS,
    KEPT,
    KEPT_EXTENSIONS,
    STATE,
    Manifest,
    named,
    parse_manifest,
    path_name,
)
from eventtrain.subscribers.checkpointing.naming import checked_name, scheduled_tag
from eventtrain.subscribers.checkpointing.retention import Kept, Retention
from eventtrain.subscribers.checkpointing.store import CheckpointStore

logger = logging.getLogger("eventtrain")

T = TypeVar("T")

QUEUE_FULL_S = 0.01
"""How long to wait before publishing once more."""


@dataclass(frozen=True)
class WriterOptions:
    """How to write.

    Attributes:
        owner: name of the Checkpointer.
        directory: where to.
        runs: what they left in it counts as the run's own.
        retention: which ones to keep.
        marker_timeout_s: how long to wait for the subscribers' states.
        fsync: have the disk hold everything before a checkpoint gets its name.
        retries, retry_delay_s: after a failure on disk; the delay doubles each time.
        weights_only: store the params and nothing else.
        monitor: the metric that tells the best ones.
        stage: where a state waits for its turn.
    """

    owner: str
    directory: Path
    runs: frozenset[str]
    retention: Retention
    marker_timeout_s: float = 60.0
    fsync: bool = True
    retries: int = 2
    retry_delay_s: float = 1.0
    weights_only: bool = False
    monitor: str | None = None
    stage: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class Job:
    """One checkpoint to be written.

    Attributes:
        claimed: what to write; finished by the writer in any case.
        name: of its folder, if nothing of that name is there.
        step, epoch: completed.
        tag: of the snapshot.
        run_id: of the run.
        metrics: measured at that step.
    """

    claimed: ClaimedSnapshot
    name: str
    step: int
    epoch: int
    tag: str
    run_id: str
    metrics: Mapping[str, float]
    began_s: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class _Entry(Kept):
    path: Path = Path()


class CheckpointWriter:
    """Writes one checkpoint after the other.

    Args:
        options: how.
        params: path in the params -> path in the state.
        publish: ``EventBus.publish``.
    """

    def __init__(
        self, options: WriterOptions, params: Mapping[str, str], publish: Callable[[Event], None]
    ) -> None:
        self._options = options
        self._params = params
        self._publish = publish
        self._store: CheckpointStore | None = None
        self._kept: list[_Entry] = []
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain {options.owner}")
        self._stager: ThreadPoolExecutor | None = None
        if options.stage == "host":
            self._stager = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain {options.owner} staging")
        self._said_no_host_memory = False
        self.unfinished: list[Job] = []
        """Taken and neither committed nor failed yet, oldest first."""

    def submit(self, job: Job) -> None:
        """Have ``job`` written after those before it; returns at once. Any thread."""
        self.unfinished.append(job)
        staged = self._stager.submit(self._move_to_host, job) if self._stager is not None else None
        self._executor.submit(self._do, job, staged)

    def open(self) -> Future[None]:
        """Make the directory, clean it, and count what lies in it. The future raises OSError where that fails."""
        return self._executor.submit(self._open)

    def steps(self) -> frozenset[int]:
        """Of the checkpoints that count as the run's own, after ``open``."""
        return frozenset(entry.step for entry in self._kept)

    def through(self) -> Future[None]:
        """Done when everything submitted so far is committed or has failed."""
        return self._executor.submit(lambda: None)

    def close(self) -> Future[None]:
        """End Orbax, after what was submitted. The future raises what failed in it and was not told before."""
        if self._stager is not None:
            self._stager.shutdown(wait=False)
        done = self._executor.submit(self._close)
        self._executor.shutdown(wait=False)
        return done

    def hurry(self) -> None:
        """Give up what has not begun, do not try again, and wait for no subscriber."""
        self._stopping.set()
        for job in list(self.unfinished):
            job.claimed.barrier.abandon("the run ended before")

    # --- on the thread ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        options = self._options
        self._store = CheckpointStore(options.directory, fsync=options.fsync)
        for committed in self._store.found:
            if committed.manifest.run_id in options.runs and committed.manifest.owner == options.owner:
                self._note(committed)

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _move_to_host(self, job: Job) -> None:
        """On the other thread: while one is written, the device gets back the memory of those behind it."""
        if job.claimed.snapshot.device.move_to_host() or self._said_no_host_memory:
            return
        self._said_no_host_memory = True
        logger.warning(
            '%s(stage="host"): the device has no pinned host memory, so its states wait on the device.',
            self._options.owner,
        )

    def _do(self, job: Job, staged: Future[None] | None) -> None:
        committed = None
        try:
            if staged is not None:
                staged.result()
            committed = self._commit(job)
        except Exception as error:
            text = _said(error)
            logger.error("The checkpoint of step %d failed: %s", job.step, text)
            self._say(
                CheckpointFailed(
                    step=job.step,
                    path=str(self._options.directory / job.name),
                    tag=job.tag,
                    error=text,
                    requested_by=self._options.owner,
                )
            )
        finally:
            job.claimed.finish()
            self.unfinished.remove(job)
        if committed is not None:
            self._say(
                CheckpointCommitted(
                    step=job.step,
                    path=str(committed.path),
                    tag=job.tag,
                    size_bytes=committed.size_bytes,
                    duration_s=monotonic() - job.began_s,
                )
            )
            self._note(committed)
            self._delete_surplus()

    def _commit(self, job: Job) -> Committed:
        if self._stopping.is_set():
            raise SnapshotError("the run ended before its turn came")
        path = free_path(self._options.directory, checked_name(job.name, "A checkpoint, with its tag"))
        self._say(CheckpointStarted(step=job.step, path=str(path), tag=job.tag))
        parts = self._copy_to_host(job.claimed)
        facts = None
        if not self._options.weights_only:
            facts = job.claimed.record(self._options.marker_timeout_s)
            _require_json(facts)
        return self._write(job.name, parts, self._manifest(job, facts))

    def _copy_to_host(self, claimed: ClaimedSnapshot) -> dict[str, Mapping[str, Any]]:
        device = claimed.snapshot.device
        weights = set(self._params.values()) if self._options.weights_only else None
        parts: dict[str, Mapping[str, Any]] = {STATE: named(device.host_leaves(weights))}
        if weights is None:
            parts[EXTENSIONS] = device.host_extensions()
            for tag, snapshot in claimed.kept.items():
                parts[KEPT + tag] = named(snapshot.host_leaves())
                parts[KEPT_EXTENSIONS + tag] = snapshot.host_extensions()
        claimed.snapshot.release()  # an accelerator gets its memory back before the slow part
        return parts

    def _manifest(self, job: Job, facts: RunRecord | None) -> Manifest:
        options = self._options
        kept = {} if facts is None else job.claimed.kept
        return Manifest(
            step=job.step,
            epoch=job.epoch,
            tag=job.tag,
            run_id=job.run_id,
            owner=options.owner,
            time=datetime.now(UTC),
            metrics=dict(job.metrics),
            weights_only=options.weights_only,
            kept_steps={tag: snapshot.step for tag, snapshot in kept.items()},
            params={path_name(path): path_name(place) for path, place in self._params.items()},
            facts=facts,
        )

    def _write(self, name: str, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest) -> Committed:
        parse_manifest(self._options.directory / name, manifest.to_text())  # what is committed can be read
        store, delay_s = self._store, self._options.retry_delay_s
        assert store is not None
        for attempt in range(self._options.retries):
            try:
                return store.write(name, parts, manifest)
            except Exception as error:
                logger.warning(
                    "The checkpoint of step %d could not be written (attempt %d): %s",
                    manifest.step, attempt + 1, _said(error),
                )  # fmt: skip
                if self._stopping.wait(delay_s):
                    raise
                delay_s *= 2
        return store.write(name, parts, manifest)

    def _note(self, committed: Committed) -> None:
        manifest, monitor = committed.manifest, self._options.monitor
        value = manifest.metrics.get(monitor) if monitor is not None else None
        named = manifest.tag != scheduled_tag(manifest.step)
        self._kept.append(_Entry(manifest.step, value, named, committed.path))

    def _delete_surplus(self) -> None:
        for surplus in self._options.retention.surplus(self._kept):
            try:
                delete(surplus.path)
            except OSError as error:
                logger.warning("The old checkpoint %s could not be deleted: %s", surplus.path, error)
            if not surplus.path.exists():
                self._kept.remove(surplus)  # else the next one tries again

    def _say(self, event: Event) -> None:
        """Publish; waits while a Lossless queue is at its limit, since no event may be lost."""
        while True:
            try:
                self._publish(event)
                return
            except QueueFull:
                sleep(QUEUE_FULL_S)
            except BusClosed:
                logger.warning("The bus is closed, so nobody hears of %s (step %d)", event.kind, event.step)
                return


def _said(error: Exception) -> str:
    """Without the specification of the file that TensorStore adds, a page long."""
    return f"{type(error).__name__}: {error}".split(" [tensorstore_spec=")[0]


def _require_json(facts: RunRecord) -> None:
    """What a subscriber saves must come back as it was."""
    for name, share in facts.shares.items():
        try:
            json.dumps(share.state)
        except (TypeError, ValueError) as error:
            raise SnapshotError(
                f"state_dict() of {name} gave what is no plain JSON data: {error}. Give dicts with text as keys, "
                "lists, text, numbers, booleans and None."
            ) from error
