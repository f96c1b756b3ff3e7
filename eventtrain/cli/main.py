"""The command ``eventtrain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import eventtrain
from eventtrain.cli import checkpoints, ctl, runs
from eventtrain.cli.dashboard import dashboard
from eventtrain.cli.demo import run_demo
from eventtrain.cli.launch import OPTIONS_END_AT_THE_SCRIPT, launch
from eventtrain.cli.replay import replay
from eventtrain.cli.script import Job, imported, length_of, passed_through, prepare
from eventtrain.config.load import FitConfig, RunConfig, described, load_run, run_json_schema
from eventtrain.errors import printable
from eventtrain.subscribers import CommandReplay, ProgressBar

TEMPLATE = (Path(__file__).parent / "template.toml").read_text(encoding="utf-8")

app = typer.Typer(
    help="Event-driven training loops for JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables, which may contain secrets
)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(ctl.app, name="ctl")
app.command(context_settings=OPTIONS_END_AT_THE_SCRIPT)(launch)
app.command()(dashboard)
for command in (runs.ls, runs.show, runs.tail, replay):
    app.command()(command)


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
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.toml"),
) -> None:
    """Write a configuration file for `eventtrain run`, with comments. An existing file is left alone."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except OSError as error:
        reason = "it exists" if isinstance(error, FileExistsError) else error.strerror or error
        typer.echo(printable(f"Error: {path} was not written: {reason}.", lines=True), err=True)
        raise typer.Exit(2) from None
    typer.echo(printable(f"Wrote {path}. Train with: eventtrain run SCRIPT.py --config {path}"))


@app.command()
def run(
    script: Annotated[
        Path, typer.Argument(help="Python file that defines make_trainer(), and data or make_data().")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML or YAML file with the sections fit and subscribers; `eventtrain init` writes one. Default: the "
            "script has its own subscribers, and sets `epochs` or `steps`."
        ),
    ] = None,
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
    replay_commands: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Repeat the commands that steered the run in RUN_DIR from outside, at the same steps.",
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the settings of the file with all overrides, and exit."),
    ] = False,
) -> None:
    """Train the model of a script, with the subscribers of a configuration file if one is given."""
    if epochs is not None and steps is not None:
        raise typer.BadParameter("expected --epochs or --steps, not both.")
    if config is None and overrides:
        raise typer.BadParameter("--set changes values of a configuration file, so it requires --config.")
    try:
        settings = RunConfig(FitConfig(), []) if config is None else load_run(config, overrides or ())
        fit = settings.fit if epochs is None and steps is None else FitConfig(epochs=epochs, steps=steps)
        if print_config:
            tables = [] if config is None else described(config, overrides or ())
            typer.echo(
                json.dumps({"fit": fit.model_dump(exclude_none=True), "subscribers": tables}, indent=2)
            )
            return
        subscribers = settings.subscribers
        if replay_commands is not None:
            subscribers = [*subscribers, CommandReplay(replay_commands)]
        with imported(script) as module:
            if fit.epochs is None and fit.steps is None:
                fit = length_of(module, config)
            job = prepare(module, subscribers)
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
