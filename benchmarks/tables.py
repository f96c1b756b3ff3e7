"""Renders the results of the suite as Markdown; docs/make_pages.py puts them into the pages."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from math import log
from pathlib import Path
from typing import Any

from benchmarks.suite import CHARTS, RESULTS

Record = dict[str, Any]
"""One figure of a results file."""


def of_every_device(parts: Iterable[str] | None = None, *, images: str) -> str:
    """Returns the report of every results file, each below a heading, or the command that measures."""
    reports = [f"### {one['slug']}\n\n{report(one, parts, images=images)}" for one in documents()]
    return "\n\n".join(reports) or "Not measured yet: `make bench`."


def documents() -> list[Record]:
    """Returns the content of every results file."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def report(document: Record, parts: Iterable[str] | None = None, *, images: str = "") -> str:
    """Returns machine, tables and errors of a results file.

    Args:
        document: the content of the file.
        parts: those to show; all that were measured, by default.
        images: path from the page to the folder of the charts; charts that are not there are left out.
    """
    lines = [machine(document)]
    measured = dict.fromkeys([*(one["part"] for one in document["figures"]), *document["errors"]])
    for part in measured if parts is None else parts:
        figures = [one for one in document["figures"] if one["part"] == part]
        if parts is None:
            lines.append(f"#### `{part}`{title(part)}")
        if not all(one["missing"] for one in figures):
            lines.append(table(figures))
        if left_out := missing(figures):
            lines.append(left_out)
        if part in document["errors"]:
            lines.append(f"Not measured: {document['errors'][part]}.")
        chart = f"{document['slug']}-{part}.svg"
        if images and (CHARTS / chart).exists():
            lines.append(f"![{part} on {document['slug']}]({images}/{chart})")
    return "\n\n".join(lines)


def title(part: str) -> str:
    """Returns a colon and the first line of the docstring of a part; empty for a part of another package."""
    path = Path(__file__).parent / "parts" / f"{part}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
    return f": {docstring.splitlines()[0].rstrip('.')}" if docstring else ""


def machine(document: Record) -> str:
    """Returns the line that names date, machine, versions and commit of a measurement."""
    found = document["machine"]
    versions = ", ".join(f"{package} {found[package]}" for package in ("jax", "anyio", "pydantic"))
    device = "" if found["backend"] == "cpu" else f"{found['device']}, "
    quick = "A quick run, with few and short pairs. " if document["quick"] else ""
    return (
        f"{quick}Measured {document['measured']} on {device}{found['processor']}, {found['cores']} cores, load "
        f"{document['load']}; {found['system']}, Python {found['python']}, {versions}; commit {document['revision']}."
    )


def table(figures: Sequence[Record]) -> str:
    """Returns a row for each case and a column for each size."""
    measured = [one for one in figures if not one["missing"]]
    columns, rows = (list(dict.fromkeys(one[key] for one in measured)) for key in ("at", "case"))
    if all(column.replace(",", "").isdigit() for column in columns):
        columns.sort(key=lambda column: int(column.replace(",", "")))
    cells = {(one["case"], one["at"]): _cell(one) for one in measured}
    baselines = {one["baseline"] for one in measured if one["baseline"]}
    heading = f"time / {baselines.pop()}" if len(baselines) == 1 else ""
    lines = [f"| {heading} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cells.get((row, at), '') for at in columns)} |" for row in rows]
    return "\n".join(lines)


def missing(figures: Sequence[Record]) -> str:
    """Returns a line with the figures that were not measured, and why; empty if there are none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in figures:
        if one["missing"]:
            reasons.setdefault((one["case"], one["missing"]), []).append(one["at"])
    parts = [
        f"{case}{f' ({at})' if (at := ', '.join(filter(None, sizes))) else ''}: {reason}"
        for (case, reason), sizes in reasons.items()
    ]
    return f"Absent: {'; '.join(parts)}." if parts else ""


def compared(one: Record, other: Record) -> str:
    """Returns a table of two results files: the ratio of each figure that both have, the largest change first.

    Figures with a baseline are compared by their ratio to it, the others by their value. A star marks a change beyond
    the quartiles of both.
    """
    found = [
        {(f["part"], f["case"], f["at"], f["unit"]): f for f in document["figures"]}
        for document in (one, other)
    ]
    rows: list[tuple[float, str]] = []
    for key in found[0].keys() & found[1].keys():
        pair = [figures[key] for figures in found]
        by_ratio = all(figure["ratio"] for figure in pair)
        first, second = (figure["ratio" if by_ratio else "value"] for figure in pair)
        if not first or not second:
            continue
        quartiles = [figure["ratio_quartiles" if by_ratio else "quartiles"] for figure in pair]
        apart = all(quartiles) and max(low for low, _ in quartiles) > min(high for _, high in quartiles)
        part, case, at, unit = key
        shown = " | ".join(f"{value:.4g}{'' if by_ratio else f' {unit}'}" for value in (first, second))
        change = f"{second / first:.3f}{' *' if apart else ''}"
        rows.append((abs(log(abs(second / first))), f"| {part} | {case} | {at} | {shown} | {change} |"))
    lines = [row for _, row in sorted(rows, key=lambda row: (-row[0], row[1]))]
    names = [f"{document['slug']} {document['revision']}" for document in (one, other)]
    header = [f"| part | case | at | {names[0]} | {names[1]} | second / first |", "|---|---|---|---|---|---|"]
    return "\n".join([*header, *lines])


def _cell(one: Record) -> str:
    if one["ratio"] is None:
        return f"{one['value']:,.4g} {one['unit']}"
    low, high = one["ratio_quartiles"]
    value = (
        "" if one["baseline"] == "bare loop" or one["unit"] == "x" else f", {one['value']:,.4g} {one['unit']}"
    )
    return f"**{_short(one['ratio'])}** ({_short(low)} to {_short(high)}){value}"


def _short(ratio: float) -> str:
    """Returns three digits, and never an exponent."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
