"""``Event``, the base class of all events, and the bases of lifecycle events: those of an epoch, a run, and others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import ClassVar, Literal

from pydantic import Field

from eventtrain.events.models import Frozen

UNPUBLISHED = datetime.fromtimestamp(0, UTC)
"""The ``time`` of an event that no bus has stamped yet."""


class Event(Frozen):
    """Base class of all events. A subscription to ``Event`` receives every event.

    ``kind`` is the class name in snake_case, ``schema_version`` grows when a class changes its fields.
    """

    run_id: str = ""
    attempt: int = 0
    """How many times the run had begun or been resumed, from 1; 0 until published, and outside a run. A resumed run
    publishes other events under the same ``seq``: (run_id, attempt, stream, seq) names one event."""
    stream: Literal["training", "published"] | None = None
    """The sequence that ``seq`` counts in: events of the training loop, or those that handlers and services publish.
    None until published."""
    seq: int = 0
    """Position in its sequence, from 1; 0 until published."""
    process: int | None = None
    """Of an event that another process of the run has published: its ``jax.process_index()``. None: this process."""
    time: datetime = UNPUBLISHED
    step: int = Field(default=0, ge=0)
    schema_version: int = 1

    shared: ClassVar[bool] = True
    """Subscribers share events."""
    lifecycle: ClassVar[bool] = False
    """Lifecycle events (run, epoch, checkpoint, alert) are never dropped by any queue."""

    def is_multiple_of(self, every: int) -> bool:
        """Returns whether a subscription with ``every=`` receives this event."""
        return self.step % every == 0


class LifecycleEvent(Event):
    """Base class of events that no queue drops."""

    lifecycle: ClassVar[bool] = True


class EpochEvent(LifecycleEvent):
    """Base class of events that belong to a whole epoch: ``every`` counts epochs, starting at 1."""

    epoch: int = Field(ge=0)

    def is_multiple_of(self, every: int) -> bool:
        """Returns whether ``epoch + 1`` is a multiple of ``every``."""
        return (self.epoch + 1) % every == 0


class RunEvent(LifecycleEvent):
    """Base class of events that belong to a whole run: ``every`` omits none of them."""

    def is_multiple_of(self, every: int) -> bool:
        """Returns True."""
        return True
