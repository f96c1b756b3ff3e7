"""Commands that subscribers send to the training loop, and the events that answer them.

Commands are imperative, frozen and made of plain numbers. The methods of ``eventtrain.Control`` build and send them.
The loop carries out each one between two steps and publishes an event that names the step, or rejects it with a reason.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field, FiniteFloat, PrivateAttr

from eventtrain.errors import CommandRejectedError
from eventtrain.events.base import Event
from eventtrain.events.models import Frozen, Text


class Cause(Frozen):
    """The event that led to a command, and the subscriber that handled it."""

    event: str
    """Kind of the event, for example ``epoch_completed``."""
    step: int
    subscriber: str


class Reply(Protocol):
    """Receives the loop's answer to one command. The answer never passes through an event queue."""

    async def wait(self) -> CommandApplied:
        """Returns the answer; raises ``CommandRejectedError`` if the loop rejected the command."""
        ...


class Command(Frozen):
    """Base class of all commands."""

    reason: Text = ""
    cause: Cause | None = None
    due: int | None = None
    """The boundary at which it takes effect; None: as soon as it arrives."""
    source: Text | None = None
    """The way by which it came from outside the program, such as "control socket"; None: the program issued it."""

    _reply: Reply | None = PrivateAttr(default=None)

    async def result(self) -> CommandApplied:
        """Waits until the loop has answered. Any thread, any event loop.

        Cancelling the wait leaves the command in force.

        Returns:
            The ``CommandApplied`` event, whose ``step`` is the boundary at which the command took effect. It is a copy
            without ``seq``: the event gets its number when the steps before it were published.

        Raises:
            CommandRejectedError: the loop rejected the command, with the reason. Inside a handler with a finite lag,
                immediately, because the loop may be waiting for that very handler.
        """
        if self._reply is None:
            raise CommandRejectedError(
                f"This {self.kind} was never sent: commands are made by the methods of eventtrain.Control.",
                reason="never sent",
            )
        return await self._reply.wait()


class SetHyperparam(Command):
    """Writes ``value`` into the optimiser state; ``path`` selects one of several places with the same name."""

    kind: Literal["set_hyperparam"] = "set_hyperparam"
    name: str
    value: FiniteFloat | bool | int
    path: str | None = None


class ScaleHyperparam(Command):
    """Multiplies the value then in effect by ``factor``, clipped to ``minimum`` and ``maximum``."""

    kind: Literal["scale_hyperparam"] = "scale_hyperparam"
    name: str
    factor: FiniteFloat
    minimum: float | None = None
    maximum: float | None = None
    path: str | None = None


class Stop(Command):
    """Ends the run at the boundary where it is applied.

    Attributes:
        final: the run has reached its end, so a later ``fit(resume=True)`` with the same aim trains nothing more.
    """

    kind: Literal["stop"] = "stop"
    final: bool = True


class SaveCheckpoint(Command):
    """Takes a snapshot for a Checkpointer to write."""

    kind: Literal["save_checkpoint"] = "save_checkpoint"
    tag: str | None = None


class TakeSnapshot(Command):
    """Keeps the device state of this boundary under ``tag``."""

    kind: Literal["take_snapshot"] = "take_snapshot"
    tag: str


class Restore(Command):
    """Puts a snapshot's state back; ``step`` keeps counting up."""

    kind: Literal["restore"] = "restore"
    target: str | int
    part: Literal["all", "params"] = "all"


class Pause(Command):
    """Holds the loop at a boundary until ``Resume`` or ``Stop``."""

    kind: Literal["pause"] = "pause"


class Resume(Command):
    """Continues a paused loop."""

    kind: Literal["resume"] = "resume"


class Evaluate(Command):
    """Runs the evaluation at the next boundary."""

    kind: Literal["evaluate"] = "evaluate"


class Profile(Command):
    """Traces the next ``steps`` steps with JAX's profiler."""

    kind: Literal["profile"] = "profile"
    steps: int = Field(ge=1)


class TakeSample(Command):
    """Makes the sample ``name`` from the state of this boundary."""

    kind: Literal["take_sample"] = "take_sample"
    name: str


AnyCommand = Annotated[
    SetHyperparam
    | ScaleHyperparam
    | Stop
    | SaveCheckpoint
    | TakeSnapshot
    | Restore
    | Pause
    | Resume
    | Evaluate
    | Profile
    | TakeSample,
    Field(discriminator="kind"),
]
"""Any command, told apart by ``kind``."""


class CommandApplied(Event):
    """``command`` took effect at boundary ``step``: after step ``step`` and before the next one."""

    kind: Literal["command_applied"] = "command_applied"
    command: AnyCommand


class CommandRejected(Event):
    """``command`` was not carried out, for the ``reason`` given.

    While a Lossless queue that wants these notices is at its limit, commands of one kind share a notice: the newest
    one, with their ``count``.
    """

    kind: Literal["command_rejected"] = "command_rejected"
    command: AnyCommand
    reason: Text
    count: int = 1
    """The number of rejected commands that it stands for."""
