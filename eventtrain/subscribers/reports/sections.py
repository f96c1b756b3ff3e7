"""What a report says, in sections of facts and tables: the same for HTML and Markdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.metric_goal import make_goal
from eventtrain.subscribers.reports.downsampling import Thinned
from eventtrain.subscribers.reports.run_series import RunSeries
from eventtrain.subscribers.reports.run_summary import Extremes, ReportFacts, Rows, duration_text

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Table:
    """Rows of text. ``numeric``: columns, by index, whose text is set to the right."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading, a remark, named facts and a table; what is empty is not shown."""

    title: str
    note: str = ""
    facts: Sequence[tuple[str, str]] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Curve:
    """One panel. ``svg``: markup of ours, that holds no text of the run; ``bars``: the same for a terminal."""

    name: str
    svg: str
    bars: str


@dataclass(frozen=True)
class Content:
    """A whole report.

    Attributes:
        title: of the run.
        outcome: in one word; ``reason`` says more.
        figures: the few that come first, as (name, value).
        sections, curves: the rest.
    """

    title: str
    outcome: str
    reason: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section] = ()
    curves: Sequence[Curve] = field(default_factory=list[Curve])


def sections(
    facts: ReportFacts,
    series: RunSeries,
    subscribers: Iterable[tuple[str, ...]],
    environment: Mapping[str, str],
) -> list[Section]:
    """All sections, in order.

    Args:
        subscribers: of each its name, state, and counts of events: handled, failed attempts, dropped, waiting; seconds
            behind, and of CPU time.
    """
    return [
        section
        for section in (
            _result(facts),
            _metrics(facts),
            _hyperparams(series),
            _commands(facts),
            _listed(
                "Checkpoints",
                facts.checkpoints,
                ("step", "what", "checkpoint", "more"),
                f"{facts.committed:,} committed, {facts.checkpoints_failed:,} failed"
                + (f", {facts.uploaded:,} uploaded" if facts.uploaded else ""),
            ),
            _listed(
                "Alerts",
                facts.alerts,
                ("step", "severity", "alert", "message"),
                f"still raised: {', '.join(facts.open_alerts)}"
                if facts.open_alerts
                else "all resolved"
                if facts.alerts.total
                else "",
            ),
            _subscribers(subscribers),
            _listed(
                "Subscribers that failed, or held training up",
                facts.failures,
                ("step", "subscriber", "what"),
                "",
            ),
            Section("Environment", facts=list(environment.items())),
        )
        if section is not None
    ]


def figures(facts: ReportFacts) -> list[tuple[str, str]]:
    """What comes first."""
    found = [
        ("steps", f"{facts.step:,}"),
        ("epochs", f"{facts.epochs:,}"),
        ("duration", duration_text(facts.duration_s)),
    ]
    for name in ("val_accuracy", "val_loss", "accuracy", "loss"):
        best = facts.metrics.get(name)
        if best is not None and len(found) < 5 and (value := _best(name, best)) is not None:
            found.append((f"best {name}", number(value[0])))
    return found


def number(value: float) -> str:
    """For people to read."""
    return f"{value:.5g}"


def bars(curve: Thinned, count: int = 24) -> str:
    """A curve as blocks of text; a point where nothing is finite."""
    means = curve.points().means
    groups = np.array_split(means, min(count, len(means))) if len(means) else []
    with np.errstate(over="ignore"):  # beyond float64 nothing is shown
        values = [
            float(np.mean(group[np.isfinite(group)])) if np.isfinite(group).any() else math.nan
            for group in groups
        ]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "·" * len(values)
    low, high = min(finite), max(finite)
    if not math.isfinite(high - low):
        return "·" * len(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((v - low) / step)] if math.isfinite(v) else "·" for v in values)


def mapped(content: Content, change: Callable[[str], str]) -> Content:
    """The same with every text of the run changed."""

    def pairs(given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(change(name), change(value)) for name, value in given]

    def table(given: Table | None) -> Table | None:
        if given is None:
            return None
        rows = [tuple(change(cell) for cell in row) for row in given.rows]
        return Table(tuple(change(cell) for cell in given.head), rows, given.numeric)

    return Content(
        change(content.title),
        change(content.outcome),
        change(content.reason),
        pairs(content.figures),
        [Section(change(s.title), change(s.note), pairs(s.facts), table(s.table)) for s in content.sections],
        [Curve(change(curve.name), curve.svg, curve.bars) for curve in content.curves],
    )


