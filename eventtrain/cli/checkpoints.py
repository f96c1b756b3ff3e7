"""``eventtrain checkpoints``: look at what runs have saved, check it, fetch it, and delete it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

import eventtrain
from eventtrain.subscribers.checkpointing.directory import delete
from eventtrain.subscribers.checkpointing.manifest import MANIFEST, TEMPORARY, Manifest, read_manifest
from eventtrain.subscribers.checkpointing.naming import scheduled_tag
from eventtrain.subscribers.remote.download import download_checkpoint

DEPTH = 3
"""How many folders below the one given a checkpoint may lie."""

app = typer.Typer(help="List, verify, fetch and remove the checkpoints of a run.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(help="A run_dir, a folder of checkpoints, or one checkpoint.")]


@app.command("ls")
def list_all(run_dir: RunDir) -> None:
    """List the checkpoints below RUN_DIR, those committed last at the bottom."""
    rows = [("STEP", "EPOCH", "HOLDS", "SIZE", "COMMITTED", "TAG", "METRICS", "PATH")]
    for path, manifest in _readable(_below(run_dir)):
        named = manifest.tag != scheduled_tag(manifest.step)
        rows.append(
            (
                str(manifest.step),
                str(manifest.epoch),
                "weights" if manifest.weights_only else "run",
                _size(sum(manifest.files.values())),
                f"{manifest.time:%Y-%m-%d %H:%M:%S}",
                manifest.tag if named else "-",
                " ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items()) or "-",
                path.relative_to(run_dir).as_posix() if path != run_dir else ".",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def verify(run_dir: RunDir) -> None:
    """Read every array of every checkpoint below RUN_DIR back; the exit code is 1 if one is broken."""
    broken = False
    for path in _below(run_dir):
        try:
            eventtrain.load_state(path)
            facts = read_manifest(path).facts
            for share in facts.shares.values() if facts is not None else ():
                share.share()
        except eventtrain.EventTrainError as error:
            broken = True
            typer.echo(f"{path}: broken: {error}")
        else:
            typer.echo(f"{path}: whole")
    if broken:
        raise typer.Exit(1)


@app.command("rm")
def remove(
    run_dir: RunDir,
    which: Annotated[str, typer.Argument(help="A step, a tag, or the name of the checkpoint's folder.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete one checkpoint below RUN_DIR."""
    found = list(_readable(_below(run_dir)))
    chosen = [path for path, manifest in found if which in (path.name, manifest.tag, str(manifest.step))]
    if not chosen:
        _refuse(f"No checkpoint below {run_dir} has the step, tag or name {which!r}.")
    if len(chosen) > 1:
        listing = ", ".join(path.relative_to(run_dir).as_posix() for path in chosen)
        _refuse(
            f"{which!r} means several checkpoints: {listing}. Give the folder of one of them, and its name."
        )
    if not yes:
        typer.confirm(f"Delete {chosen[0]}?", abort=True)
    try:
        delete(chosen[0])
    except OSError as error:
        _refuse(f"{chosen[0]} could not be deleted: {error}")
    typer.echo(f"Deleted {chosen[0]}.")


@app.command()
def pull(
    url: Annotated[str, typer.Argument(help="That of an Uploader, or of one checkpoint.")],
    directory: Annotated[Path, typer.Argument(help="Where to put it: the Checkpointer's folder.")],
    which: Annotated[str, typer.Argument(help="newest, a step, a tag or a name.")] = "newest",
    logs: Annotated[
        Path | None, typer.Option(help="A run_dir to put the logs in, as they were then; none if not given.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for obstore. Keys belong in the environment, where others do not see them."
        ),
    ] = None,
) -> None:
    """Fetch a checkpoint from a store, and verify it."""
    options = {key: value for key, _, value in (each.partition("=") for each in option or ())}
    try:
        path = download_checkpoint(
            url, directory, int(which) if which.isdecimal() else which, logs=logs, options=options
        )
    except (eventtrain.EventTrainError, OSError) as error:
        _refuse(str(error))
    typer.echo(str(path))


def _below(run_dir: Path) -> list[Path]:
    """The folders of checkpoints, in the order of their commits where that can be read."""
    patterns = ("/".join(["*"] * depth + [MANIFEST]) for depth in range(DEPTH + 1))
    found = {manifest.parent for pattern in patterns for manifest in run_dir.glob(pattern)}
    paths = [path for path in found if not path.name.startswith(TEMPORARY)]
    if not paths:
        _refuse(f"There is no checkpoint in {run_dir}.")
    return sorted(paths, key=_order)


def _order(path: Path) -> tuple[str, int, str]:
    try:
        return path.parent.as_posix(), read_manifest(path).number, path.name
    except eventtrain.SnapshotError:
        return path.parent.as_posix(), 0, path.name


def _readable(paths: list[Path]) -> list[tuple[Path, Manifest]]:
    """With their manifests; one that cannot be read is said, and left out."""
    found: list[tuple[Path, Manifest]] = []
    for path in paths:
        try:
            found.append((path, read_manifest(path)))
        except eventtrain.SnapshotError as error:
            typer.echo(str(error), err=True)
    return found


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def _refuse(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)
