"""``Event``, the base class of all events, and the bases of those that belong to an epoch or a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import ClassVar

from pydantic import Field

from eventtrain.events.models import Frozen

UNPUBLISHED = datetime.fromtimestamp(0, UTC)
"""The ``time`` of an event that no bus has stamped yet."""


class Event(Frozen):
    """What every event carries; subscribing to ``Event`` means everything.

    ``kind`` is the class name in snake_case, ``schema_version`` grows when a class changes its fields.
    """

    run_id: str = ""
    seq: int = 0
    """Position in its sequence, from 1; 0 while unpublished. The loop's events are numbered in one stream,
    those that handlers and services publish in another."""
    time: datetime = UNPUBLISHED
    step: int = Field(default=0, ge=0)
    schema_version: int = 1

    lifecycle: ClassVar[bool] = False
    """Lifecycle events (run, epoch, checkpoint, alert) are never dropped by any queue."""

    def is_multiple_of(self, every: int) -> bool:
        """Whether a subscription with ``every=`` is due for this event."""
        return self.step % every == 0


class EpochEvent(Event):
    """An event that belongs to a whole epoch: ``every`` counts epochs, the first being 1."""

    lifecycle: ClassVar[bool] = True
    epoch: int = Field(ge=0)

    def is_multiple_of(self, every: int) -> bool:
        """Whether ``epoch + 1`` is a multiple of ``every``."""
        return (self.epoch + 1) % every == 0


class RunEvent(Event):
    """An event that belongs to a whole run: ``every`` leaves none out."""

    lifecycle: ClassVar[bool] = True

    def is_multiple_of(self, every: int) -> bool:
        """True, at whatever step the run begins or ends."""
        return True
