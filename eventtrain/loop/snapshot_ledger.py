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
from eventtrain.device.snapshot import Snapshot, to_pinned_host
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
        self._params = self.model.params_indices()
        self._unconfirmed: list[tuple[Snapshot, SnapshotTaken]] = []
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

    def take(self, taken: SnapshotTaken) -> Snapshot:
        """Returns the snapshot that ``taken`` announces: the state of this boundary."""
        leaves, extensions = self.carry.leaves, self.carry.ext_leaves
        if self._to_host:
            leaves, extensions = to_pinned_host(leaves), to_pinned_host(extensions)
        snapshot = Snapshot(
            taken.step,
            leaves,
            self.model.structure,
            tag=taken.tag,
            extensions=extensions,
            extension_paths=tuple(self.compiled.extension_types),
        )
        if not self._to_host:
            self._unconfirmed.append((snapshot, taken))
        return snapshot

    def needed_at_end(self) -> dict[str, Snapshot]:
        """Returns the kept snapshots that the end of the run needs, by tag."""
        kept = self.plane.view.kept()
        tags = {restore.tag for restore in self.plane.requests.final_restores if restore.tag in kept}
        return {tag: kept[tag].device.share() for tag in tags}

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

    def restore(self, kept: KeptSnapshot, part: Literal["all", "params"]) -> CheckpointRestored:
        """Make the state of ``kept``, or its params, the present one. The step count stays."""
        carry, source = self.carry, self._on_device(kept.device.leaves, self.carry.leaves)
        if part == "params":
            leaves = list(carry.leaves)
            for index in self._params:
                leaves[index] = source[index]
        else:
            leaves = list(source)
            extensions = self._on_device(kept.device.extensions, carry.ext_leaves)
            # The first extension leaf is the number of completed steps, which never goes back.
            carry.ext_leaves = [*carry.ext_leaves[:1], *extensions[1:]]
        carry.leaves = leaves
        self.status.changes += 1
        self._shared = True
        return CheckpointRestored(
            step=self.status.step, tag=kept.device.tag, part=part, restored_step=kept.step
        )

    def _on_device(self, leaves: Sequence[jax.Array], places: Sequence[jax.Array]) -> Sequence[jax.Array]:
        if not self._to_host:
            return leaves
        return [jax.device_put(leaf, place.sharding) for leaf, place in zip(leaves, places, strict=True)]
