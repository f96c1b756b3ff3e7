"""``RunContext``: the run, as a ``Subscriber`` sees it when it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.control import Control
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.control.requests import (
    CheckpointRequest,
    FinalRestore,
    PeriodicRequest,
    ReplayedCommand,
    RunRequests,
    SampleRequest,
    TracedRun,
    TraceRequest,
    WhenFull,
)
from eventtrain.device.compiled_step import StepProgram
from eventtrain.device.hyperparams import Hyperparam, labels, resolve
from eventtrain.device.state import StateArray
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event, SnapshotTaken


class RunFigures(Protocol):
    """Figures of a run in progress. Any thread; never blocks."""

    def statistics(self) -> LoopStatistics:
        """Returns where the training thread's time went so far."""
        ...

    def program(self) -> StepProgram | None:
        """Returns the compiled step; None before the first one."""
        ...

    def arrays(self) -> Sequence[StateArray]:
        """Returns what is known of each array of the state."""
        ...


class Exchange(Protocol):
    """Keys and values that all processes of a run share. Any thread but one that trains; calls block."""

    def set(self, key: str, value: str) -> None:
        """Sets a key, once."""
        ...

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """Returns the value of a key, once it has one; None after ``timeout_s`` seconds.

        Raises:
            PeerLost: another process has failed or is gone.
        """
        ...

    def delete(self, key: str) -> None:
        """Deletes a key, or all that begin with it and a slash. Call it once no process waits for them any more."""
        ...


EXCHANGE_POLL_S = 0.5
"""How often a wait for a key of the ``Exchange`` looks whether it has to end."""


