"""``RunView``: what ``Control`` shows of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.snapshot import Snapshot
from eventtrain.events.models import Number

NONE: Mapping[str, Number] = MappingProxyType({})


class RunView:
    """The values of a run that any thread may read. Each is replaced as a whole, never changed in place.

    Attributes:
        step: updates dispatched so far. Written by the training thread.
        hyperparams: values in effect, by label. Written by the training thread.
        scheduled: the hyperparameters that follow a schedule, as of the newest step fetched. Written by the fetch
            thread.
        snapshots: taken by tag, released ones included. Written by the training thread.
        ask_to_release: asks process 0 to have every process release the snapshot of this tag and step. None where
            snapshots are released at once: on process 0, and between runs.
    """

    def __init__(self) -> None:
        self.step = 0
        self.hyperparams = NONE
        self.scheduled = NONE
        self.snapshots: dict[str | int, KeptSnapshot] = {}
        self.ask_to_release: Callable[[str, int], None] | None = None

    def keep(self, tag: str, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` under ``tag``, until something releases it. Training thread only."""
        self.snapshots[tag] = KeptSnapshot(snapshot, partial(self._release, tag, snapshot))

    def _release(self, tag: str, snapshot: Snapshot) -> None:
        if self.ask_to_release is None:
            snapshot.release()
        else:
            self.ask_to_release(tag, snapshot.step)

    def kept(self) -> dict[str | int, KeptSnapshot]:
        """Returns the snapshots that were not released, by tag. Any thread."""
        return {tag: kept for tag, kept in list(self.snapshots.items()) if not kept.device.released}
