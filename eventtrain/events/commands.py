"""Commands: what subscribers ask of the training loop. Imperative, frozen, plain numbers.

Nobody builds them by hand: the methods of ``eventtrain.Control`` do, and send them. The loop carries each
out between two steps and answers with an event that names the step, or refuses it with a reason.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field, FiniteFloat, PrivateAttr

from eventtrain import errors
from eventtrain.events.base import Event
from eventtrain.events.models import Frozen, Text


class Cause(Frozen):
    """The event, and the subscriber that handled it, from which a command came."""

    event: str
    """Kind of the event, say ``epoch_completed``."""
    step: int
    subscriber: str


class Reply(Protocol):
    """Where the loop's answer to one command arrives; it never goes through an event queue."""

    async def wait(self) -> CommandApplied:
        """The loop's answer; raises ``eventtrain.errors.CommandRejected``."""
        ...


class Command(Frozen):
    """What all commands carry: why (``reason``) and from which event and subscriber (``cause``)."""

    reason: Text = ""
    cause: Cause | None = None
    due: int | None = None
    """The boundary at which it takes effect; None: as soon as it arrives."""

    _reply: Reply | None = PrivateAttr(default=None)

    async def result(self) -> CommandApplied:
        """Wait until the loop has answered; any event loop, any thread.

        Returns:
            The ``CommandApplied`` event, whose ``step`` is the boundary where it took effect.

        Raises:
            CommandRejected: (of ``eventtrain.errors``) the loop refused it, with the reason; at once inside
                a handler with a finite lag, since the loop may be waiting for that very handler.

        Cancellation leaves the command in force: it is only this waiting that ends.
        """
        if self._reply is None:
            raise errors.CommandRejected(
                f"This {self.kind} was never sent: commands are made by the methods of eventtrain.Control.",
                reason="never sent",
            )
        return await self._reply.wait()


class SetHyperparam(Command):
    """Write ``value`` into the optimiser state; ``path`` decides where a name stands in several places."""

    name: str
    value: FiniteFloat | bool | int
    path: str | None = None


class ScaleHyperparam(Command):
    """Multiply the value then in effect by ``factor``, clipped to ``minimum`` and ``maximum``."""

    name: str
    factor: FiniteFloat
    minimum: float | None = None
    maximum: float | None = None
    path: str | None = None


class Stop(Command):
    """End the run at the boundary where it is applied.

    Attributes:
        final: the run has reached its end: a later ``fit(resume=True)`` with the same aim trains nothing more.
    """

    final: bool = True


class SaveCheckpoint(Command):
    """Take a snapshot and have it made durable."""

    tag: str | None = None


class TakeSnapshot(Command):
    """Keep the device state of this boundary under ``tag``."""

    tag: str


class Restore(Command):
    """Put a kept state back; the step count goes on."""

    target: str | int
    part: Literal["all", "params"] = "all"


class Pause(Command):
    """Hold the loop at a boundary until ``Resume`` or ``Stop``."""


class Resume(Command):
    """Let a paused loop go on."""


class Evaluate(Command):
    """Run the evaluation at the next boundary."""


class Profile(Command):
    """Have the next ``steps`` steps traced by JAX's profiler."""

    steps: int = Field(ge=1)


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
    | Profile,
    Field(discriminator="kind"),
]
"""Any command, told apart by ``kind``."""


class CommandApplied(Event):
    """``command`` took effect at boundary ``step``: between step ``step`` and the next one."""

    command: AnyCommand


class CommandRejected(Event):
    """``command`` was not carried out, and why."""

    command: AnyCommand
    reason: Text