@dataclass(frozen=True)
class RunContext:
    """The run that starts, and the requests that a subscriber may make to it.

    Attributes:
        run_id: the run's identity, stamped on its events.
        attempt: how many times it has begun or been resumed, from 1; stamped likewise.
        run_dir: the folder that relative paths of subscribers are in; it exists.
        control: commands without a cause and without a lag; usable for the whole run, on any thread.
        publish: ``EventBus.publish``.
        start_step: steps completed before this run; of a resumed run, before it first began.
        epochs, steps: the aim of this call of ``fit``, of a resumed run in total; None if unknown.
        steps_per_epoch: None if the data has no length.
        start_epoch: epochs completed before this run.
        can_evaluate: whether the run has an eval_fn and eval_data.
        resumed: the run continues from a checkpoint, with RunResumed instead of RunStarted.
        restarts: the run was to resume but nothing was saved, so it repeats the steps of an earlier attempt.
        ended: of a resumed run that had reached its end, so that nothing is trained: the reason; else None.
        params: path of each array of the lens ``params`` -> its path in the state; None if it is not a leaf of it. Call
            ``require_params`` before you rely on it.
        unknown_params: why the trainer cannot tell which arrays are the weights, and ``params`` is empty; else None.
        process_index, process_count: ``jax.process_index()``, ``jax.process_count()``. Subscribers with ``per_host``
            run in each process, the others in process 0.
        exchange: for what subscribers with ``per_host`` have to agree on; None with one process.
    """

    run_id: str
    run_dir: Path
    control: Control
    publish: Callable[[Event], None]
    _: KW_ONLY
    start_step: int = 0
    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None
    start_epoch: int = 0
    can_evaluate: bool = False
    attempt: int = 1
    resumed: bool = False
    restarts: bool = False
    ended: str | None = None
    params: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    unknown_params: str | None = None
    process_index: int = 0
    process_count: int = 1
    exchange: Exchange | None = None
    _bus: BusCore | None = None
    _figures: RunFigures | None = None
    _hyperparams: tuple[Hyperparam, ...] = ()
    _plane: ControlPlane | None = None

    @property
    def total_steps(self) -> int | None:
        """The aim of this call of ``fit`` in steps, also if it was given in epochs; None if unknown."""
        if self.epochs is None or self.steps_per_epoch is None:
            return self.steps
        return self.epochs * self.steps_per_epoch

    # --- publishing and reading: any thread, never blocks unless stated otherwise -----------------------------------

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. Any event loop."""
        if self._bus is None:
            self.publish(event)
        else:
            await self._bus.publish_async(event)

    def publish_blocking(self, event: Event, *, give_up: Callable[[], object] = lambda: False) -> bool:
        """Like ``publish``, but blocks while a Lossless queue is at its limit. For threads of the subscriber's own.

        Never call it on the bus' event loop, which has to make the room.

        Args:
            event: the event to publish.
            give_up: evaluated on this thread, at least every 50 ms while it waits.

        Returns:
            False if ``give_up()`` became true before there was room; the event was not published then.

        Raises:
            EventReused, BusClosed: as ``publish``.
        """
        if self._bus is None:
            self.publish(event)
            return True
        return self._bus.publish_blocking(event, give_up=give_up)

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """Returns the figures of every subscription of the bus, by name."""
        return self._bus.statistics() if self._bus is not None else {}

    def loop_statistics(self) -> LoopStatistics:
        """Returns where the training thread's time went so far."""
        return self._figures.statistics() if self._figures is not None else LoopStatistics()

    def program(self) -> StepProgram | None:
        """Returns the compiled step; None before the first one."""
        return self._figures.program() if self._figures is not None else None

    def arrays(self) -> Sequence[StateArray]:
        """Returns path, shape, dtype, sharding and size of each array of the state."""
        return self._figures.arrays() if self._figures is not None else ()

    def require_hyperparam(self, name: str, path: str | None = None) -> str:
        """Checks that ``control.set_hyperparam(name, ..., path=path)`` can work in this run.

        Returns:
            The key of the hyperparameter in ``EpochCompleted.hyperparams`` and ``control.hyperparams``.

        Raises:
            UnknownHyperparam, AmbiguousHyperparam, ScheduledHyperparam: it cannot; the message says how to build the
                optimiser.
            ConfigurationError: the run is replayed from its log.
        """
        self._require_loop()
        return labels(self._hyperparams)[resolve(self._hyperparams, name, path).path]

    def require_hyperparams(self, name: str) -> dict[str, str]:
        """Returns key -> path of every hyperparameter ``name`` that can be set; keys as of ``require_hyperparam``.

        Raises:
            UnknownHyperparam, ScheduledHyperparam: there is none.
        """
        free = [h for h in self._hyperparams if h.name == name and not h.scheduled]
        if not free:
            self.require_hyperparam(name)  # raises
        names = labels(self._hyperparams)
        return {names[h.path]: h.path for h in free}

    def require_params(self, subject: str) -> None:
        """Checks that the trainer knows the weights.

        Args:
            subject: the subscriber, and the option of it that needs them; begins the message.

        Raises:
            ConfigurationError: it does not; the message lists what is in the state, and how to name the weights.
        """
        if self.unknown_params is not None:
            raise ConfigurationError(f"{subject} requires the weights, but {self.unknown_params}")

    @property
    def sample_names(self) -> tuple[str, ...]:
        """Names for ``control.sample``, once all subscribers have started."""
        return tuple(request.name for request in self._requests.samples) if self._plane is not None else ()

    # --- requests, while the subscriber starts ----------------------------------------------------------------

    def before_first_step(self, check: Callable[[TracedRun], None]) -> None:
        """Has ``check`` called on the training thread, once step_fn and eval_fn are traced, before the first step.

        What it raises ends the run. It may look metrics up, or trace a function of its own:
        ``jax.eval_shape(function, traced.state)``.
        """
        if self._plane is not None:
            self._requests.checks.append(check)

    def replay_commands(self, commands: Sequence[ReplayedCommand]) -> None:
        """Applies commands that another run got from outside, each at its boundary."""
        self._requests.replayed.extend(commands)

    def restore_at_end(
        self,
        tag: str,
        part: Literal["all", "params"] = "params",
        *,
        where: Callable[[], bool] = lambda: True,
    ) -> None:
        """Puts the snapshot kept under ``tag`` back and releases it, when the run ends by itself.

        By itself: its aim was reached, or a command stopped it. A run that was interrupted, preempted or cancelled
        keeps its state and the snapshot, so that another run can continue. Without a snapshot of that tag nothing
        happens. Whole states are put back before params.

        Args:
            tag: of ``control.snapshot``.
            part: the whole state, or its params only.
            where: evaluated on the training thread when all handlers with a finite lag have finished; if it is false,
                the snapshot is only released.

        Raises:
            ConfigurationError: ``part`` is "params", and the trainer cannot tell which arrays are the weights.
        """
        if part == "params":
            self.require_params(f"restore_at_end({tag!r})")
        self._requests.final_restores.append(FinalRestore(tag, part, where))

    def schedule_evaluations(
        self,
        owner: str,
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
    ) -> None:
        """Evaluates at exactly these boundaries, instead of at the end of each epoch.

        At the end of an epoch the evaluation is before EpochCompleted. ``every_s`` depends on timing, so that the run
        ends with ``deterministic=False``.

        Raises:
            ConfigurationError: the run has no eval_fn or no eval_data.
        """
        if not self.can_evaluate:
            raise ConfigurationError(
                f"{owner} requests evaluations, but this run has nothing to evaluate. Pass Trainer(eval_fn=...) and "
                "fit(eval_data=...)."
            )
        self._requests.evaluations.append(PeriodicRequest(owner, every, every_epochs, every_s))

    def schedule_samples(
        self,
        owner: str,
        name: str,
        function: Callable[[Any], Any],
        deliver: Callable[[int, Callable[[], Any]], bool],
        *,
        every: int | None = None,
        every_epochs: int | None = None,
    ) -> None:
        """Has the model make a sample at exactly these boundaries, and when ``control.sample(name)`` takes effect.

        Each of several processes has to call this, so the subscriber must be ``per_host``. ``deliver`` is called in
        process 0 alone, which decides when.

        Args:
            owner: name of the subscriber.
            name: of the sample.
            function: ``state -> a pytree of arrays``; compiled before the first step, and called on the training
                thread. The state is that for predictions.
            deliver: gets the step, and a function that returns the pytree with NumPy arrays. It is called on the
                training thread and must not block: the function waits for the device, so another thread calls it.
                Returns False if too many samples wait already, so that this one is left out.
            every, every_epochs: steps, epochs.

        Raises:
            ConfigurationError: another subscriber makes a sample of that name.
        """
        samples = self._requests.samples
        if any(request.name == name for request in samples):
            raise ConfigurationError(f"Two subscribers make a sample named {name!r}. Give one another name.")
        samples.append(
            SampleRequest(owner, every, every_epochs, name=name, function=function, deliver=deliver)
        )

    def schedule_traces(
        self, owner: str, folder: Path, ranges: Sequence[tuple[int, int]] = (), *, python: bool = False
    ) -> None:
        """Traces exactly these steps with JAX's profiler, each range into a folder of its own in ``folder``.

        ``control.profile`` requires that a subscriber has called this. ``ProfileCaptured`` follows each trace, or a
        SubscriberFailed of ``owner``.

        Args:
            owner: name of the subscriber.
            folder: created if needed.
            ranges: first and last step of each; both are traced.
            python: also trace the calls of Python functions, which makes the steps slower and the trace larger.
        """
        self._requests.traces.append(TraceRequest(owner, folder, tuple(ranges), python))

    def schedule_checkpoints(
        self,
        owner: str,
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
        at_start: bool = False,
        at_end: bool = False,
        on_command: bool = True,
        max_in_flight: int = 2,
        when_full: WhenFull = "wait",
        paths: frozenset[str] | None = None,
    ) -> None:
        """Keeps the state at exactly these boundaries, and publishes ``SnapshotTaken`` for each.

        The event's ``requested_by`` is ``owner``; ``claim`` then gives the state.

        Args:
            owner: name of the subscriber.
            every, every_epochs, every_s: steps, epochs, seconds.
            at_start: also before the next step.
            at_end: also after the last step, however the run ends.
            on_command: also for commands without an addressee, if another subscriber does not serve them.
            max_in_flight: how many claimed and unfinished snapshots there may be; each holds a state.
            when_full: what happens to one more.
            paths: of the arrays of the state that will be read, for which host memory is pinned; None: all.

        Raises:
            ConfigurationError: another subscriber of that name has called this.
        """
        checkpoints = self._requests.checkpoints
        if any(request.owner == owner for request in checkpoints):
            raise ConfigurationError(
                f"Two subscribers named {owner!r} request checkpoints. Set the name of one of them."
            )
        checkpoints.append(
            CheckpointRequest(
                owner,
                every,
                every_epochs,
                every_s,
                at_start,
                at_end=at_end,
                on_command=on_command,
                max_in_flight=max_in_flight,
                when_full=when_full,
                paths=paths,
            )
        )

    def read_snapshots(self) -> None:
        """Announces that snapshots will be read on the host (``snapshot.to_host()``), so that training never waits.

        Without it, and without a Checkpointer, the first one to be read pins host memory beside the steps, which may
        hold them up on a GPU: 0.3 s per GB.
        """
        self._requests.reads_snapshots = True

    def unclaimed(self, owner: str) -> list[SnapshotTaken]:
        """Returns the announcements of snapshots that ``owner`` has not claimed, for ``Subscriber.rescue``."""
        assert self._plane is not None
        return [
            taken.model_copy(update={"run_id": self.run_id, "attempt": self.attempt, "stream": "training"})
            for taken in self._plane.handover.unclaimed(owner)
        ]

    def claim(self, owner: str, event: SnapshotTaken) -> ClaimedSnapshot | None:
        """Returns the snapshot that ``event`` announced, for ``owner``, which must finish it.

        None if nothing is held for it: another subscriber requested it, it was claimed before, or ``owner`` had too
        many in flight, which the loop has published. If the device had no room for it, its snapshot is released.
        """
        assert self._plane is not None
        return self._plane.handover.claim(owner, event.step, event.requested_by)

    @property
    def _requests(self) -> RunRequests:
        self._require_loop()
        assert self._plane is not None
        return self._plane.requests

    def _require_loop(self) -> None:
        if self._plane is None and not self._hyperparams:
            raise ConfigurationError(
                "This run is replayed from its log, so there is neither a state nor a loop to steer: snapshots, "
                "checkpoints, evaluations, traces and changes of hyperparameters are not possible. Leave this "
                "subscriber out, or use it in a run that trains."
            )
