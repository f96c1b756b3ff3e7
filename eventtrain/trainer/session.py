"""``Session``: a run that your own loop drives."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

import jax

from eventtrain.control.control import Control
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.data.batch_group import GroupMakerOfSplitBatches
from eventtrain.data.global_batches import require_global
from eventtrain.data.sources import evaluation_sets
from eventtrain.device.batch_sharding import BatchSharding
from eventtrain.device.compiled_step import StepProgram
from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted
from eventtrain.trainer.run import Run
from eventtrain.trainer.tracebacks import UserFrames
from eventtrain.validation.callables import require_plain

S = TypeVar("S")


class Session(Generic[S]):
    """A run in progress. Made by ``trainer.session()``. All methods belong to the thread that entered it.

    ::

        with trainer.session() as session:
            for batch in batches:
                session.step(batch)
    """

    def __init__(self, run: Run, control: Control) -> None:
        self._run = run
        self._control = control
        self._has_peers = jax.process_count() > 1
        self._user_frames = UserFrames(everything=run.source.model.options.debug)

    @property
    def control(self) -> Control:
        """Commands without a cause, as a service issues them."""
        return self._control

    @property
    def state(self) -> S:
        """The training state after the steps so far, on the device. Reading it copies nothing and does not wait.

        What you read stays valid while training continues: the next step writes its result elsewhere, which takes the
        memory of a second state while you hold the first. Do not donate it.

        Setting it replaces the state between two steps. The new one must have the same structure, shapes and dtypes;
        nothing is recompiled. It waits for hyperparameters of the optimiser that are replaced, and for nothing else. A
        checkpoint of step k holds the state as it is when ``step`` is called for step k + 1.

        Raises:
            StateError: the new state differs in more than its values.
            ConfigurationError: set after the end.
        """
        return self._run.state

    @state.setter
    def state(self, state: S) -> None:
        self._run.state = state

    @property
    def step_count(self) -> int:
        """Steps completed, including those still on the device. In a session that resumes, those of the whole run."""
        return self._run.status.step

    @property
    def batch(self) -> int:
        """Steps of the epoch in progress: in a session that resumes, the batches of it that are trained on."""
        return self._run.status.batch

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._run.status.epoch

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._run.status.in_epoch

    @property
    def stop_reason(self) -> str | None:
        """Why the run has to end; None while it may continue."""
        return self._run.status.stop_reason

    @property
    def ended_by(self) -> str:
        """Why the run ended; empty before its end."""
        return self._run.ended_by

    @property
    def undelivered(self) -> dict[str, int]:
        """After the end: subscription name -> events not handled within ``drain_timeout_s``, and rows not written."""
        return self._run.undelivered

    @property
    def history(self) -> list[EpochCompleted]:
        """The newest 10,000 EpochCompleted events so far, as a new list; those of the last epoch after the end."""
        return list(self._run.resources.builder.history)

    def step(self, batch: Any) -> bool:
        """Dispatch one step and return at once. Returns False, and does nothing, once the run has to end.

        Raises:
            StepError, StateError, MetricsError, DataError: step_fn or the batch is invalid; at its first call.
            DataError: the batch has NumPy arrays, in a run of several processes.
        """
        run = self._run
        try:
            if self._has_peers:
                require_global(batch, "session.step was given")
            if run.status.in_epoch and run.loop is not None and not (run.grouped or run.ended_by):
                return run.loop.step(batch) == 1
            steps_per_call = run.source.model.options.steps_per_call
            return run.advance((batch,) * steps_per_call if run.grouped else batch, 1) == 1
        except BaseException as error:  # a block with UserFrames costs each step 0.2 us
            self._user_frames.remove_from(error)
            raise

    def prepare(self, batch: Any) -> None:
        """Compile the step for ``batch`` before its first use; once per run. Blocks until compiled.

        Args:
            batch: as for ``step``; a tuple of ``steps_per_call`` batches if that is above 1.
        """
        with self._user_frames:
            if self._has_peers:
                require_global(batch, "session.prepare was given")
            self._run.prepare(batch)

    def begin_epoch(self) -> bool:
        """Begin an epoch, and publish EpochStarted. Returns False if the run has to end.

        The first ``step`` does it if you do not.
        """
        return self._run.begin_epoch()

    def end_epoch(self, eval_data: Any = None) -> bool:
        """End the epoch: evaluate on ``eval_data`` if given, then publish EpochCompleted.

        Returns False if the run has to end.
        """
        source = self._run.source
        self._run.require_open()
        if eval_data is not None and source.model.eval_fn is None:
            raise ConfigurationError(
                "end_epoch(eval_data=...) requires an eval_fn: Trainer(..., eval_fn=(state, batch) -> metrics)."
            )
        if eval_data is not None and self._run.status.in_epoch:
            evaluation_sets(eval_data)
            source.data = eval_data
        with self._user_frames:
            return self._run.end_epoch()

    def statistics(self) -> LoopStatistics:
        """Returns where the training thread's time went so far. Any thread; never blocks."""
        return self._run.statistics()

    def program(self) -> StepProgram | None:
        """Returns what the step was compiled to; None before the first one. Any thread; never blocks."""
        return self._run.program()

    def flush(self) -> None:
        """Send the metrics of all steps dispatched so far to the subscribers. Does not wait."""
        if self._run.loop is not None:
            self._run.loop.windows.flush()

    def block_until_ready(self) -> None:
        """Wait until the device has finished every step dispatched so far."""
        if self._run.loop is not None:
            carry = self._run.loop.carry
            carry.cursor.block_until_ready()
            jax.block_until_ready(carry.leaves)

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait until ``ready()``, serving commands and flushing in time. Returns False if the run has to end first."""
        require_plain("session.wait: ready", ready)
        return self._run.wait(ready)

    def idle(self, seconds: float) -> bool:
        """Wait for ``seconds``, serving commands and flushing in time. Returns False if the run has to end first."""
        end_s = monotonic() + seconds
        return self.wait(lambda: monotonic() >= end_s)


class _SplittingSession(Session[S]):
    """A session of which each device gets its part of the batches."""

    def __init__(self, run: Run, control: Control, split: BatchSharding) -> None:
        super().__init__(run, control)
        self._maker = GroupMakerOfSplitBatches(1, split)

    def step(self, batch: Any) -> bool:
        return super().step(self._maker.place(batch))

    def prepare(self, batch: Any) -> None:
        batches = batch if self._run.grouped else (batch,)
        placed = tuple(map(self._maker.place, batches))
        super().prepare(placed if self._run.grouped else placed[0])


def session_of(run: Run, control: Control) -> Session[Any]:
    """Returns the session of a run."""
    split = run.source.model.split
    if split is None or jax.process_count() > 1:
        return Session(run, control)
    return _SplittingSession(run, control, split)
