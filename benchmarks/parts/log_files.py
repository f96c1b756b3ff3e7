"""Time per row of the file loggers, beside the same rows written one by one.

The loggers receive windows of 512 steps with three float32 metrics, and are timed until every row is in the file. By
hand, each row is built from ``.item()`` and written with ``csv.writer`` or ``json.dumps``. The files are compared.
"""

from __future__ import annotations

import csv
import json as json_format
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import numpy as np

import eventtrain as et
from benchmarks.figures import Budget, Figure, absent, compared, figure
from benchmarks.machine import Device
from eventtrain import subscribers as subs

WINDOW = 512
"""Steps per window: about 40 ms of the 70 us loop."""
WINDOWS = 200
ROWS = WINDOW * WINDOWS
METRICS = ("accuracy", "grad_norm", "loss")


def make_windows() -> list[et.StepsCompleted]:
    rng = np.random.default_rng(0)
    return [
        et.StepsCompleted(
            run_id="20260101-120000-abcdef",
            step=first + WINDOW - 1,
            first_step=first,
            last_step=first + WINDOW - 1,
            epoch=0,
            first_batch=first - 1,
            metrics={name: rng.normal(size=WINDOW).astype(np.float32) for name in METRICS},
        )
        for first in range(1, ROWS, WINDOW)
    ]


def csv_by_rows(path: Path, windows: list[et.StepsCompleted]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "batch", *METRICS])
        for window in windows:
            columns = list(window.metrics.values())
            for row in range(WINDOW):
                step = window.first_step + row
                writer.writerow([step, 0, step - 1, *(column[row].item() for column in columns)])


def json_by_rows(path: Path, windows: list[et.StepsCompleted]) -> None:
    """Returns the fields of a row of JSONLLogger."""
    with open(path, "w", encoding="utf-8") as file:
        for window in windows:
            time = window.time.isoformat()
            for row in range(WINDOW):
                step = window.first_step + row
                values = {
                    "kind": "step_completed",
                    "run_id": window.run_id,
                    "attempt": window.attempt,
                    "stream": window.stream,
                    "seq": 0,
                    "time": time,
                    "step": step,
                    "schema_version": 1,
                    "epoch": window.epoch,
                    "batch": step - 1,
                    "metrics": {name: column[row].item() for name, column in window.metrics.items()},
                }
                file.write(json_format.dumps(values) + "\n")


def steps_of(windows: list[et.StepsCompleted]) -> list[et.Event]:
    return [
        et.StepCompleted(
            run_id=window.run_id,
            step=window.first_step + row,
            epoch=0,
            batch=window.first_batch + row,
            metrics={name: column[row].item() for name, column in window.metrics.items()},
        )
        for window in windows
        for row in range(WINDOW)
    ]


async def write_events(logger: Any, folder: Path, events: list[Any]) -> float:
    control: Any = None
    await logger.start(et.RunContext("run", folder, control, lambda event: None))
    began_s = perf_counter()
    for event in events:
        await logger.handle(event)
        await anyio.lowlevel.checkpoint()
    await logger.stop()
    return perf_counter() - began_s


def time_logger(logger: Any, folder: Path, events: list[Any]) -> float:
    return anyio.run(write_events, logger, folder, events)


def time_rows(way: Callable[[Path, list[et.StepsCompleted]], None], path: Path, windows: Any) -> float:
    began_s = perf_counter()
    way(path, windows)
    return perf_counter() - began_s


def same_rows(path: Path, by_hand: Path) -> bool:
    """Returns whether both files have the same content."""
    if path.suffix == ".csv":
        read = [list(csv.reader(file.read_text().splitlines())) for file in (path, by_hand)]
        numbers = [[[float(field) for field in row] for row in rows[1:]] for rows in read]
        return read[0][0] == read[1][0] and numbers[0] == numbers[1]
    rows = [
        [et.parse_event(line) for line in file.read_text().splitlines()[:: ROWS // 100]]
        for file in (path, by_hand)
    ]
    return rows[0] == rows[1]


def figures(device: Device, budget_s: float, quick: bool) -> list[Figure]:
    """Returns the microseconds per row of each logger."""
    budget, found = Budget(budget_s), list[Figure]()
    windows = make_windows()
    ways: dict[str, tuple[str, Callable[[str], Any], Callable[..., None]]] = {
        "CSVLogger": ("csv", subs.CSVLogger, csv_by_rows),
        "JSONLLogger by window": ("jsonl", lambda path: subs.JSONLLogger(path, by="window"), json_by_rows),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, (what, (suffix, make, by_rows)) in enumerate(ways.items()):
            path, by_hand = folder / f"rows.{suffix}", folder / f"by-hand.{suffix}"

            def ours(path: Path = path, make: Callable[[str], Any] = make) -> float:
                path.unlink(missing_ok=True)
                return 1e6 * time_logger(make(path.name), folder, windows) / ROWS

            def rows(by_hand: Path = by_hand, by_rows: Callable[..., None] = by_rows) -> float:
                return 1e6 * time_rows(by_rows, by_hand, windows) / ROWS

            share_s = budget.share(4 - index)
            found.append(compared(what, ours, rows, share_s, unit="us/row", baseline="row by row"))
            if not same_rows(path, by_hand):
                raise AssertionError(f"{what} and row by row wrote different rows.")
        others: dict[str, tuple[Callable[[str], Any], Callable[[], list[Any]]]] = {
            "ParquetLogger": (subs.ParquetLogger, lambda: windows),
            "JSONLLogger by step, of events that are built": (subs.JSONLLogger, lambda: steps_of(windows)),
        }
        for what, (make, events_of) in others.items():
            try:
                events = events_of()
                took_us = [
                    1e6 * time_logger(make(f"{what}-{run}"), folder, events) / ROWS
                    for run in range(2 if quick else 6)
                ]
            except ImportError as error:
                found.append(absent(what, f"not installed: {error}"))
            else:
                found.append(figure(what, took_us[1:], unit="us/row"))
    return found
