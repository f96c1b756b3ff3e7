"""``CheckpointWriter``: the thread that owns Orbax, and what it does for each checkpoint. Not on the event loop."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote

from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.run_context import RunContext
from eventtrain.control.run_state import RunRecord
from eventtrain.errors import SnapshotError, is_logged, shortened
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointStarted,
    Event,
    SnapshotTaken,
    StagingLimited,
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
    read_manifest,
)
from eventtrain.subscribers.checkpointing.naming import checked_name, scheduled_tag
from eventtrain.subscribers.checkpointing.processes import Attempt, CheckpointPeers, CommittedByAll, GivenUp
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
        run: has the processes that write each checkpoint together; None for one process.
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
        run: RunContext | None = None,
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
        self._stager = ThreadPoolExecutor(1, thread_name_prefix=f"eventtrain staging for {owner}")
        self._warned_of_no_room = False
        self._index = run.process_index if run is not None else 0
        self._count = run.process_count if run is not None else 1
        self._exchange = run.exchange if run is not None else None
        self._number = 0
        self._earlier: list[str] = []
        self.unfinished: list[PendingCheckpoint] = []
        """Submitted and neither committed nor failed yet, oldest first."""
        self.failures = 0
        """Checkpoints that failed since the last one that was committed."""
        self.earlier_step = -1
        """The highest step of other runs that can be resumed from this directory; -1 for none. After ``open``."""

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
        staged = self._stager.submit(self._stage, pending)
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
        self._stager.shutdown(wait=False)
        closed = self._executor.submit(lambda: self._store.close() if self._store is not None else None)
        self._executor.shutdown(wait=False)
        return closed

    # --- on the thread that stages ----------------------------------------------------------------------------

    def _stage(self, pending: PendingCheckpoint) -> None:
        """Frees the device's memory of a state that waits while another one is written, if the host has room for it."""
        snapshot = pending.claimed.snapshot.device
        if self._options.weights_only:
            snapshot.keep_only(frozenset(self._params.values()))
        if not snapshot.move_to_host():
            limited = StagingLimited(
                step=pending.event.step,
                subscriber=self._owner,
                size_bytes=snapshot.size_bytes,
                limit_bytes=snapshot.pool.limit_bytes or 0,
            )
            publish_waiting(self._publish, limited, self._unheard)

    # --- on the thread that writes ----------------------------------------------------------------------------

    def _open(self) -> None:
        self._store = CheckpointStore(self._directory, fsync=self._options.fsync)
        if self._index > 0:
            return  # process 0 knows and deletes them
        for committed in self._store.found:
            manifest = committed.manifest
            if manifest.run_id not in self._runs:
                if manifest.facts is not None:
                    self.earlier_step = max(self.earlier_step, manifest.step)
            elif manifest.owner == self._owner:
                self._add(committed)

    def _write(self, pending: PendingCheckpoint, staged: Future[None]) -> None:
        event, committed = pending.event, None
        try:
            staged.result()
            committed = self._commit(pending)
        except Exception as error:
            text = _short(error)
            self.failures += 1
            if is_logged(self.failures):
                logger.error(
                    "The checkpoint of step %d failed (failure no. %d in a row): %s",
                    event.step, self.failures, text,
                )  # fmt: skip
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
            self.failures = 0
            done = CheckpointCommitted(
                step=event.step,
                path=str(committed.path),
                tag=event.tag,
                size_bytes=committed.size_bytes,
                duration_s=monotonic() - pending.began_s,
            )
            publish_waiting(self._publish, done, self._unheard)
            if self._index == 0:
                self._add(committed)
                self._delete_surplus()

    def _commit(self, pending: PendingCheckpoint) -> Committed:
        if self._stopping.is_set():
            raise SnapshotError("the run ended before its turn came")
        event = pending.event
        peers = self._peers_of_next()
        if self._index > 0 and peers is not None:
            return self._commit_part(pending, peers)
        path = free_path(self._directory, checked_name(pending.name, "A checkpoint, with its tag"))
        publish_waiting(
            self._publish,
            CheckpointStarted(step=event.step, path=str(path), tag=event.tag),
            self._unheard,
        )
        try:
            parts, facts, options = self._prepared(pending)
            manifest = self._manifest(pending, facts)
            parse_manifest(path, manifest.to_text())  # a checkpoint that is committed can be read
            write = partial(self._store_of_run.write, pending.name, parts, manifest, peers=peers, **options)
            committed = self._with_retries(write, event.step)
        except Exception as error:
            if peers is not None:
                peers.conclude(GivenUp(error=_short(error)))
            raise
        if peers is not None:
            name = committed.path.name
            peers.conclude(CommittedByAll(name=name, size_bytes=committed.size_bytes))
        return committed

    def _peers_of_next(self) -> CheckpointPeers | None:
        """Returns the other processes, for the next checkpoint; None if there are none."""
        self._number += 1
        if self._exchange is None:
            return None

        def give_up() -> None:
            if self._stopping.is_set():
                raise SnapshotError("the run ended before all processes had written it")

        key = f"checkpoints/{quote(self._owner, safe='')}/{self._number}"
        return CheckpointPeers(self._exchange, key, self._index, self._count, give_up, self._earlier)

    def _commit_part(self, pending: PendingCheckpoint, peers: CheckpointPeers) -> Committed:
        """Writes the part of this process, as often as process 0 attempts it. Returns what process 0 has committed."""
        prepared, failure = None, ""
        while True:
            match peers.next_message():
                case Attempt() as attempt:
                    try:
                        prepared = prepared or self._prepared(pending)
                        parts, facts, options = prepared
                        folder = self._directory / attempt.name
                        self._store_of_run.write_part(folder, self._index, parts, facts, **options)
                    except Exception as error:
                        failure = _short(error)
                        logger.warning(
                            "The part of this process of the checkpoint of step %d could not be written: %s",
                            pending.event.step, failure,
                        )  # fmt: skip
                        peers.report(failure or "unknown")
                    else:
                        peers.report()
                case CommittedByAll() as done:
                    path = self._directory / done.name
                    return Committed(path, read_manifest(path), done.size_bytes)
                case GivenUp() as given_up:
                    raise SnapshotError(f"process 0 has given it up: {given_up.error}")

    @property
    def _store_of_run(self) -> CheckpointStore:
        assert self._store is not None
        return self._store

    def _prepared(
        self, pending: PendingCheckpoint
    ) -> tuple[dict[str, Mapping[str, Any]], RunRecord | None, dict[str, Any]]:
        """Returns the arrays to be written, the record, and how to read them on the host."""
        event = pending.event
        snapshot = pending.claimed.snapshot.device
        snapshots = [snapshot, *(() if self._options.weights_only else pending.claimed.kept.values())]
        in_batches = not all(one.move_to_host() for one in snapshots)
        if in_batches and not self._warned_of_no_room:
            self._warned_of_no_room = True
            logger.warning(
                "%s writes checkpoints in batches, and the device holds each state until it is written: a state has "
                "%.3g GB, and at most %.3g GB of pinned host memory are available.",
                self._owner, snapshot.size_bytes / 1e9, (snapshot.pool.limit_bytes or 0) / 1e9,
            )  # fmt: skip
        parts = self._parts(pending.claimed)
        facts = None
        if not self._options.weights_only:
            facts = pending.claimed.record(self._options.marker_timeout_s)
            for name, share in facts.shares.items():
                if share.error is not None:
                    self._report_failed(name, share.error, event.step)
        options = {"put": snapshot.pool.put if in_batches else None, "read": snapshot.pool.read}
        return parts, facts, options

    def _report_failed(self, name: str, error: str, step: int) -> None:
        logger.error(
            "The checkpoint of step %d is written without the state of %s, or without all that it had to write: %s",
            step, name, error,
        )  # fmt: skip
        failed = SubscriberFailed(step=step, subscriber=name, event_kind="state_dict", error=error)
        publish_waiting(self._publish, failed)

    def _parts(self, claimed: ClaimedSnapshot) -> dict[str, Mapping[str, Any]]:
        device = claimed.snapshot.device
        parts: dict[str, Mapping[str, Any]] = {STATE: named(device.leaves_by_path())}
        if not self._options.weights_only:
            parts[EXTENSIONS] = device.extensions_by_path()
            for tag, snapshot in claimed.kept.items():
                parts[KEPT + tag] = named(snapshot.leaves_by_path())
                parts[KEPT_EXTENSIONS + tag] = snapshot.extensions_by_path()
        claimed.snapshot.release()  # of what is not written
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

    def _with_retries(self, write: Callable[[], Committed], step: int) -> Committed:
        options, failure = self._options, None
        retries = options.retries if self.failures == 0 else 0  # it must not delay each checkpoint
        for attempt in attempts(retries, options.retry_delay_s, self._stopping.wait):
            try:
                return write()
            except Exception as error:
                failure = error
                if attempt <= retries:
                    logger.warning(
                        "The checkpoint of step %d could not be written (attempt %d): %s",
                        step, attempt, _short(error),
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
    """Returns the text of an error, of one of TensorStore the cause first, without the specification that it adds."""
    text = f"{type(error).__name__}: {error}".split(" [tensorstore_spec=")[0]
    if match := re.search(r" \[os_error_code='(\d+)'\]", text):
        return f"{os.strerror(int(match[1]))} ({shortened(text[: match.start()])})"
    return text
