"""``eventtrain ctl``: steers a running training from another terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from eventtrain.errors import CommandRejectedError, RunNotReachable, printable
from eventtrain.events import CommandApplied
from eventtrain.events.commands import (
    Command,
    Evaluate,
    Pause,
    Profile,
    Resume,
    SaveCheckpoint,
    ScaleHyperparam,
    SetHyperparam,
    Stop,
    TakeSample,
)
from eventtrain.runs.control_client import ControlClient
from eventtrain.runs.summary import RunSummary, summarise

app = typer.Typer(
    help="Steer a running training. Prints the step at which a command took effect. Exit code 1: the run rejected "
    "it, or has not answered yet; 2: no run answers.",
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},  # negative numbers
)

NUMBERS = {"ignore_unknown_options": True}
ENDS: dict[str, str] = {
    "finished": "finished",
    "stopped": "was stopped",
    "failed": "failed",
    "killed": "was killed",
}
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as one line of JSON.")]
Reason = Annotated[str, typer.Option(help="For logs and events.")]
ParameterPath = Annotated[
    str | None, typer.Option("--path", help="Its path or a part of it, if the name occurs in several places.")
]


@app.callback()
def ctl(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of the run.")],
    timeout_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answer.")] = 30.0,
) -> None:
    """Holds the folder of the run."""
    context.obj = (run_dir, timeout_s)


@app.command("set", context_settings=NUMBERS)
def set_(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="For example learning_rate.")],
    value: float,
    path: ParameterPath = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Set a hyperparameter."""
    _send(context, as_json, SetHyperparam, name=name, value=value, path=path, reason=reason)


@app.command(context_settings=NUMBERS)
def scale(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="For example learning_rate.")],
    factor: float,
    path: ParameterPath = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Multiply a hyperparameter."""
    _send(context, as_json, ScaleHyperparam, name=name, factor=factor, path=path, reason=reason)


@app.command()
def stop(context: typer.Context, reason: Reason = "stopped", as_json: AsJson = False) -> None:
    """End the run at the next boundary, as if it had reached its end."""
    _send(context, as_json, Stop, reason=reason)


@app.command()
def pause(context: typer.Context, reason: Reason = "", as_json: AsJson = False) -> None:
    """Hold the run until it is resumed or stopped."""
    _send(context, as_json, Pause, reason=reason)


@app.command()
def resume(context: typer.Context, reason: Reason = "", as_json: AsJson = False) -> None:
    """Continue a run that is paused."""
    _send(context, as_json, Resume, reason=reason)


@app.command()
def checkpoint(
    context: typer.Context,
    tag: Annotated[str | None, typer.Argument(help="Its name.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Have the run's Checkpointer save the state."""
    _send(context, as_json, SaveCheckpoint, tag=tag, reason=reason)


@app.command()
def evaluate(context: typer.Context, reason: Reason = "", as_json: AsJson = False) -> None:
    """Evaluate at the next boundary."""
    _send(context, as_json, Evaluate, reason=reason)


@app.command()
def profile(context: typer.Context, steps: int, reason: Reason = "", as_json: AsJson = False) -> None:
    """Trace the next steps with JAX's profiler. The run needs a Profiler among its subscribers."""
    _send(context, as_json, Profile, steps=steps, reason=reason)


@app.command()
def sample(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name of a Sample among the run's subscribers.")],
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Have the model make a sample."""
    _send(context, as_json, TakeSample, name=name, reason=reason)


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Print where the run is, and its hyperparameters."""
    try:
        with _client(context) as client:
            found = client.status()
    except (RunNotReachable, CommandRejectedError, TimeoutError) as error:
        _fail(error, as_json)
    typer.echo(json.dumps(found) if as_json else printable(_described(found), lines=True))


def _described(status: Mapping[str, Any]) -> str:
    aim = status["steps"] and f" of {status['steps']}"
    epochs = status["epochs"] and f" of {status['epochs']}"
    lines = [
        f"{status['state']}: run {status['run_id']}, attempt {status['attempt']}, process {status['pid']}",
        f"step {status['step']}{aim or ''}, {status['epoch']}{epochs or ''} epochs completed",
        *(f"{name} = {value}" for name, value in status["hyperparams"].items()),
    ]
    return "\n".join(lines)


def _send(context: typer.Context, as_json: bool, kind: type[Command], **fields: Any) -> None:
    try:
        command = kind(**fields)
    except ValidationError as error:
        raise typer.BadParameter(error.errors(include_url=False)[0]["msg"]) from error
    try:
        with _client(context) as client:
            applied = client.send(command)
    except (RunNotReachable, CommandRejectedError, TimeoutError) as error:
        _fail(error, as_json)
    typer.echo(applied.model_dump_json() if as_json else printable(_effect(applied)))


def _effect(applied: CommandApplied) -> str:
    command = applied.command
    match command:
        case SetHyperparam(name=name, value=value):
            what = f"set {name} to {value:g}"
        case ScaleHyperparam(name=name, factor=factor):
            what = f"scaled {name} by {factor:g}"
        case SaveCheckpoint(tag=tag):
            what = f"took the checkpoint {tag}" if tag else "took a checkpoint"
        case TakeSample(name=name):
            what = f"made the sample {name}"
        case _:
            what = command.kind
    return f"step {applied.step}: {what}"


def _client(context: typer.Context) -> ControlClient:
    run_dir, timeout_s = context.obj
    try:
        return ControlClient(run_dir, timeout_s=timeout_s)
    except RunNotReachable as error:
        if run_dir.is_dir() and (end := _end_of(summarise(run_dir))):
            raise RunNotReachable(f"No run answers in {run_dir}. The last one there {end}.") from error
        raise


def _end_of(run: RunSummary) -> str:
    """Returns how and when the run ended; empty if its log does not say that it has."""
    if run.state not in ENDS:
        return ""
    time = "" if run.updated is None else f" ({run.updated.astimezone():%Y-%m-%d %H:%M:%S})"
    reason = f": {run.reason.rstrip('.')}" if run.reason else ""
    return f"{ENDS[run.state]} at step {run.step}{time}{reason}"


def _fail(error: Exception, as_json: bool) -> NoReturn:
    text, code = str(error), 2
    if isinstance(error, CommandRejectedError):
        text, code = f"Rejected. {error.reason[:1].upper()}{error.reason[1:]}", 1
    elif isinstance(error, TimeoutError):
        text, code = "The run has not answered yet. The command stays in force.", 1
    if as_json:
        typer.echo(json.dumps({"rejected" if code == 1 else "error": text}))
    else:
        typer.echo(printable(f"{'' if code == 1 else 'Error: '}{text}", lines=True), err=True)
    raise typer.Exit(code)
