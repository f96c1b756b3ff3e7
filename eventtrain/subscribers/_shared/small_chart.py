"""``small_chart``: one metric as a small SVG, without matplotlib. Pure, about a millisecond.

Lines and texts have colours that can be read on light and on dark pages. A chart takes less than 12 kB, however many
points there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eventtrain.notebook.html import SOFT, text
from eventtrain.subscribers._shared.curve import Curve, Points

Floats = NDArray[np.float64]

MOST_CHARTS = 12
"""Charts of one object; more metrics are counted."""
MOST_POINTS = 128
"""Points of one line."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 280.0, 104.0, 46.0, 4.0, 6.0, 14.0
TRAIN, EVALUATION, BAD = "#2f86c8", "#d2701e", "#e0405a"
LOG_FROM = 100.0
"""The axis is logarithmic if all values are positive and the highest is so many times the lowest."""
LARGEST = 1e300
"""Larger values are drawn there, since differences would overflow."""


def small_chart(name: str, train: Curve | None, evaluation: Curve | None = None) -> str:
    """Returns a chart of one metric as HTML; of a curve with many points, the mean in a band from low to high.

    Args:
        name: of the metric; it is shown as text.
        train: the metric in training; None if there is none.
        evaluation: its ``val_`` metric, in another colour.
    """
    lines = [
        _Line(curve.points(), colour)
        for curve, colour in ((train, TRAIN), (evaluation, EVALUATION))
        if curve is not None and len(curve)
    ]
    newest = "".join(
        f' <span style="color:{colour}">{_number(_newest(curve))}</span>'
        for curve, colour in ((train, TRAIN), (evaluation, EVALUATION))
        if curve is not None and len(curve)
    )
    heading = f'<div style="font-size:85%;overflow-wrap:anywhere"><b>{text(name)}</b>{newest}</div>'
    return f'<div style="width:{WIDTH:.0f}px">{heading}{_svg(lines)}</div>'


@dataclass(frozen=True)
class _Line:
    points: Points
    colour: str


@dataclass(frozen=True)
class _Axes:
    """Places of steps and values in the picture."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, steps: Floats) -> Floats:
        share = (steps - self.first) / (self.last - self.first or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, values: Floats) -> Floats:
        low, high, at = self.low, self.high, values
        if self.log:
            low, high, at = float(np.log10(low)), float(np.log10(high)), np.log10(values)
        # Halved, since a difference of two values of 1e308 overflows.
        share = (at / 2 - low / 2) / (high / 2 - low / 2) if high > low else at * 0 + 0.5
        return HEIGHT - BELOW - share * (HEIGHT - BELOW - TOP)


def _svg(lines: list[_Line]) -> str:
    axes = _axes(lines)
    if axes is None:
        return f'<div style="{SOFT}">no finite value</div>'
    parts = [
        f'<path d="M{LEFT},{HEIGHT - BELOW:.0f}H{WIDTH - RIGHT:.0f}" stroke="currentColor" stroke-opacity=".35"/>'
    ]
    for line in lines:
        parts += _drawn(line, axes)
    labels = [
        (LEFT - 4, TOP + 5, "end", _number(axes.high)),
        (LEFT - 4, HEIGHT - BELOW, "end", _number(axes.low)),
        (LEFT, HEIGHT - 3, "start", f"{axes.first:.0f}"),
        (WIDTH - RIGHT, HEIGHT - 3, "end", f"step {axes.last:.0f}"),
    ]
    if axes.log:
        labels.append((LEFT - 4, (HEIGHT - BELOW + TOP) / 2 + 5, "end", "log"))
    for x, y, anchor, label in labels:
        parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="9" fill="currentColor" '
            f'fill-opacity=".75">{label}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" role="img" fill="none">'
        f"{''.join(parts)}</svg>"
    )


def _axes(lines: list[_Line]) -> _Axes | None:
    """Returns the axes for all finite values; None if there is none."""
    values = np.concatenate([part for one in lines for part in (one.points.lows, one.points.highs)] or [[]])
    values = _placed(values[np.isfinite(values)])
    if not len(values):
        return None
    steps = np.concatenate([one.points.steps for one in lines])
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high / LOG_FROM >= low
    return _Axes(float(steps.min()), float(steps.max()), low, high, log)


def _drawn(line: _Line, axes: _Axes) -> list[str]:
    points, parts = _reduced(line.points, MOST_POINTS), list[str]()
    x = axes.x(points.steps)
    mean, low, high = (axes.y(_placed(v)) for v in (points.means, points.lows, points.highs))
    for part in _runs(np.isfinite(high)) if not points.exact else ():
        outline = [*zip(x[part], high[part], strict=True), *zip(x[part][::-1], low[part][::-1], strict=True)]
        parts.append(f'<path d="M{_path(outline)}Z" fill="{line.colour}" fill-opacity=".25"/>')
    for part in _runs(np.isfinite(mean)):
        places = [*zip(x[part], mean[part], strict=True)]
        if len(places) == 1:
            places *= 2  # a dot
        parts.append(
            f'<path d="M{_path(places)}" stroke="{line.colour}" stroke-width="1.5" stroke-linecap="round" '
            'stroke-linejoin="round"/>'
        )
    if bad := [at for at, count in zip(x, points.not_finite, strict=True) if count]:
        foot = HEIGHT - BELOW
        marks = "".join(f"M{at - 3:.1f},{foot:.0f}h6l-3,-5z" for at in bad)
        parts.append(f'<path d="{marks}" fill="{BAD}"/>')
    return parts


def _path(places: list[tuple[Any, Any]]) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _runs(there: NDArray[np.bool_]) -> list[slice]:
    """Returns the parts of an array that are True without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    return [slice(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _reduced(points: Points, most: int) -> Points:
    """Returns at most ``most`` buckets, whose lows and highs are those of the points in them."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    at = np.arange(0, len(points), size)
    there = np.isfinite(points.means)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        means = np.add.reduceat(np.where(there, points.means, 0.0), at) / np.add.reduceat(
            there.astype(float), at
        )
    ends = np.append(at[1:], len(points)) - 1
    return Points(
        (points.steps[at] + points.steps[ends]) / 2,
        means,
        np.fmin.reduceat(points.lows, at),
        np.fmax.reduceat(points.highs, at),
        np.add.reduceat(points.not_finite, at),
        exact=False,
    )


def _placed(values: Floats) -> Floats:
    return np.clip(values, -LARGEST, LARGEST)


def _newest(curve: Curve) -> float:
    points = curve.points()
    return float("nan") if points.not_finite[-1] else float(points.means[-1])


def _number(value: float) -> str:
    return f"{value:.3g}"
