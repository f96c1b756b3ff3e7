"""The command ``eventtrain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import eventtrain
from eventtrain.demo import run_demo

app = typer.Typer(
    help="eventtrain: training steps publish typed events, async subscribers act on them.",
    no_args_is_help=True,
)


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
def schema() -> None:
    """Print the JSON Schema of all events."""
    typer.echo(json.dumps(eventtrain.events_json_schema(), indent=2))
