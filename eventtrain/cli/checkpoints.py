"""``eventtrain checkpoints``: lists, verifies, deletes and downloads the checkpoints of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.filesize import decimal

import eventtrain
from eventtrain import SnapshotError
from eventtrain.errors import printable
from eventtrain.subscribers.checkpointing.directory import delete, size_of
from eventtrain.subscribers.checkpointing.manifest import Manifest, is_checkpoint, read_manifest
from eventtrain.subscribers.checkpointing.naming import scheduled_tag
from eventtrain.subscribers.remote.download import download_checkpoint

DEPTH = 3
"""Number of folder levels below the given one that are searched."""

app = typer.Typer(help="List, verify, delete and download checkpoints.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(help="A run_dir, a folder of checkpoints, or one checkpoint.")]


@app.command("ls")
def list_all(run_dir: RunDir) -> None:
    """List the checkpoints in RUN_DIR in the order of their commits, the newest last."""
    rows: list[tuple[str, ...]] = [("STEP", "EPOCH", "HOLDS", "SIZE", "COMMITTED", "TAG", "METRICS", "PATH")]
    for path, manifest in _checkpoints(run_dir):
        if isinstance(manifest, SnapshotError):
            typer.echo(printable(str(manifest), lines=True), err=True)
            continue
        row = (
            str(manifest.step),
            str(manifest.epoch),
            "weights" if manifest.weights_only else "run",
            decimal(size_of(path)),
            f"{manifest.time:%Y-%m-%d %H:%M:%S}",
            "-" if manifest.tag == scheduled_tag(manifest.step) else manifest.tag,
            " ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items()) or "-",
            path.relative_to(run_dir).as_posix(),
        )
        rows.append(tuple(map(printable, row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def verify(run_dir: RunDir) -> None:
    """Read every checkpoint in RUN_DIR completely. The exit code is 1 if one is damaged."""
    damaged = False
    for path, _ in _checkpoints(run_dir):
        try:
            eventtrain.load_state(path)
        except eventtrain.EventTrainError as error:
            damaged = True
            typer.echo(printable(f"{path}: damaged: {error}", lines=True))
        else:
            typer.echo(printable(f"{path}: ok"))
    if damaged:
        raise typer.Exit(1)


@app.command("rm")
def remove(
    run_dir: RunDir,
    which: Annotated[str, typer.Argument(help="The step, the tag or the folder name of the checkpoint.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete one checkpoint in RUN_DIR."""
    chosen = [
        path
        for path, manifest in _checkpoints(run_dir)
        if which == path.name
        or (isinstance(manifest, Manifest) and which in (manifest.tag, str(manifest.step)))
    ]
    if not chosen:
        _fail(f"No checkpoint in {run_dir} has the step, tag or name {which!r}.")
    if len(chosen) > 1:
        paths = ", ".join(path.relative_to(run_dir).as_posix() for path in chosen)
        _fail(
            f"{which!r} matches several checkpoints: {paths}. Give the folder of one of them, and its name."
        )
    if not yes:
        typer.confirm(printable(f"Delete {chosen[0]}?"), abort=True)
    try:
        delete(chosen[0])
    except OSError as error:
        _fail(f"{chosen[0]} could not be deleted: {error}")
    typer.echo(printable(f"Deleted {chosen[0]}."))


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="The URL of an Uploader, or of one checkpoint.")],
    directory: Annotated[Path, typer.Argument(help="The folder for the checkpoint, that of a Checkpointer.")],
    which: Annotated[str, typer.Argument(help="newest, a step, a tag or a name.")] = "newest",
    logs: Annotated[
        Path | None,
        typer.Option(help="A run_dir for the logs as they were at that checkpoint. Default: no logs."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for obstore. Put secrets into the environment; options are visible."),
    ] = None,
) -> None:
    """Download a checkpoint from an object store, and verify it."""
    options = {key: value for key, _, value in (each.partition("=") for each in option or ())}
    name = int(which) if which.isdecimal() else which
    try:
        path = download_checkpoint(url, directory, name, logs=logs, options=options)
    except (eventtrain.EventTrainError, OSError) as error:
        _fail(str(error))
    typer.echo(printable(str(path)))


def _checkpoints(run_dir: Path) -> list[tuple[Path, Manifest | SnapshotError]]:
    """Returns the folder of each checkpoint in ``run_dir``, and its manifest or the error of reading it.

    They are in the order of their commits; those without a readable manifest come first.
    """
    found: list[tuple[Path, Manifest | SnapshotError]] = []
    for depth in range(DEPTH + 1):
        for path in run_dir.glob("/".join(["*"] * depth)) if depth else (run_dir,):
            if is_checkpoint(path):
                try:
                    found.append((path, read_manifest(path)))
                except SnapshotError as error:
                    found.append((path, error))
    if not found:
        _fail(f"There is no checkpoint in {run_dir}.")

    def order(each: tuple[Path, Manifest | SnapshotError]) -> tuple[Path, int, str]:
        path, manifest = each
        return path.parent, manifest.number if isinstance(manifest, Manifest) else 0, path.name

    return sorted(found, key=order)


def _fail(message: str) -> NoReturn:
    typer.echo(printable(f"Error: {message}", lines=True), err=True)
    raise typer.Exit(2)