def one_line(text: str) -> str:
    """``text`` with what cannot be shown written as Python would: a line end as ``\\n``."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _result(facts: ReportFacts) -> Section:
    found = [
        ("outcome", f"{facts.outcome}: {facts.reason}" if facts.reason != facts.outcome else facts.outcome)
    ]
    found += [("steps", f"{facts.step:,}"), ("epochs completed", f"{facts.epochs:,}")]
    if facts.first_step:
        found.append(("began at step", f"{facts.first_step:,}"))
    if facts.started is not None:
        found.append(("started", f"{facts.started:%Y-%m-%d %H:%M:%S} UTC"))
    found.append(("duration", duration_text(facts.duration_s)))
    if facts.resumed.total:
        places = "; ".join(f"step {step}" for step, _ in facts.resumed.rows)
        found.append(("resumed", f"{facts.resumed.total:,} x: {places}"))
    if not facts.deterministic:
        found.append(("repeatable", "no: something that depends on timing took effect"))
    return Section("Result", facts=found)


def _metrics(facts: ReportFacts) -> Section | None:
    measured = facts.metrics or facts.step_metrics
    if not measured:
        return Section("Metrics", "Nothing was measured.")
    rows: list[tuple[str, ...]] = []
    for name, one in sorted(measured.items()):
        best = _best(name, one)
        rows.append(
            (
                name,
                number(one.last),
                number(best[0]) if best else "",
                f"{best[1]:,}" if best else "",
                number(one.low) if one.low is not None else "none is finite",
                number(one.high) if one.high is not None else "",
            )
        )
    note = "Means of epochs; val_: of evaluations." if facts.metrics else "Of steps: no epoch was completed."
    head = ("metric", "last", "best", "at step", "lowest", "highest")
    return Section("Metrics", note, table=Table(head, rows, frozenset(range(1, 6))))


def _best(name: str, one: Extremes) -> tuple[float, int] | None:
    """The best value and its step; None where the name does not say what is better."""
    try:
        mode = make_goal("Report", name, "auto", 0.0).mode
    except ConfigurationError:
        return None
    value, step = (one.low, one.low_step) if mode == "min" else (one.high, one.high_step)
    return None if value is None else (value, step)


def _hyperparams(series: RunSeries) -> Section | None:
    rows = [
        (f"{one.step:,}", one.name, f"{number(one.old)} → {number(one.new)}", one.by, one.reason)
        for one in series.changes
    ]
    constant = [
        (name, number(float(points.means[-1])))
        for name, curve in series.hyperparams.items()
        if len(points := curve.points()) and len(set(points.lows) | set(points.highs)) == 1
    ]
    if not rows and not constant:
        return None
    more = f" The first {len(rows):,} of {series.changed:,}." if series.changed > len(rows) else ""
    note = f"{series.changed:,} changes.{more}" if rows else "None was changed."
    if constant:
        note += f" Constant: {', '.join(f'{name} = {value}' for name, value in constant)}."
    head = ("step", "hyperparameter", "from → to", "by", "reason")
    return Section("Hyperparameters", note, table=Table(head, rows, frozenset({0})) if rows else None)


def _commands(facts: ReportFacts) -> Section:
    summary = [
        (f"{one.by or 'without a cause'}: {one.kind}", f"{one.count:,}, the last at step {one.last_step:,}")
        for one in facts.tallies
    ]
    rows = [(step, by or "without a cause", what, reason) for step, by, what, reason in facts.commands.rows]
    note = "None." if not summary and not rows else _newest(facts.commands)
    head = ("step", "who", "what", "reason")
    return Section("Commands", note, summary, Table(head, rows, frozenset({0})) if rows else None)


def _listed(title: str, rows: Rows, head: tuple[str, ...], note: str) -> Section:
    if not rows.total:
        return Section(title, note or "None.")
    notes = [part for part in (note, _newest(rows)) if part]
    return Section(title, "; ".join(notes), table=Table(head, list(rows.rows), frozenset({0})))


def _newest(rows: Rows) -> str:
    shown = len(rows.rows)
    return f"the newest {shown:,} of {rows.total:,}" if rows.total > shown else ""


def _subscribers(rows: Iterable[tuple[str, ...]]) -> Section:
    head = ("subscriber", "state", "handled", "failed", "dropped", "waiting", "behind", "CPU")
    return Section("Subscribers", table=Table(head, list(rows), frozenset(range(2, 8))))
