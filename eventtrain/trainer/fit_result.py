"""What a call of ``fit`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from eventtrain.device.state import PyTree
from eventtrain.events import EpochCompleted


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns. Its repr leaves out the state and the history, which may fill many screens.

    Attributes:
        state: the state reached, on the device; valid until the caller gives it away. With a step extension whose
            ``use_for`` has "final", its weights stand in it; ``trainer.state`` has those that training goes on with.
        step: updates completed over the trainer's life.
        epochs_completed: of this call.
        stop_reason: "completed", or the reason given to ``control.stop``, "interrupted", "preempted", "cancelled".
        history: the EpochCompleted events of this call.
        undelivered: subscription name -> events not handled within ``drain_timeout_s``; empty if all were.
    """

    state: PyTree = field(repr=False)
    step: int
    epochs_completed: int
    stop_reason: str
    history: list[EpochCompleted] = field(repr=False)
    undelivered: Mapping[str, int]
