"""``eventtrain ls``, ``show`` and ``tail``: the runs of a folder, one run, and its events."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic_core import from_json, to_jsonable_python
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import eventtrain
from eventtrain.errors import EventTrainError, SnapshotError, printable
from eventtrain.runs.finding import find_log
from eventtrain.runs.journal import JSONLJournal
from eventtrain.runs.reading import EventReader
from eventtrain.runs.rows import wanted
from eventtrain.runs.summary import RunSummary, find_runs, summarise
from eventtrain.subscribers._shared.display_text import duration_text
from eventtrain.subscribers.checkpointing.manifest import is_checkpoint, read_manifest

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead: one line for each run or event.")]
RunDir = Annotated[Path, typer.Argument(help="The run_dir of a run.")]
COLOURS = {"running": "green", "failed": "red", "killed": "red", "stopped": "yellow"}
LAST_BYTES = 1 << 20
MOST_METRICS = 4


def ls(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, steps, duration, newest metrics."""
    if not folder.is_dir():
        _fail(f"{folder} is not a folder. Give one that has runs in it.")
    runs = [summarise(path) for path in find_runs(folder)]
    if as_json:
        for run in runs:
            typer.echo(json.dumps(_as_json(run, thorough=False)))
        return
    if not runs:
        _fail(f"There is no run in {folder}.")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (("STATE", "left"), ("STEP", "right"), ("EPOCH", "right"), ("TIME", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    table.add_column("METRICS", overflow="fold", min_width=15)
    table.add_column("CHECKPOINTS", justify="right")
    table.add_column("RUN", overflow="fold", min_width=15)
    for run in runs:
        table.add_row(
            _state(run),
            str(run.step),
            "-" if run.epoch is None else str(run.epoch),
            "-" if run.duration_s is None else duration_text(run.duration_s),
            Text(printable(run.problem or _metrics(run, MOST_METRICS))),
            str(sum(1 for _ in _checkpoints(run.path))),
            Text(printable(str(run.path))),
        )
    _console().print(table)


def show(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show one run: state, metrics with their best values, hyperparameters and checkpoints."""
    if not run_dir.is_dir():
        _fail(f"{run_dir} is not a folder. Give the run_dir of a run.")
    run = summarise(run_dir, thorough=True)
    if as_json:
        typer.echo(json.dumps(_as_json(run, thorough=True)))
        return
    console, facts = _console(), Table(box=None, show_header=False, pad_edge=False)
    started = "-" if run.started is None else f"{run.started.astimezone():%Y-%m-%d %H:%M:%S}"
    time = None if run.duration_s is None else duration_text(run.duration_s)
    for name, value in (
        ("state", _state(run)), ("reason", run.reason), ("run", run.run_id), ("attempt", run.attempt),
        ("step", run.step), ("epochs completed", run.epoch), ("started", started), ("time", time),
        ("log", run.log), ("problem", run.problem),
    ):  # fmt: skip
        if value not in (None, ""):
            facts.add_row(
                Text(name, style="bold"), value if isinstance(value, Text) else Text(printable(str(value)))
            )
    console.print(facts)
    if run.metrics:
        table = _table("METRIC", "NEWEST", "MINIMUM", "AT STEP", "MAXIMUM", "AT STEP")
        for name, value in run.metrics.items():
            best = run.best.get(name)
            row = (best.minimum, best.minimum_step, best.maximum, best.maximum_step) if best else ("-",) * 4
            table.add_row(Text(printable(name)), *(_number(each) for each in (value, *row)))
        console.print(table)
    if run.hyperparams:
        table = _table("HYPERPARAMETER", "VALUE")
        for name, value in run.hyperparams.items():
            table.add_row(Text(printable(name)), _number(value))
        console.print(table)
    if checkpoints := list(_checkpoints(run_dir)):
        table = _table("CHECKPOINT", "STEP", "SIZE")
        for each in checkpoints:
            size = "-" if each["size_bytes"] is None else decimal(each["size_bytes"])
            table.add_row(Text(printable(each["path"])), str(each["step"] or "-"), size)
        console.print(table)


def tail(
    run_dir: RunDir,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more, until the run ends.")
    ] = False,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of events.")] = 10,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only events of this kind. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the newest events of a run."""
    try:
        rows = _rows(run_dir, count, tuple(kinds) if kinds else None, follow=follow)
        for row in rows:
            typer.echo(row if as_json else printable(_line(from_json(row))))
    except (EventTrainError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


class RawRows(JSONLJournal):
    """A log whose events are not parsed, so that the event classes of the user need not be known."""

    def read(self) -> Iterator[Any]:
        """Yields the rows as text."""
        for line in self.lines():
            yield line.decode("utf-8", "replace")


def _rows(run_dir: Path, count: int, kinds: tuple[str, ...] | None, *, follow: bool) -> Iterator[str]:
    log = find_log(run_dir)
    folders = log.parents[:2] if log == run_dir else (run_dir,)
    if log.suffix != ".jsonl":
        events = eventtrain.read_events(log, kinds=kinds)
        yield from (event.model_dump_json() for event in deque(events, maxlen=count))
        return
    journal = RawRows(log, _any_kind(kinds))
    if kinds is None:
        journal.skip_near_end(LAST_BYTES)
    yield from deque(EventReader[Any](journal, folders, None, follow=False), maxlen=count)
    if follow:
        with EventReader[Any](journal, folders, None, follow=True) as more:
            yield from more


def _any_kind(kinds: tuple[str, ...] | None) -> Any:
    return wanted(kinds, None, ())


def _line(event: dict[str, Any]) -> str:
    """Returns one line: time, step, kind, and what the event adds to every event's fields."""
    time = datetime.fromisoformat(str(event.get("time"))).astimezone()
    own = {key: value for key, value in event.items() if key not in eventtrain.Event.model_fields}
    for name in ("metrics", "hyperparams"):
        own |= own.pop(name, {}) if isinstance(own.get(name), dict) else {}
    fields = " ".join(f"{key}={_number(value)}" for key, value in own.items() if value not in (None, "", [], {}))
    return f"{time:%H:%M:%S} {event.get('step'):>8} {event.get('kind')} {fields}".rstrip()


def _as_json(run: RunSummary, *, thorough: bool) -> dict[str, Any]:
    found: dict[str, Any] = to_jsonable_python(
        asdict(run) | {"duration_s": run.duration_s, "checkpoints": list(_checkpoints(run.path))},
        inf_nan_mode="strings",
    )
    if not thorough:
        del found["best"]
    return found


def _checkpoints(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields the checkpoints of a run, in the order of their names."""
    for pattern in ("*", "*/*"):
        for path in sorted(run_dir.glob(pattern)):
            if is_checkpoint(path):
                entry = {
                    "path": path.relative_to(run_dir).as_posix(),
                    "step": None,
                    "tag": None,
                    "size_bytes": None,
                }
                try:
                    manifest = read_manifest(path)
                    entry |= {
                        "step": manifest.step, "tag": manifest.tag, "size_bytes": sum(manifest.files.values()),
                    }  # fmt: skip
                except SnapshotError:
                    pass  # `eventtrain checkpoints ls` tells why
                yield entry


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _state(run: RunSummary) -> Text:
    return Text(run.state, style=COLOURS.get(run.state, ""))


def _metrics(run: RunSummary, most: int) -> str:
    shown = [f"{name}={_number(value)}" for name, value in list(run.metrics.items())[:most]]
    return " ".join([*shown, "..."] if len(run.metrics) > most else shown) or "-"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    typer.echo(printable(f"Error: {message}", lines=True), err=True)
    raise typer.Exit(2)
