"""How subscribers and services steer a run: typed commands into a queue that only the training thread empties.

Nothing here touches the device. A command says when it is due. The training loop applies it between two steps and
answers twice: by an event in its stream, and by the future that ``await command.result()`` waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import CommandQueue, PendingCommand
from eventtrain.control.run_view import RunView
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
    TakeSample,
    TakeSnapshot,
)
from eventtrain.events.models import Number
from eventtrain.notebook import html

MOST_SHOWN = 30
"""Hyperparameters in a repr."""


class Control:
    """The commands that handlers and services issue to a run, and the values they may read.

    Every method returns at once, on any thread. Each command method returns the ``Command`` that was sent:
    ``await command.result()`` returns its ``CommandApplied`` event or raises
    ``eventtrain.CommandRejectedError``. When it takes effect depends on the ``lag`` of the subscription.
    """

    def __init__(
        self,
        queue: CommandQueue,
        view: RunView,
        transaction: Transaction | None = None,
        *,
        run: int | None = None,
        source: str | None = None,
    ) -> None:
        self._queue = queue
        self._view = view
        self._transaction = transaction
        # The run that commands without a transaction are meant for; None: the one in progress.
        self._run = run
        self._source = source

    def with_source(self, source: str) -> Control:
        """Returns this control for commands that come from outside the program, which then name their ``source``.

        For a service that lets people steer a run: ``JSONLLogger`` writes such commands, and
        ``eventtrain run --replay-commands`` repeats them.
        """
        return Control(self._queue, self._view, self._transaction, run=self._run, source=source)

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
        """Set a hyperparameter in the optimiser state, where ``optax.inject_hyperparams`` keeps it.

        The value takes the dtype of the one it replaces. Nothing is recompiled. The command is rejected if the
        hyperparameter is unknown, ambiguous or follows a schedule, or if the value is not finite.

        Args:
            name: of the hyperparameter.
            value: a Python or NumPy number, or a 0-d array.
            path: its full path or a unique part of it, if the name occurs in several places.
            reason: for logs and events.
            at_step: a boundary later than the one that the lag gives: step ``at_step + 1`` is the first computed with
                the value. Requires a finite lag.
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
        """Multiply a hyperparameter by ``factor``, within ``minimum`` and ``maximum``.

        The value multiplied is the one in effect when the command is applied. A handler that reads, computes and sets
        would lose what changed between its event and the effect. A value that is already beyond a limit is neither
        moved further nor brought back to it. With a ``minimum``, one that would become 0 because its dtype holds
        nothing smaller stays as it is; without, the command is rejected.
        """
        return self._send(
            ScaleHyperparam,
            name=name, factor=_number("scale_hyperparam", factor), minimum=minimum, maximum=maximum, path=path,
            reason=reason,
        )  # fmt: skip

    def stop(self, reason: str = "stopped", *, final: bool = True) -> Command:
        """End the run at the boundary where this takes effect.

        Args:
            reason: becomes the ``stop_reason`` of the run.
            final: whether a later ``fit(resume=True)`` with the same aim trains nothing more. False: it continues
                here.
        """
        return self._send(Stop, reason=reason, final=final)

    def checkpoint(self, tag: str | None = None, *, reason: str = "") -> Command:
        """Have the run's ``Checkpointer`` write the state of the boundary.

        The command is applied when the snapshot is taken. ``CheckpointCommitted`` follows when it is on disk.
        """
        return self._send(SaveCheckpoint, tag=tag, reason=reason)

    def snapshot(self, tag: str, *, reason: str = "") -> Command:
        """Keep the device state. Once applied it is in ``snapshots[tag]``, until it is released."""
        return self._send(TakeSnapshot, tag=tag, reason=reason)

    def restore(
        self, tag_or_step: str | int, part: Literal["all", "params"] = "all", *, reason: str = ""
    ) -> Command:
        """Restore the state of a kept snapshot, or only its params. The step count never goes back."""
        return self._send(Restore, target=tag_or_step, part=part, reason=reason)

    def pause(self, *, reason: str = "") -> Command:
        """Hold the training loop at the next boundary. Everything published so far is delivered meanwhile."""
        return self._send(Pause, reason=reason)

    def resume(self, *, reason: str = "") -> Command:
        """Let a paused loop continue: at once, or as soon as a handler with a finite lag has succeeded."""
        return self._send(Resume, reason=reason)

    def evaluate(self, *, reason: str = "") -> Command:
        """Evaluate on the run's ``eval_data`` at the boundary where this takes effect."""
        return self._send(Evaluate, reason=reason)

    def profile(self, steps: int, *, reason: str = "") -> Command:
        """Trace the ``steps`` steps after the boundary where this takes effect with JAX's profiler.

        Requires a ``Profiler`` among the subscribers, which gives the trace its folder. Training waits until the
        trace is written; ``ProfileCaptured`` follows.
        """
        return self._send(Profile, steps=steps, reason=reason)

    def sample(self, name: str, *, reason: str = "") -> Command:
        """Make the sample of the ``subscribers.Sample`` of this name, from the state of the boundary of the effect.

        The command is applied when it is dispatched. ``SampleTaken`` follows when its value is on the host.
        """
        return self._send(TakeSample, name=name, reason=reason)

    # --- reading --------------------------------------------------------------------------------------------

    @property
    def hyperparams(self) -> Mapping[str, Number]:
        """The values in effect, read-only: name (or path, if a name is ambiguous) -> number."""
        return MappingProxyType({**self._view.hyperparams, **self._view.scheduled})

    @property
    def snapshots(self) -> Mapping[str | int, KeptSnapshot]:
        """The kept snapshots by tag: ``.step``, ``await .to_host()``, ``.release()``."""
        return MappingProxyType(self._view.kept())

    @property
    def step(self) -> int:
        """Steps dispatched so far. The device may be some steps behind."""
        return self._view.step

    def __repr__(self) -> str:
        values = ", ".join(f"{html.plain(name)}={value:.4g}" for name, value in self._shown())
        return f"<Control at step {self.step}{': ' if values else ''}{values}>"

    def _repr_html_(self) -> str:
        kept = ", ".join(map(str, self.snapshots))
        facts = [*self._shown(), *([("snapshots", kept)] if kept else [])]
        return html.box(html.title("Control", f"at step {self.step:,}"), html.facts(facts))

    def _shown(self) -> list[tuple[str, Number]]:
        return [*self.hyperparams.items()][:MOST_SHOWN]

    # --- sending --------------------------------------------------------------------------------------------

    def _send(self, kind: type[Command], at_step: int | None = None, /, **fields: Any) -> Command:
        transaction = self._transaction
        lag = transaction.lag if transaction is not None else None
        if at_step is not None and lag is None:
            raise ConfigurationError(
                f"Cannot issue {kind.__name__} with at_step={at_step!r}: without a finite lag the command may arrive "
                "after that step, and a rerun would differ. Subscribe with a lag, or leave at_step out."
            )
        cause, due = None, None
        if transaction is not None:
            event = transaction.event
            cause = Cause(event=event.kind, step=event.step, subscriber=transaction.subscription.name)
            # Resume is applied at once: a paused loop never reaches the boundary that a lag would give.
            if lag is not None and kind is not Resume:
                due = max(event.step + lag, at_step or 0)
        try:
            command: Any = kind(cause=cause, due=due, source=self._source, **fields)
        except ValueError as error:
            raise ConfigurationError(f"Cannot issue {kind.__name__}: {error}") from error
        reply: CrossLoopFuture[CommandApplied] = CrossLoopFuture()
        command._reply = reply if lag is None else _NoWaiting(command.kind)
        if transaction is None:
            self._queue.post([PendingCommand(command, reply, run=self._run)])
        else:
            transaction.send(command, reply)
        return command


