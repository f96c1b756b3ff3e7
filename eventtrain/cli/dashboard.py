"""``eventtrain dashboard``: the page of finished and running runs, from their logs."""

from __future__ import annotations

import os
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from eventtrain.errors import ConfigurationError, EventTrainError, printable
from eventtrain.subscribers.dashboard.frames import Frames
from eventtrain.subscribers.dashboard.guard import Tokens, is_loopback
from eventtrain.subscribers.dashboard.run_files import RunFiles
from eventtrain.validation.optional_imports import import_optional, require_installed

TOKEN = "EVENTTRAIN_DASHBOARD_TOKEN"


def dashboard(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, or paths of their logs.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 0,
    host: Annotated[
        str, typer.Option(help=f"Address to listen on. Others than this machine's need {TOKEN}.")
    ] = "127.0.0.1",
    read_only: Annotated[bool, typer.Option("--read-only", help="Do not steer runs.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in a browser, side by side, from their logs. Running ones are followed, and can be steered."""
    try:
        page = _serve(run_dirs, host, port, read_only)
    except EventTrainError as error:
        typer.echo(printable(f"Error: {error}", lines=True), err=True)
        raise typer.Exit(2) from None
    typer.echo(f"Dashboard: {page}")
    if open_page:
        webbrowser.open(page)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _serve(run_dirs: list[Path], host: str, port: int, read_only: bool) -> str:
    """Starts the server, which ends with the process; returns the URL of the page."""
    server = import_optional(
        "eventtrain.subscribers.dashboard.server", extra="dashboard", used_by="eventtrain dashboard"
    )
    require_installed(server)
    given = os.environ.get(TOKEN)
    if given is None and not is_loopback(host):
        raise ConfigurationError(
            f"--host {host}: other machines may reach this address. Set {TOKEN}, or keep 127.0.0.1 and forward the "
            "port with ssh -L."
        )
    tokens = Tokens.given(given, TOKEN)
    runs = RunFiles(run_dirs)
    try:
        steering = None if read_only else runs
        serving = server.serve(Frames(runs.shown), steering, tokens, host, port, lambda: False)
    except OSError as error:
        runs.close()
        raise ConfigurationError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. --port 0 takes a free one."
        ) from error
    return serving.url(tokens.read if read_only else tokens.control)
