"""``Content`` of a report, in sections of facts and tables: the same for HTML and Markdown."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from eventtrain._version import __version__
from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.display_text import duration_text
from eventtrain.subscribers._shared.metric_goal import make_goal
from eventtrain.subscribers._shared.run_series import RunSeries
from eventtrain.subscribers.reports.run_summary import Extremes, Rows, RunSummary

BARS = "▁▂▃▄▅▆▇█"
MOST_COLUMNS = 32
PACKAGES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")

Facts = Sequence[tuple[str, str]]
"""Names and values."""


class Markup(str):
    """Text of eventtrain, without text of the run, that ``mapped`` leaves unchanged."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows of text. ``numeric``: indices of the columns that are aligned to the right."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading, a remark, named facts and a table; empty parts are not shown."""

    title: str
    note: str = ""
    facts: Facts = ()
    table: Table | None = None


@dataclass(frozen=True)
class Drawing:
    """One panel of curves: as SVG, and as ``bars`` of text."""

    name: str
    svg: Markup
    bars: str


@dataclass(frozen=True)
class Picture:
    """A sample that is an image: a PNG file in base64."""

    caption: str
    image: Markup


@dataclass(frozen=True)
class Content:
    """A complete report.

    Attributes:
        title: of the run.
        outcome: in one word; ``reason`` has the details.
        figures: the most important facts.
        footer: the last line.
        sections, drawings, images: the rest.
    """

    title: str
    outcome: str
    reason: str
    figures: Facts
    footer: str
    sections: Sequence[Section] = ()
    drawings: Sequence[Drawing] = ()
    images: Sequence[Picture] = ()


def mapped(content: Content, change: Callable[[str], str]) -> Content:
    """Returns ``content`` with ``change`` applied to every text in it but ``Markup``."""

    def apply(part: Any) -> Any:
        if isinstance(part, str):
            return part if isinstance(part, Markup) else change(part)
        if isinstance(part, (list, tuple)):
            return type(part)(map(apply, part))
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{field.name: apply(getattr(part, field.name)) for field in fields(part)})
        return part

    return apply(content)


def sections(
    summary: RunSummary, series: RunSeries, statistics: Iterable[SubscriptionStatistics]
) -> list[Section]:
    """Returns all sections, in order. Any thread, once JAX has a backend."""
    checkpoints = f"{summary.committed:,} committed, {summary.checkpoints_failed:,} failed"
    if summary.uploaded:
        checkpoints += f", {summary.uploaded:,} uploaded"
    alerts = "all resolved" if summary.alerts.total else ""
    if summary.open_alerts:
        alerts = f"still raised: {', '.join(summary.open_alerts)}"
    found = (
        _result(summary),
        _metrics(summary),
        *_arrays(summary),
        _samples(summary),
        _hyperparams(series),
        _commands(summary),
        _listed("Checkpoints", summary.checkpoints, ("step", "event", "checkpoint", "details"), checkpoints),
        _listed("Alerts", summary.alerts, ("step", "severity", "alert", "message"), alerts),
        _subscribers(statistics),
        _listed(
            "Subscribers that failed, or delayed training",
            summary.failures,
            ("step", "subscriber", "event"),
        ),
        Section("Environment", facts=_environment()),
    )
    return [section for section in found if section is not None]


def figures(summary: RunSummary) -> Facts:
    """Returns the most important facts."""
    found = [
        ("steps", f"{summary.step:,}"),
        ("epochs", f"{summary.epochs:,}"),
        ("duration", duration_text(summary.duration_s)),
    ]
    for name in ("val_accuracy", "val_loss", "accuracy", "loss"):
        best = summary.metrics.get(name)
        if best is not None and len(found) < 5 and (value := _best(name, best)) is not None:
            found.append((f"best {name}", number(value[0])))
    return found


def number(value: float) -> str:
    """Returns ``value`` for people to read."""
    return f"{value:.5g}"


def bars(curve: Curve, count: int = 24) -> str:
    """Returns a curve as block characters; a dot where no value is finite."""
    means = curve.points().means
    groups = np.array_split(means, min(count, len(means))) if len(means) else []
    with np.errstate(over="ignore"):  # a mean beyond float64 is not shown
        values = [
            float(np.mean(group[np.isfinite(group)])) if np.isfinite(group).any() else math.nan
            for group in groups
        ]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if not math.isfinite(high - low):
        return "·" * len(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((v - low) / step)] if math.isfinite(v) else "·" for v in values)


def one_line(text: str) -> str:
    """Returns ``text`` with unprintable characters as Python escapes, such as ``\\n`` for a line end."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _result(summary: RunSummary) -> Section:
    reason = f": {summary.reason}" if summary.reason != summary.outcome else ""
    found = [
        ("outcome", f"{summary.outcome}{reason}"),
        ("steps", f"{summary.step:,}"),
        ("epochs completed", f"{summary.epochs:,}"),
    ]
    if summary.first_step:
        found.append(("began at step", f"{summary.first_step:,}"))
    if summary.started is not None:
        found.append(("started", f"{summary.started:%Y-%m-%d %H:%M:%S} UTC"))
    found.append(("duration", duration_text(summary.duration_s)))
    if summary.resumed.total:
        places = "; ".join(f"step {step}" for step, _ in summary.resumed.rows)
        found.append(("resumed", f"{summary.resumed.total:,} x: {places}"))
    if not summary.deterministic:
        found.append(("repeatable", "no: a decision depended on timing"))
    return Section("Result", facts=found)


