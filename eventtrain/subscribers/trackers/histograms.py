"""``TrackedArrays``: arrays of the state, read from a snapshot now and then, in the thread of a tracker.

The loop keeps the state of one boundary; nothing is copied on the training thread, and nothing waits. One snapshot at
a time: while it is read, no other is asked for.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import ConfigurationError, SnapshotError, StorageError
from eventtrain.events import CommandRejected, EpochCompleted, SnapshotTaken, StepsCompleted
from eventtrain.subscribers._shared.validation import require_count
from eventtrain.subscribers.base import RunContext

logger = logging.getLogger("eventtrain")


class TrackedArrays:
    """Asks for snapshots on a schedule, and reads the arrays of one.

    Args:
        owner: name of the subscriber's class, for errors.
        every, every_epochs: steps and epochs between two snapshots; None: none.
        arrays: patterns (as of ``fnmatch``) of the arrays' names, such as ``params/dense/*``; None: the params.

    A name is the array's path in the state with slashes: ``['params']['w']`` is ``params/w``.
    """

    def __init__(
        self, owner: str, every: int | None, every_epochs: int | None, arrays: tuple[str, ...] | None
    ) -> None:
        if every is not None:
            require_count(owner, "histogram_every", every, at_least=1)
        if every_epochs is not None:
            require_count(owner, "histogram_every_epochs", every_epochs, at_least=1)
        if arrays is not None and every is None and every_epochs is None:
            raise ConfigurationError(
                f"{owner}(arrays={arrays!r}): of these histograms are made, and nothing says when. Give "
                "histogram_every (steps) or histogram_every_epochs."
            )
        self._owner = owner
        self._every = every
        self._every_epochs = every_epochs
        self._patterns = arrays
        self._run: RunContext | None = None
        self._tag = ""
        self._in_flight = False
        self._said = False

    def start(self, run: RunContext, name: str) -> None:
        """A run begins; ``name`` is the subscriber's."""
        self._run = run
        self._tag = f"{name} reads"
        self._in_flight = False

    def steps(self, event: StepsCompleted) -> None:
        """Ask for a snapshot if these steps are due."""
        if self._every is not None and event.is_multiple_of(self._every):
            self._ask()

    def epoch(self, event: EpochCompleted) -> None:
        """Ask for a snapshot if this epoch is due, and not the last one: the run would be over before it was taken."""
        run = self._run
        is_last = (
            run is not None and run.epochs is not None and event.epoch + 1 >= run.start_epoch + run.epochs
        )
        if self._every_epochs is not None and event.is_multiple_of(self._every_epochs) and not is_last:
            self._ask()

    def taken(self, event: SnapshotTaken) -> KeptSnapshot | None:
        """The snapshot that ``event`` tells of, if it is ours; ``read`` or ``done`` has to follow."""
        if event.tag != self._tag or self._run is None:
            return None
        return self._run.control.snapshots.get(self._tag)

    def rejected(self, event: CommandRejected) -> None:
        """The device has no room, say."""
        if getattr(event.command, "tag", None) == self._tag:
            self._in_flight = False
            if not self._said:
                logger.warning("%s makes no histograms of step %d: %s", self._owner, event.step, event.reason)
            self._said = True

    def read(self, snapshot: KeptSnapshot) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays by name, as they are on the host; only numbers. Blocks; afterwards the snapshot is released.

        Raises:
            StorageError: there is no such array, or the snapshot is gone.
        """
        try:
            return self._read(snapshot)
        except SnapshotError as error:
            raise StorageError(str(error)) from None
        finally:
            self.done(snapshot)

    def done(self, snapshot: KeptSnapshot | None = None) -> None:
        """Release a snapshot that is not read, and any that an earlier attempt left. Any thread."""
        if snapshot is None and self._run is not None:
            snapshot = self._run.control.snapshots.get(self._tag)
        if snapshot is not None:
            snapshot.release()
        self._in_flight = False

    def _ask(self) -> None:
        if not self._in_flight and self._run is not None:
            self._in_flight = True
            self._run.control.snapshot(self._tag, reason="histograms")

    def _read(self, snapshot: KeptSnapshot) -> dict[str, np.ndarray[Any, Any]]:
        assert self._run is not None
        params = {path for path in self._run.params.values() if path is not None}
        wanted = _Wanted(params if self._patterns is None else None, self._patterns or ())
        found = snapshot.device.host_leaves(wanted)
        arrays = {
            array_name(path): np.array(
                array
            )  # what CPU gives is a view, which would keep the device's memory
            for path, array in found.items()
            if isinstance(array, np.ndarray)
        }
        if not arrays:
            raise StorageError(
                f"no array of the state is called {' or '.join(self._patterns or ('params',))}; there are "
                f"{', '.join(sorted(map(array_name, wanted.asked))) or 'none'}"
            )
        return arrays


class _Wanted(Collection[str]):
    """The paths of what is read; nothing else is transferred."""

    def __init__(self, paths: set[str] | None, patterns: tuple[str, ...]) -> None:
        self.asked: list[str] = []
        self._paths = paths
        self._patterns = patterns

    def __contains__(self, path: object) -> bool:
        self.asked.append(str(path))
        if self._paths is not None:
            return path in self._paths
        name = array_name(str(path))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths or ())

    def __len__(self) -> int:
        return len(self._paths or ())


PART = re.compile(r"\[['\"]([^]]*)['\"]\]|\[([^]]*)\]|\.(\w+)")


def array_name(path: str) -> str:
    """``['params']['w'][0].bias`` is called ``params/w/0/bias``."""
    return PART.sub(lambda part: "/" + (part[1] or part[2] or part[3] or ""), path).strip("/") or "state"