class Transaction:
    """The commands of one handler call. With a finite lag they are held until it succeeds, and dropped if it fails.

    Attributes:
        event, subscription: the cause of its commands.
        lag: of the subscription, for this event.
    """

    __slots__ = ("_held", "_issued", "_queue", "_run", "_view", "event", "lag", "subscription")

    def __init__(
        self, queue: CommandQueue, view: RunView, event: Event, subscription: SubscriptionCore
    ) -> None:
        self.event = event
        self.subscription = subscription
        self.lag = subscription.filter.lag_for(type(event))
        self._queue = queue
        self._view = view
        self._run = queue.run
        self._issued = 0
        self._held: list[PendingCommand] | None = [] if self.lag is not None else None

    @property
    def control(self) -> Control:
        """Control that the handler receives."""
        return Control(self._queue, self._view, self)

    def send(self, command: Any, reply: CrossLoopFuture[CommandApplied]) -> None:
        """Send ``command`` at once, or hold it if the lag is finite.

        Raises:
            CommandRejectedError: the handler has returned, and its lag is finite.
        """
        pending = PendingCommand(command, reply, self.event, self.subscription, self._issued, self._run)
        if self.lag is None:
            self._queue.post([pending])
        elif self._held is not None:
            self._held.append(pending)
        else:
            raise CommandRejectedError(
                f"Cannot issue {command.kind}: the control of a handler with a finite lag closes when the handler "
                "returns, since the loop may have passed the boundary. Issue it before returning, or subscribe with "
                "lag=None.",
                reason="the handler has returned",
            )
        self._issued += 1

    def commit(self) -> None:
        """Send the held commands and close: the handler succeeded."""
        held, self._held = self._held, None
        if held:
            self._queue.post(held)

    def discard(self) -> None:
        """Drop the held commands and close: the handler failed, or will be tried again."""
        self._held = None


class _NoWaiting:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    async def wait(self) -> CommandApplied:
        raise CommandRejectedError(
            f"Cannot await the result of {self._kind} in a handler with a finite lag: the loop may be waiting for this "
            "very handler. Subscribe to CommandApplied, or use lag=None.",
            reason="awaited inside a handler with a finite lag",
        )


def _number(method: str, value: Any) -> float | int | bool:
    """Returns a Python number for a Python or NumPy number or a 0-d array."""
    item = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if not isinstance(item, (int, float)):
        raise ConfigurationError(f"{method}: expected a number or a 0-d array, got {value!r}.")
    return item
