"""Draws curves with matplotlib's Figure and Agg, on any thread, since it uses nothing of pyplot.

``PlotCurves`` has all panels drawn as one picture, ``Report`` each panel as a fragment of SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from eventtrain.subscribers._shared.curve import Curve, Points
from eventtrain.subscribers._shared.display_text import clipped
from eventtrain.subscribers._shared.run_series import Change, Panel

FONT = "DejaVu Sans"  # comes with matplotlib
MARKS_DRAWN = 25
"""If there are more changes, none is marked; the hyperparameter's own panel shows them."""
LOG_FROM = 100.0
"""With scale "auto", the axis is logarithmic if all values are positive and the highest is so many times the lowest."""
COLUMNS = 2
LONGEST = 110
LARGEST = 1e150
"""Above that, and below its inverse, matplotlib's sums overflow."""
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, HEAD, FOOT = 5.0, 2.65, 0.3, 0.5, 0.62  # inches
LEFT, RIGHT, BELOW, ABOVE = 0.6, 0.18, 0.44, 0.34  # inches of a panel around its axes

CHANGE: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (2, 2))}
NOT_FINITE: dict[str, Any] = {"linestyle": "", "marker": "^", "markersize": 5}


@dataclass(frozen=True)
class Colours:
    """Colours of a picture; colour-blind people can distinguish those of the curves (Okabe and Ito, 2008)."""

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


class RunFigure(Figure):
    """A figure that a notebook shows as a picture."""

    def _repr_png_(self) -> bytes:
        return _saved(self, "png")


def picture(panels: Sequence[Panel], changes: Sequence[Change], kind: str, **options: Any) -> bytes:
    """Returns the ``figure`` of all panels as a file: "png", "svg" or "pdf"."""
    return _saved(figure(panels, changes, **options), kind)


def figure(
    panels: Sequence[Panel],
    changes: Sequence[Change],
    *,
    title: str = "",
    note: str = "",
    colours: Colours = LIGHT,
    scale: Scale = "auto",
) -> RunFigure:
    """Returns one figure of all panels.

    Args:
        panels: in order.
        changes: of hyperparameters, to be marked.
        title, note: texts above and below.
        colours, scale: of all panels.
    """
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    width, height = PANEL_WIDTH * columns + MARGIN, PANEL_HEIGHT * rows + HEAD + FOOT
    whole = RunFigure(figsize=(width, height), dpi=110, facecolor=colours.paper)
    FigureCanvasAgg(whole)
    _write(whole, MARGIN / 2, height - 0.3, title, colours.ink, 12, weight="bold")
    _write(whole, MARGIN / 2, 0.12, note, colours.soft, 8.5)
    if not panels:
        _write(whole, MARGIN / 2, height / 2, "no metrics yet", colours.soft, 10)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left = MARGIN / 2 + column * PANEL_WIDTH + LEFT
        bottom = height - HEAD - (row + 1) * PANEL_HEIGHT + BELOW
        size = (PANEL_WIDTH - LEFT - RIGHT, PANEL_HEIGHT - BELOW - ABOVE)
        axes = whole.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
        _draw(axes, panel, changes, colours, scale)
        _write(whole, left, bottom + size[1] + 0.09, panel.name, colours.ink, 10.5)
    whole.legend(
        handles=_keys(panels, changes, colours),
        loc="lower center",
        bbox_to_anchor=(0.5, 0.25 / height),
        ncols=6,
        frameon=False,
        labelcolor=colours.ink,
        prop=FontProperties(family=FONT, size=9),
    )
    return whole


def fragment(panel: Panel, changes: Sequence[Change], *, scale: Scale = "auto") -> str:
    """Returns one panel as SVG for an HTML page that defines ``--ink``, ``--train`` and the other names of ``Colours``.

    It has no text but numbers, refers to nothing outside, and is transparent.
    """
    figure = Figure(figsize=(5.6, 2.5), dpi=72)
    FigureCanvasAgg(figure)
    _draw(figure.add_axes((0.1, 0.17, 0.88, 0.76)), panel, changes, LIGHT, scale)
    figure.patch.set_visible(False)
    svg = _saved(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Coordinates are in points, with six decimals.
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"\d+\.\d{2,}", lambda x: f"{float(x[0]):.1f}", d[0]), svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids would be the same in every picture of the page
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for name, colour in vars(LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _write(
    figure: Figure, x: float, y: float, text: str, colour: str, size: float, weight: str = "normal"
) -> None:
    """Writes text that begins at a position in inches."""
    width, height = figure.get_size_inches()
    style = FontProperties(family=FONT, size=size, weight=weight)
    figure.text(x / width, y / height, plain(text), color=colour, font=style).set_parse_math(False)


def plain(text: str) -> str:
    """Returns ``text`` on one line, with a box for each character that the font lacks; matplotlib would warn."""
    known = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in shown)
    return clipped(shown, LONGEST)


