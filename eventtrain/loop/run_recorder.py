"""``RunRecorder``: the record of where a run is, from which another run can continue. Training thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from eventtrain.control.run_state import LoopRecord, pack
from eventtrain.data.batch_group import BatchGroup
from eventtrain.errors import listed
from eventtrain.events.models import Number
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.run_status import EvalPosition, RunStatus

logger = logging.getLogger("eventtrain")

_Part: TypeAlias = "tuple[int, tuple[Any, ...], BatchGroup | None]"
"""Number of the first batch of a group, the states after each of its batches, and the group where it is kept."""


class DataPosition:
    """The last batch trained on, and the state of the data's iterator after it. Later ones may be prefetched."""

    def __init__(self, batch: int = 0, state: Any = None) -> None:
        self._state = state
        self._before: _Part = (batch, (), None)
        self._present: _Part = (batch, (), None)

    def begin_group(self, batch: int, group: BatchGroup | None, *, keeps: bool) -> None:
        """The next batches are those of ``group``, from number ``batch`` of the epoch on.

        Args:
            keeps: whether ``last_batch`` may be asked for them.
        """
        self._before = self._present
        self._present = batch, () if group is None else group.positions, group if keeps else None

    def begin_epoch(self) -> None:
        """No batch of the epoch was trained on."""
        self._state, self._before, self._present = None, (0, (), None), (0, (), None)

    def after(self, batch: int) -> Any:
        """Returns the state after ``batch`` batches of the epoch; None if the iterator has no state."""
        for first, positions, _ in (self._present, self._before):
            if first < batch <= first + len(positions):
                return positions[batch - first - 1]
        return self._state

    def last_batch(self, batch: int) -> Callable[[], Any] | None:
        """Returns what reads the last one of ``batch`` batches of the epoch, not on this thread; None if not known."""
        for first, _, group in (self._present, self._before):
            if group is not None and first < batch <= first + len(group):
                return partial(group.__getitem__, batch - first - 1)
        return None


@dataclass(frozen=True)
class Aim:
    """The aim of one call of ``fit``: epochs or steps; neither in a session. ``steps_per_epoch`` if it is known."""

    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None


class RunRecorder:
    """Adds to the status of the loop what a checkpoint holds besides: the beginning of the run, its aim, its data.

    Args:
        start_step, start_epoch: completed when the run begins.
        aim: of this call of ``fit``.
        fingerprint: what an exact continuation depends on.
        resumed: the record from which the run resumes. The run then began where that run began.
        attempt: how many times the run has begun or been resumed.
        given: path -> value, of the hyperparameters that this call of ``fit`` was given.
    """

    def __init__(
        self,
        start_step: int,
        start_epoch: int,
        aim: Aim,
        fingerprint: Mapping[str, Any],
        resumed: LoopRecord | None = None,
        *,
        attempt: int = 1,
        given: Mapping[str, Number] | None = None,
    ) -> None:
        self.aim = aim
        self.attempt = attempt
        self._given = dict(given or {})
        self.data = DataPosition()
        self.start_step, self.start_epoch = start_step, start_epoch
        self._fingerprint = dict(fingerprint)
        self._resumed = resumed
        if resumed is not None:
            self.start_step, self.start_epoch = resumed.start_step, resumed.start_epoch
            self.data = DataPosition(resumed.batch, resumed.data)

    def note_batch(self, shapes: Sequence[str]) -> None:
        """Records what the first batch is like, and logs it if the first batch of the run that it resumes was not."""
        data = self._fingerprint["data"] = {**self._fingerprint.get("data", {}), "batch": [*shapes]}
        before = self._resumed.fingerprint.get("data", {}).get("batch") if self._resumed is not None else None
        if before not in (None, data["batch"]):
            logger.warning(
                "The first batch after the checkpoint is %s, and that of the run was %s. The position in the data is "
                "counted in batches, so with another batch size the epoch does not continue with the same examples.",
                listed(shapes), listed(before),
            )  # fmt: skip

    def record(
        self,
        status: RunStatus,
        gates: LagGates,
        *,
        evaluation: Literal["none", "pending", "done"],
        cut: EvalPosition | None,
    ) -> LoopRecord:
        """Returns where the run is.

        Args:
            evaluation, cut: how far the evaluation of this boundary is.

        Raises:
            TypeError: the state of the data's iterator cannot be saved.
        """
        return LoopRecord(
            step=status.step,
            epoch=status.epoch,
            batch=status.batch,
            in_epoch=status.in_epoch,
            step_started=status.announced_step == status.step,
            evaluation=evaluation,
            evaluated_batches=None if cut is None else cut.batches,
            evaluated_sets=() if cut is None else cut.sets,
            epoch_first_step=status.epoch_first_step,
            start_step=self.start_step,
            start_epoch=self.start_epoch,
            epochs=self.aim.epochs,
            steps=self.aim.steps,
            ended=status.ended,
            data=pack(self.data.after(status.batch)),
            deterministic=status.deterministic and not gates.timed_out(),
            fingerprint=dict(self._fingerprint),
            attempt=self.attempt,
            given=self._given,
        )

    def unchanged(self, status: RunStatus) -> bool:
        """Returns whether the checkpoint from which the run resumed still describes it completely."""
        resumed = self._resumed
        if resumed is None or status.cut_short:
            return False
        return (status.step, status.in_epoch, status.ended, status.changes) == (
            resumed.step, resumed.in_epoch, resumed.ended, 0,
        )  # fmt: skip
