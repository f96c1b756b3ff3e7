"""``issue``: a command that came from outside as JSON, sent by the method of ``Control`` that makes such commands."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events.commands import (
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


def issue(control: Control, command: Any) -> Command:
    """Sends ``command``, which came from outside the program, by the method of ``control`` for it.

    Its cause and its boundary are those of ``control``.

    Raises:
        ConfigurationError: it cannot work, or has what only the run may set.
    """
    require_unset(command)
    reason = command.reason
    match command:
        case SetHyperparam(name=name, value=value, path=path):
            return control.set_hyperparam(name, value, path=path, reason=reason)
        case ScaleHyperparam(name=name, factor=factor, minimum=minimum, maximum=maximum, path=path):
            return control.scale_hyperparam(
                name, factor, minimum=minimum, maximum=maximum, path=path, reason=reason
            )
        case Stop(final=final):
            return control.stop(reason or "stopped", final=final)
        case SaveCheckpoint(tag=tag):
            return control.checkpoint(tag, reason=reason)
        case TakeSnapshot(tag=tag):
            return control.snapshot(tag, reason=reason)
        case Restore(target=target, part=part):
            return control.restore(target, part, reason=reason)
        case Pause():
            return control.pause(reason=reason)
        case Resume():
            return control.resume(reason=reason)
        case Evaluate():
            return control.evaluate(reason=reason)
        case Profile(steps=steps):
            return control.profile(steps, reason=reason)
        case TakeSample(name=name):
            return control.sample(name, reason=reason)
        case _:
            raise ConfigurationError(f"there is no command {command.kind}")


def require_unset(command: Command) -> None:
    """Raises ConfigurationError if the sender has set what only the run may set."""
    if command.due is not None or command.cause is not None or command.source is not None:
        raise ConfigurationError("due, cause and source are set by the run")


def first_problem(error: ValidationError) -> str:
    """Returns where a request is invalid and why, in at most 500 characters, without what its sender wrote there."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200]
    return f"{place}: {first['msg']}"[:500]
