"""Curves as pictures, drawn with matplotlib's Figure and Agg: nothing of pyplot, so any thread may do it.

Shared by ``PlotCurves``, which writes one picture of all panels, and ``Report``, which takes one of each.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from eventtrain.subscribers.reports.downsampling import Points, Thinned
from eventtrain.subscribers.reports.run_series import Change, Panel

FONT = "DejaVu Sans"  # comes with matplotlib
MARKS_DRAWN = 25
"""More changes than that are not marked one by one; the hyperparameter's own panel shows them."""
LOG_FROM = 100.0
"""A positive curve whose greatest value is so many times its least gets a logarithmic axis, where nobody chose."""
COLUMNS = 2
LONGEST = 110
LARGEST = 1e150
"""Beyond that, and below its inverse, matplotlib's sums overflow."""
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, HEAD, FOOT = 5.0, 2.65, 0.3, 0.5, 0.62  # inches
LEFT, RIGHT, BELOW, ABOVE = 0.6, 0.18, 0.44, 0.34  # inches of a panel around its axes


@dataclass(frozen=True)
class Colours:
    """Of one picture; those of the curves are told apart by colour-blind people too (Okabe and Ito, 2008)."""

    paper: str = "#ffffff"
    ink: str = "#1f2933"
    soft: str = "#7b8794"
    grid: str = "#e4e7eb"
    train: str = "#0072b2"
    evaluation: str = "#d55e00"
    mark: str = "#009e73"
    bad: str = "#cc0033"


LIGHT = Colours()
DARK = Colours("#15191e", "#e6e9ed", "#9aa5b1", "#2d343c", "#56b4e9", "#f0a04b", "#3ecf9e", "#ff5c7a")
Scale = Literal["auto", "linear", "log"]


def picture(
    panels: Sequence[Panel],
    changes: Sequence[Change],
    kind: str,
    *,
    title: str = "",
    note: str = "",
    colours: Colours = LIGHT,
    scale: Scale = "auto",
) -> bytes:
    """One picture of all panels.

    Args:
        panels: what to draw, in this order.
        changes: of hyperparameters, to be marked.
        kind: "png", "svg" or "pdf".
        title, note: above and below.
        colours, scale: of all panels.
    """
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    width, height = PANEL_WIDTH * columns + MARGIN, PANEL_HEIGHT * rows + HEAD + FOOT
    figure = Figure(figsize=(width, height), dpi=110, facecolor=colours.paper)
    FigureCanvasAgg(figure)
    _write(figure, MARGIN / 2, height - 0.3, title, colours.ink, 12, weight="bold")
    _write(figure, MARGIN / 2, 0.12, note, colours.soft, 8.5)
    if not panels:
        _write(figure, MARGIN / 2, height / 2, "no metrics yet", colours.soft, 10)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left = MARGIN / 2 + column * PANEL_WIDTH + LEFT
        bottom = height - HEAD - (row + 1) * PANEL_HEIGHT + BELOW
        size = (PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - BELOW - ABOVE)
        place = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
        _draw(place, panel, changes, colours, scale)
        _write(figure, left, bottom + size[1] + 0.09, panel.name, colours.ink, 10.5)
    figure.legend(
        handles=_keys(panels, changes, colours),
        loc="lower center",
        bbox_to_anchor=(0.5, 0.25 / height),
        ncols=6,
        frameon=False,
        labelcolor=colours.ink,
        prop=FontProperties(family=FONT, size=9),
    )
    return _saved(figure, kind)


