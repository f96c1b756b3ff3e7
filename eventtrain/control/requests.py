"""Requests of the subscribers of a run to its training loop, made when they start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from eventtrain.events import Event
from eventtrain.events.commands import AnyCommand

WhenFull = Literal["skip", "wait", "fail"]
"""Effect on a checkpoint that is due while ``max_in_flight`` of them are being written."""


@dataclass
class PeriodicRequest:
    """Something to be done every so many steps, epochs or seconds, at exactly those boundaries.

    Attributes:
        owner: name of the subscriber.
        every, every_epochs, every_s: steps, epochs, seconds.
        at_start: also before the next step; reset when it was done.
        next_s: when it is due by the clock, in ``monotonic`` time.
    """

    owner: str
    every: int | None = None
    every_epochs: int | None = None
    every_s: float | None = None
    at_start: bool = False
    next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.next_s = monotonic() + (self.every_s or 0.0)


@dataclass
class CheckpointRequest(PeriodicRequest):
    """The checkpoints that one Checkpointer writes.

    Attributes:
        at_end: also after the last step, however the run ends.
        on_command: also if a command without an addressee asks for one.
        max_in_flight: how many may be taken and not written yet. Each holds a state.
        when_full: what happens to one more.
        wait_timeout_s: how long training waits with ``when_full="wait"``.
        paths: of the arrays of the state that are written; None: all, and those of extensions.
        in_flight: how many are taken and not written yet. Changed under the lock of ``CheckpointHandover``.
        taken: identifies the state that was taken for it last: step, number of changes by commands, why the run
            ended.
    """

    at_end: bool = False
    on_command: bool = True
    max_in_flight: int = 2
    when_full: WhenFull = "wait"
    wait_timeout_s: float = 600.0
    paths: frozenset[str] | None = None
    in_flight: int = 0
    taken: tuple[int, int, str | None] | None = None


@dataclass
class SampleRequest(PeriodicRequest):
    """A sample that the model makes at these boundaries, and when a command asks for it.

    Attributes:
        name: of the sample.
        function: ``state -> a pytree of arrays``, to be compiled.
        deliver: gets the step, and a function that waits until the arrays are computed and returns them on the host.
            Returns False if too many samples wait already. Training thread; never blocks.
    """

    name: str = ""
    function: Callable[[Any], Any] = field(default=lambda state: None)
    deliver: Callable[[int, Callable[[], Any]], bool] = field(default=lambda step, read: False)


@dataclass(frozen=True)
class TraceRequest:
    """Steps that one subscriber wants traced by JAX's profiler.

    Attributes:
        owner: name of the subscriber.
        folder: where the traces are written.
        ranges: first and last step of each trace; both are traced.
        python: whether calls of Python functions are traced too.
    """

    owner: str
    folder: Path
    ranges: tuple[tuple[int, int], ...] = ()
    python: bool = False


@dataclass(frozen=True)
class FinalRestore:
    """A snapshot to be restored at the end of a run, if ``where()`` is true then; it is released in any case."""

    tag: str
    part: Literal["all", "params"]
    where: Callable[[], bool]


@dataclass(frozen=True)
class ReplayedCommand:
    """A command that another run got from outside, to be applied where it was applied there.

    Attributes:
        command: with the boundary as its ``due``.
        after: how many commands of a finite lag were applied at that boundary before it.
    """

    command: AnyCommand
    after: int = 0


@dataclass(frozen=True)
class TracedRun:
    """Facts about a run whose functions are traced, before its first step.

    Attributes:
        state: its pytree, with the shape, dtype and sharding of each array (``jax.ShapeDtypeStruct``).
        batch: the first one, or an array of shapes and dtypes; None if an earlier run has compiled the step.
        metrics: event class -> names of the metrics that its events can have: StepCompleted, EpochCompleted,
            EvalCompleted, the last only if they are known.
        knows_evaluation: whether the metrics of evaluations are known, and so those of epochs that begin with ``val_``.
    """

    state: Any
    batch: Any
    metrics: Mapping[type[Event], frozenset[str]]
    knows_evaluation: bool = True


@dataclass
class RunRequests:
    """The requests of one run. Subscribers add to them in ``start``; the training thread reads them afterwards."""

    checkpoints: list[CheckpointRequest] = field(default_factory=list[CheckpointRequest])
    evaluations: list[PeriodicRequest] = field(default_factory=list[PeriodicRequest])
    """If there are any, they replace the evaluation at the end of each epoch."""
    samples: list[SampleRequest] = field(default_factory=list[SampleRequest])
    traces: list[TraceRequest] = field(default_factory=list[TraceRequest])
    """A command that asks for a trace uses the folder of the first one."""
    final_restores: list[FinalRestore] = field(default_factory=list[FinalRestore])
    replayed: deque[ReplayedCommand] = field(default_factory=deque[ReplayedCommand])
    """In the order in which they are applied. The training thread takes them out."""
    checks: list[Callable[[TracedRun], None]] = field(default_factory=list[Callable[[TracedRun], None]])
    """Called before the first step. What one raises ends the run."""
    reads_snapshots: bool = False
    """Arrays of snapshots are read on the host, also if no Checkpointer writes them."""

    def clear(self) -> None:
        """Forget the requests of the run before."""
        for requests in (
            self.checkpoints, self.evaluations, self.samples, self.traces, self.final_restores, self.replayed,
            self.checks,
        ):  # fmt: skip
            requests.clear()
        self.reads_snapshots = False
