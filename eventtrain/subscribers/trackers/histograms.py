"""``HistogramSnapshots``: arrays of the state for histograms, read from snapshots in the thread of a tracker.

The loop keeps the state of one boundary; nothing is copied on the training thread, and nothing waits. There is one
snapshot at a time: while it is read, no other is requested.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Container
from typing import Any

import numpy as np

from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import ConfigurationError, SnapshotError, StorageError
from eventtrain.events import (
    CommandRejected,
    EpochCompleted,
    Event,
    RunResumed,
    RunStarted,
    SnapshotTaken,
    StepsCompleted,
)
from eventtrain.subscribers.base import RunContext
from eventtrain.validation.arguments import require_count

logger = logging.getLogger("eventtrain")

Array = np.ndarray[Any, Any]

BINS = 64
PATH_PART = re.compile(r"\[['\"]([^]]*)['\"]\]|\[([^]]*)\]|\.(\w+)")


class HistogramSnapshots:
    """Requests snapshots on a schedule, and reads the arrays of each. It needs events of the types ``events``.

    Args:
        owner: name of the subscriber's class, for errors.
        every, every_epochs: steps and epochs between two snapshots; None: none.
        arrays: patterns (as of ``fnmatch``) of the arrays' names, such as ``params/dense/*``; None: the params.
    """

    events = (RunStarted, RunResumed, StepsCompleted, EpochCompleted, SnapshotTaken, CommandRejected)

    def __init__(
        self, owner: str, every: int | None, every_epochs: int | None, arrays: tuple[str, ...] | None
    ) -> None:
        require_count(owner, "histogram_every", every, at_least=1, optional=True)
        require_count(owner, "histogram_every_epochs", every_epochs, at_least=1, optional=True)
        if arrays is not None and every is None and every_epochs is None:
            raise ConfigurationError(
                f"{owner}(arrays={arrays!r}): arrays requires a schedule. Set histogram_every (steps) or "
                "histogram_every_epochs."
            )
        self._owner = owner
        self._every = every
        self._every_epochs = every_epochs
        self._patterns = arrays
        self._run: RunContext | None = None
        self._tag = ""
        self._in_flight = False
        self._warned = False

    def start(self, run: RunContext, name: str) -> None:
        """Begins a run; ``name`` is the subscriber's. Raises ConfigurationError if it is to read unknown weights."""
        if self._patterns is None and (self._every is not None or self._every_epochs is not None):
            run.require_params(f"{self._owner}(histogram_every=...) without arrays")
        if self._every is not None or self._every_epochs is not None:
            run.read_snapshots()
        self._run = run
        self._tag = f"{name} reads"
        self._in_flight = False

    def handle(self, event: Event) -> KeptSnapshot | None:
        """Requests a snapshot if one is due; returns the one that ``event`` announces: ``read`` or ``release`` it."""
        run = self._run
        match event:
            case StepsCompleted():
                if self._every is not None and event.is_multiple_of(self._every):
                    self._request()
            case EpochCompleted():
                # Not of the last epoch: the run would end before it was taken.
                is_last = (
                    run is not None
                    and run.epochs is not None
                    and event.epoch + 1 >= run.start_epoch + run.epochs
                )
                is_due = self._every_epochs is not None and event.is_multiple_of(self._every_epochs)
                if is_due and not is_last:
                    self._request()
            case RunStarted() | RunResumed():
                self.release()  # of an earlier attempt
            case CommandRejected() if getattr(event.command, "tag", None) == self._tag:
                self._in_flight = False
                if not self._warned:  # for example because the device has no room
                    self._warned = True
                    logger.warning(
                        "%s makes no histograms of step %d: %s", self._owner, event.step, event.reason
                    )
            case SnapshotTaken() if event.tag == self._tag and run is not None:
                return run.control.snapshots.get(self._tag)
            case _:
                pass
        return None

    def read(self, snapshot: KeptSnapshot) -> dict[str, Array]:
        """Returns the arrays by name, as host arrays of numbers, and releases the snapshot. Blocks.

        Raises:
            StorageError: no array has such a name, or the snapshot was released before.
        """
        assert self._run is not None
        params = {path for path in self._run.params.values() if path is not None}
        wanted = _WantedPaths(params, self._patterns)
        try:
            found = snapshot.device.host_leaves(wanted)
            arrays = {
                array_name(path): array for path, array in found.items() if isinstance(array, np.ndarray)
            }
        except SnapshotError as error:
            raise StorageError(str(error)) from None
        finally:
            self.release(snapshot)
        if not arrays:
            raise StorageError(
                f"no array of the state is called {' or '.join(self._patterns or ('params',))}; there are "
                f"{', '.join(sorted(wanted.asked)) or 'none'}"
            )
        return arrays

    def release(self, snapshot: KeptSnapshot | None = None) -> None:
        """Releases a snapshot that is not read, or any that an earlier attempt left. Any thread."""
        if snapshot is None and self._run is not None:
            snapshot = self._run.control.snapshots.get(self._tag)
        if snapshot is not None:
            snapshot.release()
        self._in_flight = False

    def _request(self) -> None:
        if not self._in_flight and self._run is not None:
            self._in_flight = True
            self._run.control.snapshot(self._tag, reason="histograms")


class _WantedPaths(Container[str]):
    """Paths of the arrays to be read; no other is transferred."""

    def __init__(self, params: set[str], patterns: tuple[str, ...] | None) -> None:
        self.asked: list[str] = []
        self._params = params
        self._patterns = patterns

    def __contains__(self, path: object) -> bool:
        name = array_name(str(path))
        self.asked.append(name)
        if self._patterns is None:
            return path in self._params
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)


def array_name(path: str) -> str:
    """Returns the name of an array: that of ``['params']['w'][0].bias`` is ``params/w/0/bias``."""
    return PATH_PART.sub(lambda part: "/" + (part[1] or part[2] or part[3] or ""), path).strip("/") or "state"


def finite_values(array: Any) -> tuple[Array, int]:
    """Returns the finite values, float64[n], and the number of the others."""
    values = np.asarray(array, np.float64).ravel()
    finite = values[np.isfinite(values)]
    return finite, values.size - finite.size


def bin_edges(values: Array) -> Array:
    """Returns the edges of a histogram of finite float64 values, at least one; each value is in one of the bins."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
        return np.array([low, high]) if np.isfinite([low, high]).all() else np.array([values[0], values[0]])
    with np.errstate(over="ignore"):  # in halves: high - low may exceed float64
        edges = np.linspace(low / 2, high / 2, BINS + 1) * 2
    edges[0], edges[-1] = low, high
    return np.unique(edges)