def fragment(panel: Panel, changes: Sequence[Change], *, scale: Scale = "auto") -> str:
    """One panel as SVG for a page of HTML that defines ``--ink``, ``--train`` and the other names of ``Colours``.

    It holds no text but numbers, refers to nothing outside of it, and is transparent.
    """
    figure = Figure(figsize=(5.6, 2.5), dpi=72)
    FigureCanvasAgg(figure)
    _draw(figure.add_axes((0.1, 0.17, 0.88, 0.76)), panel, changes, LIGHT, scale)
    figure.patch.set_visible(False)
    svg = _saved(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d{2,}", _rounded, path[0]), svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # they would be the same in every picture of the page
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for name, colour in vars(LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _write(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float, weight: str = "normal"
) -> None:
    """Text that begins at a place given in inches."""
    width, height = figure.get_size_inches()
    style = FontProperties(family=FONT, size=size, weight=weight)
    figure.text(x / width, y / height, plain(text), color=colour, font=style).set_parse_math(False)


def plain(text: str) -> str:
    """``text`` on one line, with a box for each character that the font lacks; matplotlib would warn of it."""
    known = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in shown)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def _rounded(found: re.Match[str]) -> str:
    """A coordinate in points, of which matplotlib writes six digits behind the point."""
    return f"{float(found[0]):.1f}"


def _draw(place: Axes, panel: Panel, changes: Sequence[Change], colours: Colours, scale: Scale) -> None:
    place.set_facecolor("none")
    place.grid(True, color=colours.grid, linewidth=0.7)
    place.set_axisbelow(True)
    place.tick_params(colors=colours.soft, labelcolor=colours.ink, labelsize=8.5, labelfontfamily=FONT)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        place.spines[side].set_color(colours.soft)
    if _is_logarithmic(panel, scale):
        place.set_yscale("log")
    # One epoch says more by its steps than by one mean.
    few_epochs = panel.epochs is not None and len(panel.epochs) < 2
    if panel.steps is not None:
        behind = panel.epochs is not None and not few_epochs
        _line(place, panel.steps, colours.train, width=0.9, faint=behind)
    if panel.epochs is not None and not (few_epochs and panel.steps is not None):
        _line(place, panel.epochs, colours.train, width=1.7)
    if panel.evaluations is not None:
        _line(place, panel.evaluations, colours.evaluation, width=1.7)
    if panel.hyperparam is not None:
        _line(place, panel.hyperparam, colours.mark, width=1.7, dots=False)
    marks = changes if len(changes) <= MARKS_DRAWN else ()
    for step in {change.step for change in marks}:
        place.axvline(step, color=colours.mark, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.75, zorder=1.5)
    _mark_not_finite(place, panel, colours)
    _label(place, colours)


def _drawable(curve: Thinned) -> Points:
    """What to draw, without what matplotlib cannot place on an axis."""
    points = curve.points()

    def placed(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            values = np.where(np.abs(values) > LARGEST, np.nan, values)
            return np.where(np.abs(values) < 1 / LARGEST, 0.0, values)

    means, lows, highs = (placed(values) for values in (points.means, points.lows, points.highs))
    return replace(points, means=means, lows=lows, highs=highs)


def _line(
    place: Axes, curve: Thinned, colour: str, *, width: float, faint: bool = False, dots: bool = True
) -> None:
    points = _drawable(curve)
    if not points.exact:
        place.fill_between(
            points.steps, points.lows, points.highs, color=colour, alpha=0.22, linewidth=0.3, zorder=2
        )
    alpha = 0.4 if faint else 1.0
    place.plot(points.steps, points.means, color=colour, linewidth=width, alpha=alpha, zorder=2.2)
    if points.exact and dots and len(points) <= 40:
        place.plot(
            points.steps, points.means, color=colour, linestyle="", marker="o", markersize=3, alpha=alpha
        )


def _mark_not_finite(place: Axes, panel: Panel, colours: Colours) -> None:
    """A red triangle at the foot, for each bucket with a NaN or an infinity; the mean of an epoch says no more."""
    curves = [panel.steps, panel.evaluations] if panel.steps is not None else list(panel.curves)
    steps = np.concatenate([_not_finite(curve.points()) for curve in curves if curve is not None] or [[]])
    place.plot(
        steps,
        np.zeros(len(steps)),
        color=colours.bad,
        linestyle="",
        marker="^",
        markersize=5,
        transform=place.get_xaxis_transform(),
        clip_on=False,
        zorder=4,
    )


def _not_finite(points: Points) -> np.ndarray:
    return points.steps[points.not_finite > 0]


def _label(place: Axes, colours: Colours) -> None:
    place.set_xlabel("step", color=colours.soft, fontsize=8.5, family=FONT, labelpad=1.5)
    place.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if place.get_yscale() == "log":
        place.yaxis.set_major_locator(LogLocator(numticks=6))
        # Without mathematical text, which matplotlib parses with shared state. A range within one decade needs more
        # labels than powers of ten.
        low, high = place.get_ylim()
        narrow = high < 30 * low
        formatter = FuncFormatter(lambda value, _: f"{value:g}")
        place.yaxis.set_major_formatter(formatter)
        place.yaxis.set_minor_formatter(formatter if narrow else NullFormatter())
    else:
        place.yaxis.set_major_locator(MaxNLocator(nbins=5))
        place.yaxis.set_major_formatter(ScalarFormatter(useMathText=False))
    place.yaxis.get_offset_text().set_fontsize(8)
    place.yaxis.set_offset_position("right")  # "1e13"; the name of the panel stands on the left


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def _is_logarithmic(panel: Panel, scale: Scale) -> bool:
    points = [_drawable(curve) for curve in panel.curves]
    values = np.concatenate([part for one in points for part in (one.lows, one.highs)] or [[]])
    values = values[np.isfinite(values)]
    if scale == "linear" or not len(values) or values.min() <= 0:
        return False
    wanted = 1.0 + 1e-6 if scale == "log" else LOG_FROM  # an axis of one value has no decades
    return bool(values.max() >= wanted * values.min())


def _keys(panels: Sequence[Panel], changes: Sequence[Change], colours: Colours) -> list[Line2D]:
    keys: list[Line2D] = []
    if any(panel.epochs is not None and len(panel.epochs) > 1 for panel in panels):
        keys.append(Line2D([], [], color=colours.train, linewidth=1.7, label="mean of an epoch"))
    if any(panel.steps is not None for panel in panels):
        keys.append(Line2D([], [], color=colours.train, linewidth=0.9, alpha=0.5, label="step"))
    if any(panel.evaluations is not None for panel in panels):
        keys.append(Line2D([], [], color=colours.evaluation, linewidth=1.7, label="evaluation"))
    if changes and len(changes) <= MARKS_DRAWN:
        names = {change.name for change in changes}
        label = f"change of {plain(next(iter(names)))}" if len(names) == 1 else "change of a hyperparameter"
        keys.append(Line2D([], [], color=colours.mark, linestyle=(0, (2, 2)), linewidth=0.9, label=label))
    if any(
        len(_not_finite(curve.points()))
        for panel in panels
        for curve in (panel.steps, panel.evaluations)
        if curve
    ):
        keys.append(
            Line2D([], [], color=colours.bad, linestyle="", marker="^", markersize=5, label="not finite")
        )
    return keys


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    creator = f"eventtrain, matplotlib {matplotlib.__version__}"
    metadata = {
        "png": {"Software": creator},
        "svg": {"Date": None, "Creator": creator},
        "pdf": {"CreationDate": None, "Creator": creator},
    }
    figure.savefig(file, format=kind, metadata=metadata[kind])
    return file.getvalue()
