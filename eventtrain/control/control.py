"""How subscribers and services steer a run: typed commands into an inbox that only the training loop empties.

Nothing here touches the device. A command says when it is due; the loop carries it out between two steps and
answers, by an event in its stream and by the future that ``await command.result()`` waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import CommandQueue, PendingCommand
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import CommandRejectedError, ConfigurationError
from eventtrain.events import CommandApplied, Event
from eventtrain.events.commands import (
    Cause,
    Command,
    Evaluate,
    Pause,
    Profile,
    Restore,
    Resume,
    SaveCheckpoint,
    ScaleHyperparam,
    SetHyperparam,
    Stop,
    TakeSnapshot,
)
from eventtrain.events.models import Number


class Control:
    """What handlers and services may ask of the run. Every method returns at once, on any thread.

    Each command method returns the ``Command`` sent; ``await command.result()`` gives the ``CommandApplied`` event or
    raises ``eventtrain.CommandRejectedError``. ``lag`` of the subscription decides when it takes effect.
    """

    def __init__(
        self,
        inbox: CommandQueue,
        cause: Event | None = None,
        subscription: SubscriptionCore | None = None,
        lag: int | None = None,
    ) -> None:
        self._inbox = inbox
        self._cause = cause
        self._subscription = subscription
        self._lag = lag
        self._held: list[PendingCommand] | None = [] if lag is not None else None
        self._issued = 0

    # --- commands -------------------------------------------------------------------------------------------

    def set_hyperparam(
        self,
        name: str,
        value: float,
        *,
        path: str | None = None,
        reason: str = "",
        at_step: int | None = None,
    ) -> Command:
        """Write ``value`` (a Python, NumPy or 0-d array number) where ``optax.inject_hyperparams`` keeps ``name``.

        ``path`` (the full path or a unique part of it) decides where the name stands in several places. The value takes
        the dtype of the one it replaces; nothing is recompiled. ``at_step`` names a boundary later than the one the
        lag gives (step ``at_step + 1`` is the first computed with the value); only where the lag is finite.

        Rejected: an unknown, ambiguous or scheduled hyperparameter, or a value that is no finite number.
        """
        return self._send(
            SetHyperparam,
            at_step,
            name=name, value=_number("set_hyperparam", value), path=path, reason=reason,
        )  # fmt: skip

    def scale_hyperparam(
        self,
        name: str,
        factor: float,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        path: str | None = None,
        reason: str = "",
    ) -> Command:
        """Multiply the value in effect *when the command is applied* by ``factor``, within ``minimum`` and ``maximum``.

        A value that is beyond a limit already is not moved further, nor back to it.

        Use it instead of reading, computing and setting: between the event and the effect the value may change.
        """
        return self._send(
            ScaleHyperparam,
            name=name, factor=_number("scale_hyperparam", factor), minimum=minimum, maximum=maximum, path=path,
            reason=reason,
        )  # fmt: skip

    def stop(self, reason: str = "stopped", *, final: bool = True) -> Command:
        """End the run at the boundary where this takes effect; ``reason`` becomes the run's ``stop_reason``.

        ``final``: a later ``fit(resume=True)`` with the same aim trains nothing more. False: it goes on from here.
        """
        return self._send(Stop, reason=reason, final=final)

    def checkpoint(self, tag: str | None = None, *, reason: str = "") -> Command:
        """Have the state of the boundary made durable by the run's ``Checkpointer``.

        Applied means that the snapshot is taken; ``CheckpointCommitted`` follows when it is on disk.
        """
        return self._send(SaveCheckpoint, tag=tag, reason=reason)

    def snapshot(self, tag: str, *, reason: str = "") -> Command:
        """Keep the device state under ``tag``; once applied it stands in ``snapshots[tag]`` until released."""
        return self._send(TakeSnapshot, tag=tag, reason=reason)

    def restore(
        self, tag_or_step: str | int, part: Literal["all", "params"] = "all", *, reason: str = ""
    ) -> Command:
        """Put a kept snapshot's state (or only its params) back. The step count goes on; it never goes back."""
        return self._send(Restore, target=tag_or_step, part=part, reason=reason)

    def pause(self, *, reason: str = "") -> Command:
        """Hold the loop at the next boundary; everything published so far is delivered meanwhile."""
        return self._send(Pause, reason=reason)

    def resume(self, *, reason: str = "") -> Command:
        """Let a paused loop go on, at once; from a handler with a finite lag, as soon as it has succeeded."""
        return self._send(Resume, reason=reason)

    def evaluate(self, *, reason: str = "") -> Command:
        """Evaluate on the run's ``eval_data`` at the boundary where this takes effect."""
        return self._send(Evaluate, reason=reason)

    def profile(self, steps: int, *, reason: str = "") -> Command:
        """Have the ``steps`` steps after the boundary where this takes effect traced by JAX's profiler.

        Needs a ``Profiler`` among the subscribers, which says where the trace goes. ``ProfileCaptured`` tells when it
        is written; training waits for that.
        """
        return self._send(Profile, steps=steps, reason=reason)

    # --- looking --------------------------------------------------------------------------------------------

    @property
    def hyperparams(self) -> Mapping[str, Number]:
        """The values in effect, read-only: name (or path, where a name is ambiguous) -> number."""
        return MappingProxyType({**self._inbox.hyperparams, **self._inbox.scheduled()})

    @property
    def snapshots(self) -> Mapping[str | int, KeptSnapshot]:
        """Kept snapshots by tag; ``.step``, ``await .to_host()``, ``.release()``."""
        return MappingProxyType(self._inbox.kept())

    @property
    def step(self) -> int:
        """Steps dispatched so far; the device may be some behind."""
        return self._inbox.step

    # --- sending --------------------------------------------------------------------------------------------

    def _send(self, kind: type[Command], at_step: int | None = None, /, **fields: Any) -> Command:
        cause = None
        due = None
        if at_step is not None and self._lag is None:
            raise ConfigurationError(
                f"{kind.__name__}(at_step={at_step!r}): without a finite lag the command may arrive after that step, "
                "and a rerun would differ. Subscribe with a lag, or leave at_step out."
            )
        if self._cause is not None and self._subscription is not None:
            cause = Cause(event=self._cause.kind, step=self._cause.step, subscriber=self._subscription.name)
            # Resume applies at once: a paused loop stays before the boundary at which a lag would let it through.
            due = None if self._lag is None or kind is Resume else self._cause.step + self._lag
            due = due if at_step is None or due is None else max(due, at_step)
        try:
            command: Any = kind(cause=cause, due=due, **fields)
        except ValueError as error:
            raise ConfigurationError(f"Cannot issue {kind.__name__}: {error}") from error
        answer: CrossLoopFuture[CommandApplied] = CrossLoopFuture()
        command._reply = answer if self._lag is None else _NoWaiting(command.kind)
        order = PendingCommand(command, answer, self._cause, self._subscription, self._issued)
        self._issued += 1
        if self._lag is None:
            self._inbox.post([order])
        elif self._held is None:
            raise CommandRejectedError(
                f"Cannot issue {command.kind}: the control of a handler with a finite lag closes when it returns, "
                "since the loop may have passed the boundary. Issue it before returning, or subscribe with lag=None.",
                reason="the handler has returned",
            )
        else:
            self._held.append(order)
        return command

    # --- one handler call -------------------------------------------------------------------------------------

    @property
    def control(self) -> Control:
        """The handler's view of this attempt: itself."""
        return self

    def commit(self) -> None:
        """The handler succeeded: send what a finite lag held back, and close."""
        if self._held is not None:
            held, self._held = self._held, None
            if held:
                self._inbox.post(held)

    def discard(self) -> None:
        """The handler failed, or will be tried again: drop what a finite lag held back, and close."""
        self._held = None


class _NoWaiting:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    async def wait(self) -> CommandApplied:
        raise CommandRejectedError(
            f"Cannot await the result of {self._kind} from a handler with a finite lag: the loop may be waiting for "
            "this very handler. Subscribe to CommandApplied, or use lag=None.",
            reason="awaited inside a handler with a finite lag",
        )


def _number(method: str, value: Any) -> float | int | bool:
    """A Python number from a Python, NumPy or 0-d array one."""
    item = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if not isinstance(item, (int, float)):
        raise ConfigurationError(f"{method}: the value must be a number or a 0-d array, not {value!r}.")
    return item