def _draw(axes: Axes, panel: Panel, changes: Sequence[Change], colours: Colours, scale: Scale) -> None:
    axes.set_facecolor("none")
    axes.grid(True, color=colours.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(
        which="both", colors=colours.soft, labelcolor=colours.ink, labelsize=8.5, labelfontfamily=FONT
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours.soft)
    if _is_logarithmic(panel, scale):
        axes.set_yscale("log")
    # For a single epoch, its steps show more than one mean.
    few_epochs = panel.epochs is not None and len(panel.epochs) < 2
    if panel.steps is not None:
        _line(axes, panel.steps, colours.train, width=0.9, faint=panel.epochs is not None and not few_epochs)
    if panel.epochs is not None and not (few_epochs and panel.steps is not None):
        _line(axes, panel.epochs, colours.train)
    if panel.evaluations is not None:
        _line(axes, panel.evaluations, colours.evaluation)
    if panel.hyperparam is not None:
        _line(axes, panel.hyperparam, colours.mark, dots=False)
    marks = changes if len(changes) <= MARKS_DRAWN else ()
    for step in {change.step for change in marks}:
        axes.axvline(step, **CHANGE, color=colours.mark, alpha=0.75, zorder=1.5)
    _mark_not_finite(axes, panel, colours)
    _label(axes, colours)


def _drawable(curve: Curve) -> Points:
    """Returns the points of ``curve``, without values that matplotlib cannot place on an axis."""
    points = curve.points()

    def placed(values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            values = np.where(np.abs(values) > LARGEST, np.nan, values)
            return np.where(np.abs(values) < 1 / LARGEST, 0.0, values)

    means, lows, highs = (placed(values) for values in (points.means, points.lows, points.highs))
    return replace(points, means=means, lows=lows, highs=highs)


def _line(
    axes: Axes, curve: Curve, colour: str, *, width: float = 1.7, faint: bool = False, dots: bool = True
) -> None:
    points = _drawable(curve)
    steps = points.steps
    style: dict[str, Any] = {"color": colour, "alpha": 0.4 if faint else 1.0}
    if not points.exact:
        axes.fill_between(steps, points.lows, points.highs, color=colour, alpha=0.22, linewidth=0.3, zorder=2)
    axes.plot(steps, points.means, linewidth=width, zorder=2.2, **style)
    if points.exact and dots and len(points) <= 40:
        axes.plot(steps, points.means, linestyle="", marker="o", markersize=3, **style)


def _mark_not_finite(axes: Axes, panel: Panel, colours: Colours) -> None:
    """Draws a red triangle at the bottom for each bucket with a NaN or an infinity."""
    curves = panel.curves if panel.steps is None else [panel.steps, panel.evaluations]
    steps = np.concatenate([_not_finite(curve) for curve in curves if curve is not None] or [[]])
    foot = axes.get_xaxis_transform()
    axes.plot(
        steps, np.zeros(len(steps)), **NOT_FINITE, color=colours.bad, transform=foot, clip_on=False, zorder=4
    )


def _not_finite(curve: Curve) -> np.ndarray:
    points = curve.points()
    return points.steps[points.not_finite > 0]


def _label(axes: Axes, colours: Colours) -> None:
    axes.set_xlabel("step", color=colours.soft, fontsize=8.5, family=FONT, labelpad=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        # Without mathematical text, which matplotlib parses with shared state. A range within one decade requires
        # more labels than powers of ten.
        low, high = axes.get_ylim()
        narrow = high < 30 * low
        formatter = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(formatter)
        axes.yaxis.set_minor_formatter(formatter if narrow else NullFormatter())
        if narrow:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))  # all nine would overlap
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(ScalarFormatter(useMathText=False))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.yaxis.set_offset_position("right")  # "1e13"; the name of the panel is on the left


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
    """Returns the entries of the legend: only for what is drawn."""
    styles: list[dict[str, Any]] = []
    if any(panel.epochs is not None and len(panel.epochs) > 1 for panel in panels):
        styles.append({"color": colours.train, "linewidth": 1.7, "label": "mean of an epoch"})
    if any(panel.steps is not None for panel in panels):
        styles.append({"color": colours.train, "linewidth": 0.9, "alpha": 0.5, "label": "step"})
    if any(panel.evaluations is not None for panel in panels):
        styles.append({"color": colours.evaluation, "linewidth": 1.7, "label": "evaluation"})
    if 0 < len(changes) <= MARKS_DRAWN:
        names = {change.name for change in changes}
        name = plain(names.pop()) if len(names) == 1 else "a hyperparameter"
        styles.append({**CHANGE, "color": colours.mark, "label": f"change of {name}"})
    curves = [curve for panel in panels for curve in (panel.steps, panel.evaluations) if curve]
    if any(len(_not_finite(curve)) for curve in curves):
        styles.append({**NOT_FINITE, "color": colours.bad, "label": "not finite"})
    return [Line2D([], [], **style) for style in styles]


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
