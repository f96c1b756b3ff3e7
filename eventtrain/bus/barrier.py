"""The bus' side of one consistent cut: what each subscription that takes part holds at one place in the stream.

Asynchronous barrier snapshotting (Carbone et al., 2015, arXiv:1506.08603): a marker travels in the stream, behind the
last event of its step. It overtakes what waits in a subscription's queue; what the subscription stores is its state at
its next handler boundary together with the events that still waited when the marker came.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from eventtrain.errors import SnapshotError
from eventtrain.events import BUILT_IN, Event
from eventtrain.events.run_records import LoopRecord, StreamRecord


@dataclass(frozen=True)
class SubscriptionState:
    """What one subscription contributes.

    Attributes:
        state: what its ``state_dict`` gave; None where it has none.
        unhandled: the events up to the cut that it has not handled, oldest first.
        decided_on: for each of them, whether the training loop waits for it (it has a finite lag).
        spent: a subscription with ``once`` has been given its event.
        disabled: it was switched off after failures.
        failures: in a row, until the cut.
    """

    state: Mapping[str, Any] | None = None
    unhandled: tuple[Event, ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = 0


@dataclass
class Barrier:
    """Collects the shares of one cut. Any thread.

    Attributes:
        step: the cut lies behind the last event of this step.
        loop: where the loop was; None until it has said so.
        stream: where its stream was; None until the marker was routed.
    """

    step: int
    loop: LoopRecord | None = None
    stream: StreamRecord | None = None

    def __post_init__(self) -> None:
        self.orders: list[Any] = []
        """Commands of the loop's side that were not due, or came while the cut was open."""
        self._shares: dict[str, SubscriptionState] = {}
        self._missing: set[str] | None = None
        self._problem: str | None = None
        self._moved = threading.Condition()

    @property
    def open(self) -> bool:
        """Whether somebody may still give something."""
        return self._problem is None and (self._missing is None or bool(self._missing))

    def expect(self, names: Iterable[str], seq: int) -> None:
        """The marker was routed behind event ``seq``: these subscriptions take part."""
        with self._moved:
            if self.stream is not None:
                self.stream = self.stream.model_copy(update={"seq": seq})
            self._missing = set(names) - self._shares.keys()
            self._moved.notify_all()

    def give(self, name: str, share: SubscriptionState) -> None:
        """A subscription's share."""
        with self._moved:
            self._shares[name] = share
            if self._missing is not None:
                self._missing.discard(name)
            self._moved.notify_all()

    def fail(self, name: str, error: Exception) -> None:
        """A subscription cannot give its share."""
        with self._moved:
            self._problem = f"{name} could not give its state: {type(error).__name__}: {error}"
            self._moved.notify_all()

    def abandon(self, reason: str) -> None:
        """The cut will never be complete; whoever waits is told why."""
        with self._moved:
            self._problem = self._problem or reason
            self._moved.notify_all()

    def wait(self, timeout_s: float) -> dict[str, SubscriptionState]:
        """The shares by subscription name. Blocks; not for the event loop.

        Raises:
            SnapshotError: a subscription did not reach the marker in time, or could not give its state; by name.
        """
        deadline_s = monotonic() + timeout_s
        with self._moved:
            while self.open:
                if not self._moved.wait(max(0.0, deadline_s - monotonic())):
                    break
            if self._problem is not None:
                raise SnapshotError(f"No checkpoint of step {self.step}: {self._problem}.")
            if self._missing is None or self._missing:
                who = ", ".join(sorted(self._missing)) if self._missing else "the event stream"
                raise SnapshotError(
                    f"No checkpoint of step {self.step}: {who} did not reach its marker within {timeout_s:g} s. A "
                    "handler that takes so long holds up every checkpoint: give it a timeout_s, or raise the "
                    "Checkpointer's marker_timeout_s."
                )
            return dict(self._shares)


@dataclass(frozen=True, slots=True)
class Marker:
    """A place in the stream where ``cut`` is taken."""

    cut: Barrier


@dataclass(frozen=True, slots=True)
class Redelivery:
    """What a subscription had not handled at the cut from which the run resumes; its place is behind its activation."""

    name: str
    share: SubscriptionState


def can_be_stored(event: Event) -> bool:
    """Whether it can be read back: one of the built-in classes."""
    return type(event) in BUILT_IN
