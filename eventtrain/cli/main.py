"""The command ``eventtrain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import eventtrain
from eventtrain.cli import checkpoints
from eventtrain.cli.demo import run_demo
from eventtrain.cli.script import Job, imported, passed_through, prepare
from eventtrain.config.load import FitConfig, load_run, run_json_schema
from eventtrain.errors import printable
from eventtrain.subscribers import ProgressBar

app = typer.Typer(
    help="Event-driven training loops for JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables, which may contain secrets
)
app.add_typer(checkpoints.app, name="checkpoints")


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
    """Holds the options of ``eventtrain`` itself."""


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for all files. Default: runs/demo-<time>.")] = None,
) -> None:
    """Train a small network on handwritten digits, with every kind of subscriber."""
    problem = run_demo(out)
    if problem is not None:
        typer.echo(printable(f"The demo failed: {problem}", lines=True), err=True)
        raise typer.Exit(1)


@app.command()
def schema(
    config: Annotated[
        bool, typer.Option("--config", help="Print the schema of the files for `eventtrain run` instead.")
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
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the file. Repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs. Overrides the file.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps. Overrides the file.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the newest checkpoint, or start from scratch if there is none. Requires "
            "Trainer(run_dir=...).",
        ),
    ] = False,
) -> None:
    """Train the model of a script with the subscribers of a configuration file."""
    if epochs is not None and steps is not None:
        raise typer.BadParameter("expected --epochs or --steps, not both.")
    try:
        settings = load_run(config, overrides or ())
        fit = settings.fit if epochs is None and steps is None else FitConfig(epochs=epochs, steps=steps)
        if fit.epochs is None and fit.steps is None:
            raise eventtrain.ConfigurationError(
                f"{config} does not set the length of the training. Add `epochs = 20` to [fit], or use --epochs 20."
            )
        with imported(script) as module:
            job = prepare(module, settings.subscribers)
            typer.echo(_summary(_train(job, fit, resume), job.trainer.epoch))
    except eventtrain.EventTrainError as error:
        if isinstance(error, eventtrain.StepError) or passed_through(error, script):
            raise
        text = "\n".join([f"Error: {error}", *getattr(error, "__notes__", ())])
        typer.echo(printable(text, lines=True), err=True)
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
    return printable(f"step {result.step} after {after} ({result.stop_reason}): {values or 'no metrics'}")
