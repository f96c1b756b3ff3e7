"""``eventtrain replay``: the events of a finished run, given to the subscribers of a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import eventtrain
from eventtrain.config.load import load_subscribers
from eventtrain.errors import EventTrainError, printable


def replay(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a run that has ended, or its JSONL log.")],
    config: Annotated[
        Path, typer.Option(help="TOML or YAML file with the subscribers, as for `eventtrain run`.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the file. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that relative paths of the subscribers are in. Default: that of the run."),
    ] = None,
) -> None:
    """Give the events of a finished run to other subscribers: a tracker that was forgotten, the report again."""
    try:
        subscribers = load_subscribers(config, overrides=overrides or ())
        count = eventtrain.replay(run_dir, subscribers, out_dir=out)
    except (EventTrainError, OSError) as error:
        text = "\n".join([f"Error: {error}", *getattr(error, "__notes__", ())])
        typer.echo(printable(text, lines=True), err=True)
        raise typer.Exit(2) from None
    names = ", ".join(one.name or type(one).__name__ for one in subscribers)
    typer.echo(printable(f"{count:,} events of {run_dir} were given to {names}."))
