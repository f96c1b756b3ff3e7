"""Barrier: collects a consistent state of all subscriptions at one place in the event stream.

Asynchronous barrier snapshotting (Carbone et al., 2015, arXiv:1506.08603). A marker travels in the stream, behind the
last event of its step. It overtakes the events that wait in a subscription's queue: the subscription contributes its
state at its next handler boundary, together with the events that waited when the marker came.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar

from eventtrain.errors import SnapshotError
from eventtrain.events import Event

R = TypeVar("R")


@dataclass(frozen=True)
class SubscriptionCheckpoint:
    """Contribution of one subscription to a barrier.

    Attributes:
        about: what the state is about, such as the monitored metric; compared when a run resumes.
        state: the result of its ``state_dict``; None if it has none, or could not give it.
        error: why it could not give its state, or not make durable what belongs to it; None if it could.
        unhandled: the events before the marker that it has not handled, oldest first.
        decided_on: for each of them, whether the training loop waits for it (it has a finite lag).
        spent: a subscription with ``once`` has received its event.
        disabled: it was disabled after failures.
        failures: failures in a row before the marker.
    """

    state: Mapping[str, Any] | None = None
    unhandled: tuple[Event, ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = 0
    error: str | None = None
    about: Mapping[str, str] = field(default_factory=dict[str, str])


class Barrier(Generic[R]):
    """Collects the contributions of all subscriptions for one step. Any thread.

    Args:
        step: the marker is behind the last event of this step.
        run: what the training side adds to the checkpoint; the bus does not read it.
    """

    def __init__(self, step: int, run: R) -> None:
        self.step = step
        self.run = run
        self.seq = 0
        """Number of the last event in front of the marker; valid once ``wait`` has returned."""
        self._collected: dict[str, SubscriptionCheckpoint] = {}
        self._missing: set[str] | None = None  # None until the marker was routed
        self._problem: str | None = None
        self._changed = threading.Condition()

    @property
    def open(self) -> bool:
        """Whether a contribution may still arrive."""
        return self._problem is None and (self._missing is None or bool(self._missing))

    def expect(self, names: Iterable[str], seq: int) -> None:
        """Expects contributions of these subscriptions: the marker was routed behind event ``seq``."""
        with self._changed:
            self.seq = seq
            self._missing = set(names) - self._collected.keys()
            self._changed.notify_all()

    def add(self, name: str, checkpoint: SubscriptionCheckpoint) -> None:
        """Adds the contribution of one subscription."""
        with self._changed:
            self._collected[name] = checkpoint
            if self._missing is not None:
                self._missing.discard(name)
            self._changed.notify_all()

    def fail(self, name: str, error: Exception) -> None:
        """Makes ``wait`` raise: a subscription cannot contribute its state."""
        self.abandon(f"{name} could not give its state: {type(error).__name__}: {error}")

    def hurry(self, seq: int) -> None:
        """Completes the barrier without the contributions that are missing.

        Args:
            seq: number of the last event in front of the marker, if that was not routed.
        """
        with self._changed:
            if self._missing is None:
                self.seq = seq
            self._missing = set()
            self._changed.notify_all()

    def abandon(self, reason: str) -> None:
        """Makes ``wait`` raise with ``reason``: the barrier will never be complete. The first reason counts."""
        with self._changed:
            self._problem = self._problem or reason
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> dict[str, SubscriptionCheckpoint]:
        """Returns the contributions by subscription name. Blocks; never call it on the event loop.

        Raises:
            SnapshotError: a subscription did not reach the marker within ``timeout_s``, or the barrier was abandoned.
        """
        deadline_s = monotonic() + timeout_s
        with self._changed:
            while self.open:
                if not self._changed.wait(max(0.0, deadline_s - monotonic())):
                    break
            if self._problem is not None:
                raise SnapshotError(f"No checkpoint of step {self.step}: {self._problem}.")
            if self._missing is None or self._missing:
                late = ", ".join(sorted(self._missing)) if self._missing else "the event stream"
                raise SnapshotError(
                    f"No checkpoint of step {self.step}: {late} did not reach its marker within {timeout_s:g} s. A "
                    "handler that takes so long delays every checkpoint: give it a timeout_s, or raise the "
                    "Checkpointer's marker_timeout_s."
                )
            return dict(self._collected)


@dataclass(frozen=True, slots=True)
class Marker:
    """The place in the stream at which ``barrier`` is taken."""

    barrier: Barrier[Any]  # the training side's part has no type here


@dataclass(frozen=True, slots=True)
class SubscriptionRestore:
    """The place in the stream at which a subscription continues from its checkpoint, behind its activation."""

    name: str
    checkpoint: SubscriptionCheckpoint
