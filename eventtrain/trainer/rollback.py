"""What a trainer was before it took a checkpoint over: a checkpoint that is refused leaves no trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import jax

from eventtrain.control.command_queue import CommandQueue
from eventtrain.subscribers.base import Subscriber
from eventtrain.trainer.model import Model

logger = logging.getLogger("eventtrain")


class Rollback:
    """Remembers a trainer between two runs. Copies no array. The thread that called fit."""

    def __init__(self, model: Model, inbox: CommandQueue, subscribers: Sequence[Subscriber]) -> None:
        self._model = model
        self._inbox = inbox
        self._held: tuple[list[jax.Array], list[jax.Array] | None, int, int] | None = (
            model.leaves,
            model.ext_leaves,
            model.step,
            model.epoch,
        )
        self._snapshots = dict(inbox.snapshots)
        self._subscribers = [(one, dict(vars(one)), _state_of(one)) for one in subscribers]

    def put_back(self) -> None:
        """Make it so again."""
        if self._held is None:
            return
        model = self._model
        model.leaves, model.ext_leaves, model.step, model.epoch = self._held
        self._inbox.snapshots = self._snapshots
        for subscriber, attributes, state in self._subscribers:
            if state is not None:
                try:
                    subscriber.load_state_dict(state)  # into the objects that it holds, and may have changed
                except Exception as error:
                    logger.warning("%s refuses the state it had before: %s", type(subscriber).__name__, error)
            vars(subscriber).clear()
            vars(subscriber).update(attributes)

    def forget(self) -> None:
        """There is no way back: the state that was there is let go."""
        self._held = None
        self._subscribers.clear()
        self._snapshots = {}


def _state_of(subscriber: Subscriber) -> dict[str, Any] | None:
    """What it would save; None where it has nothing, or cannot say before its first run."""
    if type(subscriber).state_dict is Subscriber.state_dict:
        return None
    try:
        return copy.deepcopy(subscriber.state_dict())
    except Exception:
        return None
