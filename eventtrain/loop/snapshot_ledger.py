"""``SnapshotLedger``: which states of the run are kept, and whether the next step may overwrite the present one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.model import Model
from eventtrain.device.pinned_memory import PinnedPool
from eventtrain.device.placement import move
from eventtrain.device.snapshot import Snapshot
from eventtrain.errors import SnapshotError
from eventtrain.events import CheckpointFailed, CheckpointRestored, SnapshotTaken
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.run_status import RunStatus


@dataclass(eq=False, kw_only=True)
class SnapshotLedger:
    """Takes and restores snapshots of the state in ``carry``. Training thread only; never blocks.

    A snapshot is a reference to the leaves of the present state. It becomes one when the next step leaves them alone:
    until then the state is ``pinned``, and the step must be a keeping one. Leaves are replaced, never changed in
    place. With ``snapshot="host"`` a snapshot is a copy in pinned host memory instead, and pins nothing.
    """

    model: Model
    compiled: CompiledStep
    carry: Carry
    status: RunStatus
    plane: ControlPlane
    windows: MetricWindows

    def __post_init__(self) -> None:
        self._to_host = self.model.options.snapshot == "host"
        self._params = [] if self.model.unknown_params else self.model.params_indices()
        self._unconfirmed: list[tuple[Snapshot, SnapshotTaken]] = []
        self._pool = self._warmed_pool()
        # Something outside the ledger refers to the present leaves: their first owner, or a restored snapshot.
        self._shared = True

    @property
    def pinned(self) -> bool:
        """Whether something else refers to the present state, so that the next step must not overwrite it."""
        return self._shared or bool(self._unconfirmed)

    def survived(self) -> bool:
        """Record that a keeping step left the state alone. Returns whether that confirmed any snapshot."""
        confirmed = bool(self._unconfirmed)
        self._shared = False
        self._unconfirmed.clear()
        return confirmed

    def refuse(self, error: SnapshotError) -> bool:
        """Release the unconfirmed snapshots: the device has no room for a second state. Publishes CheckpointFailed.

        Returns whether training can continue; it cannot if the present state belongs to something else.
        """
        for snapshot, taken in self._unconfirmed:
            snapshot.release()
            failed = CheckpointFailed(
                step=taken.step, path="", tag=taken.tag, error=str(error), requested_by=taken.requested_by
            )
            self.windows.emit(failed)
        self._unconfirmed.clear()
        return not self._shared

    def lend(self) -> list[jax.Array]:
        """Returns the leaves of the present state to something outside. The next step leaves them alone."""
        self._shared = True
        return list(self.carry.leaves)

    def replace(self, leaves: list[jax.Array]) -> None:
        """Make ``leaves``, which something outside may hold too, the present state."""
        self.carry.leaves = leaves
        self.status.changes += 1
        self._shared = True

    def take(self, taken: SnapshotTaken) -> Snapshot:
        """Returns the snapshot that ``taken`` announces: the state of this boundary."""
        leaves, extensions = self.carry.leaves, self.compiled.extension_leaves(self.carry)
        if self._to_host:
            leaves, extensions = map(self._pool.copy, leaves), map(self._pool.copy, extensions)
        snapshot = Snapshot(
            taken.step,
            list(leaves),
            self.model.structure,
            tag=taken.tag,
            extensions=list(extensions),
            pool=self._pool,
            extension_paths=tuple(self.compiled.extension_types),
        )
        if not self._to_host:
            self._unconfirmed.append((snapshot, taken))
        return snapshot

    def _warmed_pool(self) -> PinnedPool:
        """Returns the pinned memory through which snapshots leave the device: pinned now, before the first step."""
        requests, carry = self.plane.requests, self.carry
        leaves = [*carry.leaves, *carry.ext_leaves]
        if not requests.checkpoints:
            if self._to_host:
                return PinnedPool.warmed(leaves)
            if requests.reads_snapshots:  # one leaf at a time
                return PinnedPool.warmed([max(leaves, key=lambda leaf: leaf.nbytes)])
            return PinnedPool()
        paths, wanted = self.model.structure.paths, list[jax.Array]()
        for request in requests.checkpoints:
            only = request.paths
            if only is None or self._to_host:
                written = leaves
            else:
                written = [leaf for path, leaf in zip(paths, carry.leaves, strict=True) if path in only]
            wanted += written * request.max_in_flight
        return PinnedPool.warmed(wanted)

    def share_needed_at_end(self) -> dict[str, Snapshot]:
        """Returns the kept snapshots that the end of the run needs, each to be released on its own."""
        tags = sorted({restore.tag for restore in self.plane.requests.final_restores})
        shares = {tag: self.share_kept(tag) for tag in tags}
        return {tag: share for tag, share in shares.items() if share is not None}

    def share_kept(self, tag: str) -> Snapshot | None:
        """Returns the snapshot ``tag``, to be released on its own; None if it is not kept.

        Another thread may release what it looks up at any moment, but not what this returns.
        """
        kept = self.plane.view.snapshots.get(tag)
        try:
            return None if kept is None else kept.device.share()
        except SnapshotError:
            return None

    def find(self, tag_or_step: str | int) -> KeptSnapshot:
        """Returns the kept snapshot of this tag, or of this step. Raises SnapshotError if there is none."""
        kept = self.plane.view.kept()
        found = kept.get(tag_or_step) or next((s for s in kept.values() if s.step == tag_or_step), None)
        if found is None:
            known = ", ".join(repr(tag) for tag in kept) or "none"
            raise SnapshotError(
                f"no snapshot {tag_or_step!r} is kept (kept: {known}). Take one with control.snapshot(tag)."
            )
        return found

    def restore(self, snapshot: Snapshot, part: Literal["all", "params"]) -> CheckpointRestored:
        """Make the state of ``snapshot``, or its params, the present one. The step count stays.

        Raises:
            SnapshotError: it was released.
            ConfigurationError: ``part`` is "params", and the trainer cannot tell which arrays are the weights.
        """
        if part == "params":
            self.model.require_params('restore(part="params")')
        carry, source = self.carry, self._on_device(snapshot.leaves, self.carry.leaves)
        if part == "params":
            leaves = list(carry.leaves)
            for index in self._params:
                leaves[index] = source[index]
        else:
            leaves = list(source)
            extensions = self._on_device(snapshot.extensions, self.compiled.extension_leaves(carry))
            carry.ext_leaves = self.compiled.with_extensions(carry, extensions)
        carry.leaves = leaves
        self.status.changes += 1
        self._shared = True
        return CheckpointRestored(
            step=self.status.step, tag=snapshot.tag, part=part, restored_step=snapshot.step
        )

    def _on_device(self, leaves: Sequence[jax.Array], places: Sequence[jax.Array]) -> Sequence[jax.Array]:
        if not self._to_host:
            return leaves
        return [move(leaf, place.sharding) for leaf, place in zip(leaves, places, strict=True)]
