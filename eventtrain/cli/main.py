"""The command ``eventtrain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import eventtrain
from eventtrain.cli import checkpoints as checkpoint_commands
from eventtrain.cli.demo import run_demo
from eventtrain.cli.script import Job, imported, passed_through, prepare
from eventtrain.config.load import FitConfig, load_run, run_json_schema
from eventtrain.subscribers import ProgressBar

app = typer.Typer(
    help="eventtrain: training steps publish typed events, async subscribers act on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables, in which there may be secrets
)

app.add_typer(checkpoint_commands.app, name="checkpoints")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eventtrain {eventtrain.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """What every subcommand has in common."""


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the log and the checkpoints; runs/demo-<time> unless given."),
    ] = None,
) -> None:
    """Train a small network on real digits with every kind of subscriber, on the CPU, in well under a minute."""
    problem = run_demo(out)
    if problem is not None:
        typer.echo(f"The demo failed: {problem}", err=True)
        raise typer.Exit(1)


@app.command()
def schema(
    config: Annotated[
        bool,
        typer.Option(
            "--config", help="Of a file for `eventtrain run`, with every type of subscriber installed."
        ),
    ] = False,
) -> None:
    """Print the JSON Schema of all events."""
    typer.echo(json.dumps(run_json_schema() if config else eventtrain.events_json_schema(), indent=2))


@app.command()
def run(
    script: Annotated[
        Path, typer.Argument(help="Python file that defines make_trainer(), and data or make_data().")
    ],
    config: Annotated[Path, typer.Option(help="TOML or YAML file with the sections fit and subscribers.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Over what the file says; may be repeated."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of what the file says.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of what the file says.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint; begin anew where there is none. Needs Trainer(run_dir=...).",
        ),
    ] = False,
) -> None:
    """Train what a script defines, with the subscribers of a file."""
    if epochs is not None and steps is not None:
        raise typer.BadParameter("give --epochs or --steps, not both.")
    try:
        settings = load_run(config, overrides or ())
        fit = settings.fit if epochs is None and steps is None else FitConfig(epochs=epochs, steps=steps)
        if fit.epochs is None and fit.steps is None:
            raise eventtrain.ConfigurationError(
                f"{config} does not say how long: [fit] epochs = 20, or --epochs 20."
            )
        with imported(script) as module:
            job = prepare(module, settings.subscribers)
            typer.echo(_summary(_train(job, fit, resume), job.trainer.epoch))
    except eventtrain.EventTrainError as error:
        if isinstance(error, eventtrain.StepError) or passed_through(error, script):
            raise
        typer.echo("\n".join([f"Error: {error}", *getattr(error, "__notes__", ())]), err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _train(job: Job, fit: FitConfig, resume: bool) -> eventtrain.FitResult[Any]:
    has_bar = any(isinstance(subscriber, ProgressBar) for subscriber in job.trainer.subscribers)
    try:
        return job.trainer.fit(
            job.data,
            epochs=fit.epochs,
            steps=fit.steps,
            eval_data=job.eval_data,
            resume=resume,
            progress=False if has_bar else None,
        )
    except KeyboardInterrupt:
        typer.echo(f"Interrupted at step {job.trainer.step}.", err=True)
        raise


def _summary(result: eventtrain.FitResult[Any], epochs: int) -> str:
    metrics = result.history[-1].metrics if result.history else {}
    values = " ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    after = f"{epochs} epoch{'s' * (epochs != 1)}"
    return f"step {result.step} after {after} ({result.stop_reason}): {values or 'no metrics'}"