def _metrics(summary: RunSummary) -> Section:
    measured = summary.metrics or summary.step_metrics
    if not measured:
        return Section("Metrics", "Nothing was measured.")
    rows: list[tuple[str, ...]] = []
    for name, one in sorted(measured.items()):
        best = _best(name, one)
        best_value, best_step = ("", "") if best is None else (number(best[0]), f"{best[1]:,}")
        low = "none is finite" if one.low is None else number(one.low)
        high = "" if one.high is None else number(one.high)
        rows.append((name, number(one.last), best_value, best_step, low, high))
    note = (
        "Means of epochs; val_: of evaluations." if summary.metrics else "Of steps: no epoch was completed."
    )
    head = ("metric", "last", "best", "at step", "lowest", "highest")
    return Section("Metrics", note, table=Table(head, rows, frozenset(range(1, 6))))


def _arrays(summary: RunSummary) -> Iterator[Section]:
    """Yields one section for each array of a metric: a table for a vector or a matrix that is not too large."""
    for name, one in sorted(summary.arrays.items()):
        value, title = one.value, name
        note = f"{one.type}, at step {one.step:,}."
        if value is None or value.ndim > 2 or not value.size or value.shape[-1] > MOST_COLUMNS:
            yield Section(title, note)
            continue
        cells = [[number(cell) for cell in row] for row in np.atleast_2d(value).tolist()]
        head = ("", *map(str, range(len(cells[0]))))
        rows = [(str(index), *row) for index, row in enumerate(cells)]
        yield Section(title, note, table=Table(head, rows, frozenset(range(len(head)))))


def _best(name: str, one: Extremes) -> tuple[float, int] | None:
    """Returns the best value and its step; None if the name does not tell which direction is better."""
    try:
        mode = make_goal("Report", name, "auto", 0.0).mode
    except ConfigurationError:
        return None
    value, step = (one.low, one.low_step) if mode == "min" else (one.high, one.high_step)
    return None if value is None else (value, step)


def _samples(summary: RunSummary) -> Section | None:
    if not summary.samples:
        return None
    rows = [(one.name, f"{one.step:,}", one.text or "an image") for one in summary.samples]
    note = "The newest of each name."
    return Section("Samples", note, table=Table(("sample", "step", "value"), rows, frozenset({1})))


def pictures(summary: RunSummary) -> list[Picture]:
    """Returns the samples that are images."""
    shown = [one for one in summary.samples if one.image]
    return [Picture(f"{one.name}, step {one.step:,}", Markup(one.image)) for one in shown]


def _hyperparams(series: RunSeries) -> Section | None:
    rows = [
        (f"{one.step:,}", one.name, f"{number(one.old)} → {number(one.new)}", one.by, one.reason)
        for one in series.changes
    ]
    constant = [
        f"{name} = {number(float(curve.points().means[-1]))}"
        for name, curve in series.hyperparams.items()
        if curve.is_constant()
    ]
    if not rows and not constant:
        return None
    more = f" The first {len(rows):,} of {series.changed:,}." if series.changed > len(rows) else ""
    note = f"{series.changed:,} changes.{more}" if rows else "None was changed."
    if constant:
        note += f" Constant: {', '.join(constant)}."
    head = ("step", "hyperparameter", "from → to", "by", "reason")
    return Section("Hyperparameters", note, table=Table(head, rows, frozenset({0})) if rows else None)


def _commands(summary: RunSummary) -> Section:
    unknown = "without a cause"
    tallies = [
        (f"{one.by or unknown}: {one.kind}", f"{one.count:,}, the last at step {one.last_step:,}")
        for one in summary.tallies
    ]
    rows = [(step, by or unknown, command, reason) for step, by, command, reason in summary.commands.rows]
    note = _newest(summary.commands) if tallies or rows else "None."
    head = ("step", "by", "command", "reason")
    return Section("Commands", note, tallies, Table(head, rows, frozenset({0})) if rows else None)


def _listed(title: str, rows: Rows, head: tuple[str, ...], note: str = "") -> Section:
    if not rows.total:
        return Section(title, note or "None.")
    notes = [part for part in (note, _newest(rows)) if part]
    return Section(title, "; ".join(notes), table=Table(head, rows.rows, frozenset({0})))


def _newest(rows: Rows) -> str:
    shown = len(rows.rows)
    return f"the newest {shown:,} of {rows.total:,}" if rows.total > shown else ""


def _subscribers(statistics: Iterable[SubscriptionStatistics]) -> Section:
    head = ("subscriber", "state", "handled", "failed", "dropped", "waiting", "behind", "CPU")
    rows = [
        (
            one.name,
            one.state,
            *(f"{count:,}" for count in (one.delivered, one.errors, one.dropped, one.pending)),
            f"{one.lag_s:.1f} s",
            f"{one.handler_cpu_s:.2f} s",
        )
        for one in statistics
    ]
    return Section("Subscribers", table=Table(head, rows, frozenset(range(2, 8))))


def _environment() -> Facts:
    """Returns versions and devices; no host, user, path or environment variable."""
    facts = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "eventtrain": __version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed as a package"
    kinds = Counter(device.device_kind for device in jax.local_devices())
    facts["devices"] = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    facts["backend"] = jax.default_backend()
    if jax.process_count() > 1:
        facts["processes"] = str(jax.process_count())
    facts["system"] = f"{platform.system()}, {platform.machine()}"
    present = os.cpu_count() or 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    facts["host cores"] = str(present) if usable == present else f"{usable} of {present}"
    return list(facts.items())
