"""``Checkpointer``: writes snapshots of the run to disk, in a thread of its own, while training continues."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eventtrain.control.control import Control
from eventtrain.control.requests import WhenFull
from eventtrain.control.run_state import SavedRun
from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import (
    CheckpointFailed,
    CheckpointSkipped,
    EpochCompleted,
    EvalCompleted,
    Event,
    SnapshotTaken,
)
from eventtrain.subscribers._shared.metric_goal import Goal, Mode, make_goal
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.paths import directory_path, require_writable_folder
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.checkpointing.naming import (
    DEFAULT_TEMPLATE,
    check_template,
    fill_template,
    scheduled_tag,
)
from eventtrain.subscribers.checkpointing.reader import find_checkpoint, load_state
from eventtrain.subscribers.checkpointing.retention import Retention
from eventtrain.subscribers.checkpointing.writer import CheckpointWriter, PendingCheckpoint, WriteOptions
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number

__all__ = ["Checkpointer", "load_state", "restore_state"]

logger = logging.getLogger("eventtrain")

RESCUE_TIMEOUT_S = 60.0
"""How long the end of a run whose event loop is blocked waits for its last checkpoint."""

restore_state = load_state


class BestMetricState(SavedState):
    """The best value on disk; ``step`` is that of the value, None if it was given as a threshold."""

    version: Literal[1] = 1
    value: float | None = None
    step: int | None = None
    before: float | None = None


class CheckpointerState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    best_of: str = ""
    """Monitor, mode and unit of ``best``."""
    best: BestMetricState | None = None
    """Of a Checkpointer that writes only improvements."""
    runs: tuple[str, ...] = ()
    """Ids of the run and of those that it resumed; their checkpoints count as its own."""
    measured_at: int = -1
    """Step of the metrics ``measured``; -1 before the first."""
    measured: dict[str, float] = Field(default_factory=dict)


class Checkpointer(Subscriber):
    """Writes checkpoints, each of the whole run as it was at exactly one step; ``fit(resume=True)`` continues from it.

    Args:
        directory: relative to ``run_dir``; created if missing. Each checkpoint is a folder in it. Nothing in it is ever
            overwritten.
        every: steps; ``every_epochs``: epochs; ``every_s``: seconds. Any of them, also several or none. In addition,
            ``control.checkpoint(tag)`` requests a checkpoint.
        max_to_keep: after each commit, the oldest checkpoints of this run beyond this number are deleted. None retains
            all. Those with a tag are never deleted.
        at_end: also write the state after the last step, however the run ends: by itself, by Ctrl-C, SIGTERM or an
            exception. None: unless ``save_best_only``.
        monitor: a metric of EpochCompleted, for the options that follow.
        mode: "min", "max", or "auto" by the metric's name.
        save_best_only: instead of a schedule: at the end of each epoch (of every ``every_epochs``-th) in which the
            metric is better than ever before (``lag=0``). Commands are then left to other Checkpointers, if there are
            any.
        initial_value_threshold: with ``save_best_only``: the first value must be better than this.
        keep_best: this many checkpoints with the best values are retained as well. Only a checkpoint of the step at
            which the metric was measured has a value.
        monitor_unit: "epochs", or "evaluations": use EvalCompleted, also in the middle of an epoch.
        keep_every: checkpoints of steps that are a multiple of it are never deleted.
        save_weights_only: write only the params (``Trainer(params=...)``), for ``et.load_state``; a run cannot resume
            from them.
        template: name of the folder, with the fields ``{step}`` and ``{epoch}`` (completed) and those of metrics, which
            may have a format (``{val_loss:.3f}``). The default is used if a metric was not measured at that step. A tag
            is appended to it.
        max_in_flight: how many checkpoints may be taken and not written yet. Each holds a state: in pinned host memory,
            or on the device if that has no such memory or the host has too little.
        when_full: with one more, training waits ("wait"), or it is left out with CheckpointSkipped ("skip") or
            CheckpointFailed ("fail").
        marker_timeout_s: how long a checkpoint waits for the states of the subscribers.
        fsync: a checkpoint gets its name when all files are on the disk, and is committed when the name is.
        retries: after a failure on disk; each after ``retry_delay_s``, which doubles. After a checkpoint has failed,
            the next ones are tried once each, until one is committed.
        on_failure: "continue" training after CheckpointFailed, or "stop" the run.

    Events: CheckpointStarted; then CheckpointCommitted, when the checkpoint has its final name and can be restored, or
    CheckpointFailed with the reason. One thread writes them, one after the other.

    Raises:
        ConfigurationError: an argument is invalid, or arguments contradict each other.
    """

    disable_after = None  # one full disk must not end all checkpoints

    per_host = True  # each process writes its shards
    process_0_decides = True

    @checked
    def __init__(
        self,
        directory: str | Path,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
        max_to_keep: int | None = 3,
        *,
        at_end: bool | None = None,
        monitor: str | None = None,
        mode: Mode = "auto",
        save_best_only: bool = False,
        initial_value_threshold: float | None = None,
        keep_best: int | None = None,
        monitor_unit: Literal["epochs", "evaluations"] = "epochs",
        keep_every: int | None = None,
        save_weights_only: bool = False,
        template: str = DEFAULT_TEMPLATE,
        max_in_flight: int = 2,
        when_full: WhenFull = "wait",
        marker_timeout_s: float = 60.0,
        fsync: bool = True,
        retries: int = 2,
        retry_delay_s: float = 1.0,
        on_failure: Literal["continue", "stop"] = "continue",
    ) -> None:
        require_count("Checkpointer", "every", every, at_least=1, optional=True)
        require_count("Checkpointer", "every_epochs", every_epochs, at_least=1, optional=True)
        require_count("Checkpointer", "max_to_keep", max_to_keep, at_least=1, optional=True)
        require_count("Checkpointer", "keep_best", keep_best, at_least=1, optional=True)
        require_count("Checkpointer", "keep_every", keep_every, at_least=1, optional=True)
        require_count("Checkpointer", "max_in_flight", max_in_flight, at_least=1)
        require_count("Checkpointer", "retries", retries)
        require_number("Checkpointer", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("Checkpointer", "marker_timeout_s", marker_timeout_s, above=0)
        require_number("Checkpointer", "every_s", every_s, above=0, optional=True)
        require_number("Checkpointer", "initial_value_threshold", initial_value_threshold, optional=True)
        require_choice("Checkpointer", "monitor_unit", monitor_unit, ("epochs", "evaluations"))
        require_choice("Checkpointer", "when_full", when_full, ("wait", "skip", "fail"))
        require_choice("Checkpointer", "on_failure", on_failure, ("continue", "stop"))
        self._goal: Goal | None = None
        if save_best_only or keep_best is not None:
            if monitor is None:
                raise ConfigurationError(
                    'Checkpointer(save_best_only=..., keep_best=...): requires a metric, such as monitor="val_loss".'
                )
            self._goal = make_goal("Checkpointer", monitor, mode, 0.0)
        if save_best_only and not (every is None and every_s is None):
            raise ConfigurationError(
                f"Checkpointer(save_best_only=True, every={every!r}, every_s={every_s!r}): every and every_s must be "
                "None, since the metric is measured at the end of an epoch. For the best ones between them, evaluate "
                'there with EvaluateEvery, and pass monitor_unit="evaluations".'
            )
        if initial_value_threshold is not None and not save_best_only:
            raise ConfigurationError(
                f"Checkpointer(initial_value_threshold={initial_value_threshold!r}): requires save_best_only=True."
            )
        self._best = BestMetricState(value=initial_value_threshold) if save_best_only else None
        self._best_every = every_epochs or 1
        self._directory = directory_path(directory, "Checkpointer", may_be_run_dir=True)
        self.shared_directories = (self._directory,)
        self._template = template
        self._template_metrics = check_template(template)
        self._monitor = monitor
        self._reader: MetricReader | None = None
        self._by_evaluation = monitor_unit == "evaluations"
        self._may_lack_evaluations = False
        self._stops_on_failure = on_failure == "stop"
        self._schedule: dict[str, Any] = {
            "every": every,
            "every_epochs": None if save_best_only else every_epochs,
            "every_s": every_s,
            "at_end": not save_best_only if at_end is None else at_end,
            "on_command": not save_best_only,
            "max_in_flight": max_in_flight,
            "when_full": when_full,
        }
        direction = self._goal.mode if self._goal is not None else "min"
        self._best_of = f"{monitor} ({direction}, {monitor_unit})"
        self._retention = Retention(max_to_keep, keep_best, keep_every, direction, monitor)
        self._options = WriteOptions(
            marker_timeout_s=marker_timeout_s,
            fsync=fsync,
            retries=retries,
            retry_delay_s=retry_delay_s,
            weights_only=save_weights_only,
        )
        measured = EpochCompleted if monitor_unit == "epochs" else EvalCompleted
        self.events = (SnapshotTaken, CheckpointFailed, CheckpointSkipped)
        if monitor is not None or self._template_metrics:
            self.events = (*self.events, measured)
        self.lag = {measured: 0} if save_best_only else None
        self.resumes_runs = not save_weights_only
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._warned_of_missing = False
        self._has_read = False
        self._runs: tuple[str, ...] = ()
        self._run: RunContext | None = None
        self._writer: CheckpointWriter | None = None

    @property
    def _name(self) -> str:
        return self.name or type(self).__name__

    async def start(self, run: RunContext) -> None:
        """Creates the directory, removes what killed runs left in it, and gives the loop the schedule.

        Raises:
            ConfigurationError: the directory cannot be written, or the weights to be saved are unknown or not leaves of
                the state.
        """
        self._run = run
        self._may_lack_evaluations = run.can_evaluate and not self._by_evaluation
        if self._monitor is not None:
            self._reader = MetricReader(self._name, self._monitor, evaluates=self._may_lack_evaluations)
            event = EvalCompleted if self._by_evaluation else EpochCompleted
            self._reader.look_up_in(run, event, unprefixed=self._by_evaluation)
        self._runs = (*(one for one in self._runs if one != run.run_id), run.run_id)
        directory = (run.run_dir / self._directory).absolute()
        if self._options.weights_only:
            run.require_params(f"{self._name}(save_weights_only=True)")
        params = {path: place for path, place in run.params.items() if place is not None}
        if self._options.weights_only and len(params) < len(run.params):
            raise ConfigurationError(
                f"{self._name}(save_weights_only=True): Trainer(params=...) must return a part of the state; it "
                "returns arrays that are not leaves of the state, which could not be restored."
            )
        await in_own_thread(partial(require_writable_folder, directory, self._name))
        self._writer = CheckpointWriter(
            directory,
            run.publish,
            owner=self._name,
            runs=frozenset(self._runs),
            params=params,
            retention=self._retention,
            options=self._options,
            run=run,
        )
        try:
            await in_own_thread(self._writer.open().result)
        except OSError as error:
            raise ConfigurationError(
                f"{self._name} cannot write checkpoints to {directory}: {error.strerror or error}."
            ) from error
        earlier, step = self._writer.earlier_step, run.control.step
        if earlier > step and not (run.resumed or run.restarts):
            logger.warning(
                "%s: %s has checkpoints of an earlier run, up to step %d, and this run begins at step %d. To continue "
                "from them, pass resume=True.",
                self._name, directory, earlier, step,
            )  # fmt: skip
        run.schedule_checkpoints(
            self._name,
            **self._schedule,
            at_start=self._lacks_the_best(run.control.step, self._writer.steps()),
            paths=frozenset(params.values()) if self._options.weights_only else None,
        )

    def _lacks_the_best(self, step: int, there: frozenset[int]) -> bool:
        """Returns whether the run resumes at the best step so far, and was killed before that was on disk."""
        best = self._best
        if best is None or best.step is None or best.step in there:
            return False
        if best.step == step:
            return True
        self._lost_best(best.step)
        return False

    def _lost_best(self, step: int) -> None:
        """Restores the best value before that of ``step``, whose checkpoint was not written."""
        if self._best is not None and self._best.step == step:
            self._best = BestMetricState(value=self._best.before)

    async def finish(self) -> None:
        """Waits until the checkpoints taken so far are written. If cancelled, it logs the others and gives them up.

        Raises:
            SubscriberError: the last ones have failed.
        """
        if self._reader is not None and not self._has_read:
            self._reader.end()
        writer = self._writer
        if writer is None:
            return
        try:
            await in_own_thread(writer.written().result)
        finally:
            steps = [pending.event.step for pending in writer.unfinished]
            if steps:
                writer.hurry()
                logger.error(
                    "The run ends before %s has written the checkpoints of the steps %s: the one in progress may still "
                    "be committed while the process lives, the others are lost. Raise Trainer(drain_timeout_s=...).",
                    self._name, steps,
                )  # fmt: skip
        if writer.failures and self._run is not None and self._run.process_index == 0:
            newest = max(writer.steps(), default=None)
            what = (
                "there is no checkpoint"
                if newest is None
                else f"the newest checkpoint is that of step {newest}"
            )
            raise SubscriberError(f"{what}; the last {writer.failures} could not be written.")

    def rescue(self) -> None:
        """Writes the snapshots that are not written yet, without what other subscribers would have contributed."""
        run, writer = self._run, self._writer
        if run is None or writer is None:
            return
        for taken in run.unclaimed(self._name):
            self._take(taken)
        steps = [pending.event.step for pending in writer.unfinished]
        writer.rescue(RESCUE_TIMEOUT_S)
        self._writer = None
        logger.warning(
            "%s wrote the checkpoints of the steps %s without the states of subscribers, since the event loop is "
            "blocked or gone. A run that resumes from them begins with fresh subscribers.",
            self._name, steps,
        )  # fmt: skip

    async def stop(self) -> None:
        """Closes Orbax. Raises failures in Orbax that were not raised before."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await in_own_thread(writer.close().result)

    async def handle(self, event: Event, control: Control) -> None:
        """Returns at once: the thread does what takes time, so that a barrier never waits for this subscriber."""
        match event:
            case SnapshotTaken():
                self._take(event)
            case EpochCompleted() | EvalCompleted():
                value = self._measure(event)
                best, goal = self._best, self._goal
                is_due = isinstance(event, EvalCompleted) or (event.epoch + 1) % self._best_every == 0
                if value is None or best is None or goal is None or not is_due:
                    return
                if self._run is not None and self._run.process_index > 0:
                    return  # process 0 decides
                if goal.improves(value, best.value):
                    self._best = BestMetricState(value=value, step=event.step, before=best.value)
                    control.checkpoint(reason=f"the best value so far: {value:.6g}")
            case CheckpointFailed() | CheckpointSkipped() if event.requested_by in (None, self._name):
                self._lost_best(event.step)
                if self._stops_on_failure and isinstance(event, CheckpointFailed):
                    control.stop(reason=f"the checkpoint of step {event.step} failed", final=False)
            case _:
                pass

    def _measure(self, event: EpochCompleted | EvalCompleted) -> float | None:
        """Remembers the metrics for a checkpoint of this step; returns the monitor's value."""
        metrics = event.metrics
        if isinstance(event, EvalCompleted):
            metrics = {f"val_{name}": value for name, value in metrics.items()}
        value = self._reader.read(metrics) if self._reader is not None else None
        known = {name: float(metrics[name]) for name in self._template_metrics if name in metrics}
        missing = self._template_metrics - known.keys()
        if self._may_lack_evaluations and not any(name.startswith("val_") for name in metrics):
            missing = {name for name in missing if not name.startswith("val_")}  # those may follow
        if missing and not self._warned_of_missing:
            self._warned_of_missing = True
            logger.warning(
                "%s cannot name its checkpoints %r: %s is not among the metrics (%s). They get the default name.",
                self._name, self._template, ", ".join(sorted(missing)), ", ".join(sorted(metrics)),
            )  # fmt: skip
        if self._reader is not None and value is not None:
            self._has_read = True
            known[self._reader.metric] = value
        self._measured = (event.step, known)
        return value

    def _take(self, event: SnapshotTaken) -> None:
        """Has the snapshot written, if it is for this Checkpointer."""
        run, writer = self._run, self._writer
        if event.purpose != "checkpoint" or event.requested_by not in (None, self._name):
            return
        measured_at, values = self._measured
        metrics = values if measured_at == event.step else {}
        try:
            name = fill_template(self._template, event.step, event.epoch, metrics)
        except (KeyError, ConfigurationError):  # not measured here, or of more digits than a name may have
            name = fill_template(DEFAULT_TEMPLATE, event.step, event.epoch, {})
        if event.tag != scheduled_tag(event.step):
            name = f"{name}-{event.tag}"
        if run is None or writer is None or (claimed := run.claim(self._name, event)) is None:
            return
        if claimed.snapshot.device.released:  # the device had no room for it, which the loop has reported
            claimed.finish()
            return
        writer.submit(PendingCheckpoint(claimed, event, name, metrics))

    def saved_run(self, run_dir: Path, which: bool | str | int | Path) -> SavedRun | None:
        """Returns the checkpoint to resume from; see ``Subscriber``."""
        return find_checkpoint(run_dir / self._directory, which)

    def state_dict(self) -> dict[str, Any]:
        """Returns what decides on later checkpoints, as plain JSON data."""
        step, metrics = self._measured
        state = CheckpointerState(
            best_of=self._best_of, best=self._best, runs=self._runs, measured_at=step, measured=metrics
        )
        return state.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state.

        Raises:
            StateError: the state is of another version, or broken.
        """
        saved = CheckpointerState.parse(self._name, state)
        self._runs, self._measured = saved.runs, (saved.measured_at, dict(saved.measured))
        self._has_read = saved.measured_at >= 0
        if self._best is not None and saved.best is not None:
            if saved.best_of == self._best_of:
                self._best = saved.best
            else:
                logger.warning(
                    "%s leaves out the best value so far, since it is of %s, and this one watches %s.",
                    self._name, saved.best_of, self._best_of,
                )  # fmt: skip
