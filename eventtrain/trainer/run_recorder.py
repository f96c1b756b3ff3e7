"""Where a run is, said so that another can go on from there. Training thread only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eventtrain.control.run_state import ResumePoint, pack
from eventtrain.events.run_records import LoopRecord
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.train_loop import TrainingLoop
from eventtrain.trainer.model import Aim, Model


class DataPosition:
    """The state of the data's iterator after each batch trained on, though others are prefetched already."""

    def __init__(self, batch: int = 0, state: Any = None) -> None:
        self._first = batch
        self._states: Sequence[Any] = ()
        self._before = state

    def begin_group(self, batch: int, states: Sequence[Any]) -> None:
        """The batches from number ``batch`` of the epoch on come next; ``states``: after each of them."""
        self._before = self.after(batch)
        self._first, self._states = batch, states

    def begin_epoch(self) -> None:
        """Nothing of the epoch was trained on."""
        self._first, self._states, self._before = 0, (), None

    def after(self, batch: int) -> Any:
        """The state after ``batch`` batches of the epoch; None where the iterator has none."""
        count = batch - self._first
        return self._states[count - 1] if 0 < count <= len(self._states) else self._before

    def packed(self, batch: int) -> Any:
        """As JSON data. Raises TypeError where that cannot be."""
        return pack(self.after(batch))


class RunRecorder:
    """What a checkpoint says of a run besides what its loop knows: where it began, its aim, its place in the data.

    Args:
        model: as it is before the first step.
        aim: of this call of ``fit``.
        fingerprint: what an exact continuation depends on.
        resumption: what the run goes on from; it began where that run began.
    """

    def __init__(
        self, model: Model, aim: Aim, fingerprint: Mapping[str, Any], resumption: ResumePoint | None
    ) -> None:
        self._aim = aim
        self._fingerprint = fingerprint
        self._resumed = resumption.facts.loop if resumption is not None else None
        self.start_step, self.start_epoch = model.step, model.epoch
        self.data = DataPosition()
        if self._resumed is not None:
            self.start_step, self.start_epoch = self._resumed.start_step, self._resumed.start_epoch
            self.data = DataPosition(self._resumed.batch, self._resumed.data)

    def facts(self, loop: TrainingLoop, gates: LagGates) -> LoopRecord:
        """Where the run is. Raises TypeError where the data's iterator has a state that no checkpoint can hold."""
        position = loop.position
        return LoopRecord(
            step=position.step,
            epoch=position.epoch,
            batch=position.batch,
            in_epoch=position.in_epoch,
            step_started=loop.step_started,
            evaluation=loop.evaluation_here,
            evaluated_batches=loop.evaluated_batches,
            epoch_first_step=loop.epoch_first_step,
            start_step=self.start_step,
            start_epoch=self.start_epoch,
            epochs=self._aim.epochs,
            steps=self._aim.steps,
            ended=loop.effects.ended,
            data=self.data.packed(position.batch),
            deterministic=loop.effects.deterministic and not gates.timed_out(),
            fingerprint=dict(self._fingerprint),
        )

    def unchanged(self, loop: TrainingLoop) -> bool:
        """Whether the checkpoint from which the run resumed is still the last one that there can be of it."""
        if self._resumed is None or loop.effects.cut_short:
            return False
        facts, position = self._resumed, loop.position
        return (position.step, position.in_epoch, loop.effects.ended, loop.effects.changes) == (
            facts.step, facts.in_epoch, facts.ended, 0,
        )  # fmt: skip
