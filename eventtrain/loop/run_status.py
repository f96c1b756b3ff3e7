"""``RunStatus``: where a run is and what it has been told, shared by everything that runs on its training thread."""

from __future__ import annotations

from dataclasses import dataclass

from eventtrain.events import TO_BE_CONTINUED
from eventtrain.loop.agreement.log import Moment


@dataclass(frozen=True)
class EvalPosition:
    """Position in an evaluation that was cut short: batches of the sets before, and of the one in progress."""

    sets: tuple[int, ...] = ()
    batches: int = 0


@dataclass(slots=True)
class RunStatus:
    """The state of a run between two steps. Training thread only; every part of the loop holds the same object.

    Attributes:
        step: updates dispatched.
        epoch: epochs completed.
        batch: steps dispatched of the epoch in progress.
        in_epoch: EpochStarted of ``epoch`` was published, and EpochCompleted was not.
        epoch_first_step: updates before the epoch in progress.
        announced_step: the step after which StepStarted of the next one was published last, for deciders; -1 if
            never.
        paused: a command holds the loop.
        stop_reason: why the run has to end; None while it continues.
        signal: number of the signal behind it, on whichever process that arrived; None if there was none.
        ended: the same if the run is not to be resumed with the same aim.
        deterministic: nothing that depends on timing has taken effect.
        changes: how often something other than a step has changed the state.
        phase: number of epochs and evaluations that began or ended.
        phase_step: updates dispatched when the phase began.
        evaluated: batches of an evaluation dispatched in the phase.
    """

    step: int
    epoch: int
    batch: int = 0
    in_epoch: bool = False
    epoch_first_step: int = 0
    announced_step: int = -1
    paused: bool = False
    stop_reason: str | None = None
    signal: int | None = None
    ended: str | None = None
    deterministic: bool = True
    changes: int = 0
    phase: int = 0
    phase_step: int = 0
    evaluated: int = 0

    @property
    def moment(self) -> Moment:
        """The present moment: the same on every process of the run that has dispatched and published as much."""
        return Moment(self.phase, self.step - self.phase_step + self.evaluated)

    def begin_phase(self) -> None:
        """Begin the next phase: something other than a step is about to be dispatched or published."""
        self.phase += 1
        self.phase_step = self.step
        self.evaluated = 0

    @property
    def cut_short(self) -> bool:
        """Whether the run has to end for a reason from outside, so that another run may continue from its state."""
        return self.stop_reason in TO_BE_CONTINUED

    def stop(self, reason: str, *, final: bool, signal: int | None = None) -> None:
        """End the run at this boundary; only the first reason counts."""
        if self.stop_reason is None:
            self.stop_reason, self.signal = reason, signal
            self.ended = reason if final and not self.cut_short else None
