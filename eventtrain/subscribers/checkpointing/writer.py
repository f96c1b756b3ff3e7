"""``CheckpointWriter``: the thread that owns Orbax, and what it does for each checkpoint. Not on the event loop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointStarted,
    Event,
    SnapshotTaken,
    SubscriberFailed,
)
from eventtrain.subscribers._shared.retry import attempts
from eventtrain.subscribers._shared.worker_thread import publish_waiting
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
from eventtrain.subscribers.checkpointing.retention import OwnCheckpoint, Retention
from eventtrain.subscribers.checkpointing.store import CheckpointStore

logger = logging.getLogger("eventtrain")


@dataclass(frozen=True)
class WriteOptions:
    """How checkpoints are written; see ``Checkpointer``. ``weights_only``: store the params and nothing else."""

    marker_timeout_s: float = 60.0
    fsync: bool = True
    retries: int = 2
    retry_delay_s: float = 1.0
    weights_only: bool = False
    stage: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint to be written."""

    claimed: ClaimedSnapshot
    """The state; the writer finishes it in any case."""
    event: SnapshotTaken
    name: str
    """Of its folder, if that is free."""
    metrics: Mapping[str, float]
    """Measured at its step."""
    began_s: float = field(default_factory=monotonic)


class CheckpointWriter:
    """Writes checkpoints one after the other.

    Args:
        directory: in which their folders are created.
        publish: ``EventBus.publish``.
        owner: name of the Checkpointer.
        runs: ids of the runs whose checkpoints in ``directory`` count as the run's own.
        params: path in the params -> path in the state.
        retention, options: see there.
    """

    def __init__(
        self,
        directory: Path,
        publish: Callable[[Event], None],
        *,
        owner: str,
        runs: frozenset[str],
        params: Mapping[str, str],
        retention: Retention,
        options: WriteOptions,
    ) -> None:
        self._directory = directory
        self._publish = publish
        self._owner = owner
        self._runs = runs
        self._params = params
        self._retention = retention
        self._options = options
        self._store: CheckpointStore | None = None
        self._committed: list[OwnCheckpoint] = []
        self._stopping = threading.Event()
        self._unheard = threading.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain {owner}")
        self._stager: ThreadPoolExecutor | None = None
        if options.stage == "host":
            self._stager = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain {owner} staging")
        self._warned_of_no_host_memory = False
        self.unfinished: list[PendingCheckpoint] = []
        """Submitted and neither committed nor failed yet, oldest first."""

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def open(self) -> Future[None]:
        """Creates and cleans the directory, and reads what is in it. The future raises OSError if that fails."""
        return self._executor.submit(self._open)

    def steps(self) -> frozenset[int]:
        """Returns the steps of the checkpoints that count as the run's own. After ``open``."""
        return frozenset(one.step for one in self._committed)

    def submit(self, pending: PendingCheckpoint) -> None:
        """Has ``pending`` written after those before it."""
        self.unfinished.append(pending)
        staged = self._stager.submit(self._move_to_host, pending) if self._stager is not None else None
        self._executor.submit(self._write, pending, staged)

    def written(self) -> Future[None]:
        """Returns a future that is done when everything submitted so far is committed or has failed."""
        return self._executor.submit(lambda: None)

    def hurry(self) -> None:
        """Gives up what has not begun; there are no more attempts, and no subscriber is waited for."""
        self._stopping.set()
        for pending in list(self.unfinished):
            pending.claimed.barrier.abandon("the run ended before")

    def rescue(self, timeout_s: float) -> None:
        """Writes what was submitted, without the subscriptions that the event loop does not run any more. Blocks.

        Nothing is published, since nothing is delivered. Raises TimeoutError after ``timeout_s`` seconds.
        """
        self._unheard.set()
        for pending in list(self.unfinished):
            pending.claimed.hurry()
        self.written().result(timeout_s)
        self.close().result(timeout_s)

    def close(self) -> Future[None]:
        """Ends Orbax after what was submitted. The future raises failures in Orbax that were not raised before."""
        if self._stager is not None:
            self._stager.shutdown(wait=False)
        closed = self._executor.submit(lambda: self._store.close() if self._store is not None else None)
        self._executor.shutdown(wait=False)
        return closed

    # --- on the thread ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._store = CheckpointStore(self._directory, fsync=self._options.fsync)
        for committed in self._store.found:
            if committed.manifest.run_id in self._runs and committed.manifest.owner == self._owner:
                self._add(committed)

    def _move_to_host(self, pending: PendingCheckpoint) -> None:
        """On the staging thread: frees the device's memory of the states that wait while one is written."""
        if pending.claimed.snapshot.device.move_to_host() or self._warned_of_no_host_memory:
            return
        self._warned_of_no_host_memory = True
        logger.warning(
            '%s(stage="host"): the device has no pinned host memory, so states wait on the device.',
            self._owner,
        )

    def _write(self, pending: PendingCheckpoint, staged: Future[None] | None) -> None:
        event, committed = pending.event, None
        try:
            if staged is not None:
                staged.result()
            committed = self._commit(pending)
        except Exception as error:
            text = _short(error)
            logger.error("The checkpoint of step %d failed: %s", event.step, text)
            failed = CheckpointFailed(
                step=event.step,
                path=str(self._directory / pending.name),
                tag=event.tag,
                error=text,
                requested_by=self._owner,
            )
            publish_waiting(self._publish, failed, self._unheard)
        finally:
            pending.claimed.finish()
            self.unfinished.remove(pending)
        if committed is not None:
            done = CheckpointCommitted(
                step=event.step,
                path=str(committed.path),
                tag=event.tag,
                size_bytes=committed.size_bytes,
                duration_s=monotonic() - pending.began_s,
            )
            publish_waiting(self._publish, done, self._unheard)
            self._add(committed)
            self._delete_surplus()

    def _commit(self, pending: PendingCheckpoint) -> Committed:
        if self._stopping.is_set():
            raise SnapshotError("the run ended before its turn came")
        event = pending.event
        path = free_path(self._directory, checked_name(pending.name, "A checkpoint, with its tag"))
        publish_waiting(
            self._publish,
            CheckpointStarted(step=event.step, path=str(path), tag=event.tag),
            self._unheard,
        )
        parts = self._copy_to_host(pending.claimed)
        facts = None
        if not self._options.weights_only:
            facts = pending.claimed.record(self._options.marker_timeout_s)
            for name, share in facts.shares.items():
                if share.error is not None:
                    self._report_failed(name, share.error, event.step)
        manifest = self._manifest(pending, facts)
        parse_manifest(path, manifest.to_text())  # a checkpoint that is committed can be read
        return self._store_parts(pending.name, parts, manifest)

    def _report_failed(self, name: str, error: str, step: int) -> None:
        logger.error(
            "The checkpoint of step %d is written without the state of %s, or without all that it had to write: %s",
            step, name, error,
        )  # fmt: skip
        failed = SubscriberFailed(step=step, subscriber=name, event_kind="state_dict", error=error)
        publish_waiting(self._publish, failed)

    def _copy_to_host(self, claimed: ClaimedSnapshot) -> dict[str, Mapping[str, Any]]:
        device = claimed.snapshot.device
        weights = set(self._params.values()) if self._options.weights_only else None
        parts: dict[str, Mapping[str, Any]] = {STATE: named(device.host_leaves(weights))}
        if weights is None:
            parts[EXTENSIONS] = device.host_extensions()
            for tag, snapshot in claimed.kept.items():
                parts[KEPT + tag] = named(snapshot.host_leaves())
                parts[KEPT_EXTENSIONS + tag] = snapshot.host_extensions()
        claimed.snapshot.release()  # frees an accelerator's memory before the slow part
        return parts

    def _manifest(self, pending: PendingCheckpoint, facts: RunRecord | None) -> Manifest:
        event = pending.event
        kept = {} if facts is None else pending.claimed.kept
        return Manifest(
            step=event.step,
            epoch=event.epoch,
            tag=event.tag,
            run_id=event.run_id,
            owner=self._owner,
            time=datetime.now(UTC),
            metrics=dict(pending.metrics),
            weights_only=self._options.weights_only,
            kept_steps={tag: snapshot.step for tag, snapshot in kept.items()},
            params={path_name(path): path_name(place) for path, place in self._params.items()},
            facts=facts,
        )

    def _store_parts(
        self, name: str, parts: Mapping[str, Mapping[str, Any]], manifest: Manifest
    ) -> Committed:
        options, store, failure = self._options, self._store, None
        assert store is not None
        for attempt in attempts(options.retries, options.retry_delay_s, self._stopping.wait):
            try:
                return store.write(name, parts, manifest)
            except Exception as error:
                failure = error
                if attempt <= options.retries:
                    logger.warning(
                        "The checkpoint of step %d could not be written (attempt %d): %s",
                        manifest.step, attempt, _short(error),
                    )  # fmt: skip
        assert failure is not None
        raise failure

    def _add(self, committed: Committed) -> None:
        manifest, monitor = committed.manifest, self._retention.monitor
        value = manifest.metrics.get(monitor) if monitor is not None else None
        is_named = manifest.tag != scheduled_tag(manifest.step)
        self._committed.append(OwnCheckpoint(manifest.step, value, is_named, committed.path))

    def _delete_surplus(self) -> None:
        for surplus in self._retention.surplus(self._committed):
            try:
                delete(surplus.path)
            except OSError as error:
                logger.warning("The old checkpoint %s could not be deleted: %s", surplus.path, error)
            if not surplus.path.exists():
                self._committed.remove(surplus)  # else it is deleted after the next commit


def _short(error: Exception) -> str:
    """Returns the text of an error without the specification of the file that TensorStore adds, a page long."""
    return f"{type(error).__name__}: {error}".split(" [tensorstore_spec=")[0]
