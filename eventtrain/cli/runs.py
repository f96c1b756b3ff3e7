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
from eventtrain.errors import EventTrainError, SnapshotError, listed, printable
from eventtrain.runs.finding import find_log
from eventtrain.runs.journal import JSONLJournal
from eventtrain.runs.reading import EventReader
from eventtrain.runs.rows import wanted
from eventtrain.runs.summary import RunSummary, find_runs, summarise
from eventtrain.subscribers._shared.display_text import duration_text
from eventtrain.subscribers.checkpointing.directory import size_of
from eventtrain.subscribers.checkpointing.manifest import Manifest, is_checkpoint, read_manifest

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead: one line for each run or event.")]
RunDir = Annotated[Path, typer.Argument(help="The run_dir of a run.")]
COLOURS = {"running": "green", "failed": "red", "killed": "red", "stopped": "yellow"}
LAST_BYTES = 1 << 20
MOST_METRICS = 4
NARROW = 80
"""Consoles with fewer columns show neither epochs nor checkpoints."""
WIDEST = 10_000


def ls(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, steps, duration, newest metrics."""
    if not folder.is_dir():
        _fail(f"{folder} is not a folder. Give one that has runs in it.")
    runs = [_summarised(path) for path in find_runs(folder)]
    if as_json:
        for run in runs:
            typer.echo(json.dumps(_as_json(run, thorough=False)))
        return
    if not runs:
        _fail(f"There is no run in {folder}.")
    console = _console()
    table = _table_of(runs, console.width)
    if console.width < table.__rich_measure__(console, console.options.update(max_width=WIDEST)).maximum:
        table = _table_of(runs, console.width, fill=console.width // 3)
    console.print(table)
    problems: dict[str, list[str]] = {}
    for run in runs:
        if run.problem:
            problems.setdefault(run.problem.removeprefix(f"{run.path} "), []).append(str(run.path))
    for problem, paths in problems.items():
        console.print(Text(printable(f"{listed(paths)}: {problem}")))


def show(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show one run: state, metrics with their best values, hyperparameters and checkpoints."""
    if not run_dir.is_dir():
        _fail(f"{run_dir} is not a folder. Give the run_dir of a run.")
    run = _summarised(run_dir, thorough=True)
    if as_json:
        typer.echo(json.dumps(_as_json(run, thorough=True)))
        return
    console, facts = _console(), Table(box=None, show_header=False, pad_edge=False)
    started = None if run.started is None else f"{run.started.astimezone():%Y-%m-%d %H:%M:%S}"
    time = None if run.duration_s is None else duration_text(run.duration_s)
    for name, value in (
        ("state", _state(run)), ("reason", run.reason), ("run", run.run_id), ("attempt", run.attempt or None),
        ("step", run.step), ("epochs completed", run.epoch), ("started", started), ("time", time),
        ("log", run.log), ("problem", run.problem),
    ):  # fmt: skip
        if value not in (None, ""):
            facts.add_row(
                Text(name, style="bold"), value if isinstance(value, Text) else Text(printable(str(value)))
            )
    console.print(facts)
    if run.metrics:
        table = _table("METRIC", "NEWEST", "MIN OF EPOCHS", "AT STEP", "MAX OF EPOCHS", "AT STEP")
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
    fields = " ".join(
        f"{key}={_number(value)}" for key, value in own.items() if value not in (None, "", [], {})
    )
    return f"{time:%H:%M:%S} {event.get('step'):>8} {event.get('kind')} {fields}".rstrip()


def _as_json(run: RunSummary, *, thorough: bool) -> dict[str, Any]:
    found: dict[str, Any] = to_jsonable_python(
        asdict(run) | {"duration_s": run.duration_s, "checkpoints": list(_checkpoints(run.path))},
        inf_nan_mode="strings",
    )
    if not thorough:
        del found["best"]
    return found


def _checkpoint_folders(run_dir: Path) -> Iterator[Path]:
    """Yields the folders of a run's checkpoints, in the order of their names."""
    for pattern in ("*", "*/*"):
        yield from filter(is_checkpoint, sorted(run_dir.glob(pattern)))


def _manifest_in(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except SnapshotError:
        return None  # `eventtrain checkpoints ls` tells why


def _checkpoints(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields what the checkpoints of a run are, which reads each of them."""
    for folder in _checkpoint_folders(run_dir):
        manifest = _manifest_in(folder)
        yield {
            "path": folder.relative_to(run_dir).as_posix(),
            "step": manifest and manifest.step,
            "tag": manifest and manifest.tag,
            "size_bytes": manifest and size_of(folder),
        }


def _summarised(run_dir: Path, *, thorough: bool = False) -> RunSummary:
    """Returns the summary of a run; where there is no log, its step is that of the newest checkpoint."""
    run = summarise(run_dir, thorough=thorough)
    if run.log is None:
        manifests = map(_manifest_in, _checkpoint_folders(run_dir))
        run.step = max((manifest.step for manifest in manifests if manifest), default=run.step)
    return run


def _table_of(runs: list[RunSummary], width: int, fill: int = WIDEST) -> Table:
    """Returns the table of ``ls``. Only paths are broken, never a number. Narrow tables have fewer columns.

    Args:
        runs: the rows.
        width: of the console.
        fill: width of the column of metrics, unless one of them is wider.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    is_wide = width >= NARROW
    names = ("STATE", "STEP", *(("EPOCH",) if is_wide else ()), "TIME", "METRICS")
    for name in (*names, "CHECKPOINTS") if is_wide else names:
        table.add_column(name, justify="left" if name in ("STATE", "METRICS") else "right", no_wrap=True)
    table.add_column("RUN", overflow="fold", min_width=10)
    for run in runs:
        cells: dict[str, str | Text] = {
            "STATE": _state(run),
            "STEP": str(run.step),
            "EPOCH": "-" if run.epoch is None else str(run.epoch),
            "TIME": "-" if run.duration_s is None else duration_text(run.duration_s),
            "METRICS": Text(_metrics(run, MOST_METRICS, fill)),
            "CHECKPOINTS": str(sum(1 for _ in _checkpoint_folders(run.path))),
            "RUN": Text(printable(str(run.path))),
        }
        table.add_row(*(cells[str(column.header)] for column in table.columns))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _state(run: RunSummary) -> Text:
    return Text(run.state, style=COLOURS.get(run.state, ""))


def _metrics(run: RunSummary, most: int, width: int) -> str:
    """Returns lines of whole metrics, as many in a line as fit into ``width``."""
    if run.problem:
        return "no log" if run.log is None else "unreadable"
    shown = [printable(f"{name}={_number(value)}") for name, value in list(run.metrics.items())[:most]]
    more = len(run.metrics) - len(shown)
    lines = [""]
    for each in [*shown, f"+{more} more"] if more else shown:
        if lines[-1] and len(lines[-1]) + 1 + len(each) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {each}".lstrip()
    return "\n".join(lines) or "-"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    typer.echo(printable(f"Error: {message}", lines=True), err=True)
    raise typer.Exit(2)
