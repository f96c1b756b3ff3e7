"""Draws the results of the suite as SVG, in colours that are readable on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One figure of a results file."""

INK = "#7a7a7a"
COLOURS = ("#3b8eea", "#e5730b", "#2fa36b", "#b265d6", "#d64550", "#a08c00", "#1f9fb4")


def draw(document: Record, folder: Path) -> list[Path]:
    """Writes ``SLUG-PART.svg`` for each part with ratios; returns the files, none if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "eventtrain",
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with mpl.rc_context(style):
        for part in dict.fromkeys(one["part"] for one in document["figures"]):
            shown = [one for one in document["figures"] if one["part"] == part and one["ratio"] is not None]
            if len(shown) < 3:
                continue
            picture = Figure(layout="constrained")
            (_lines if _grows(shown) else _dots)(picture, shown)
            path = folder / f"{document['slug']}-{part}.svg"
            picture.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            written.append(path)
    return written


def _grows(figures: Sequence[Record]) -> bool:
    return all(one["at"].replace(",", "").isdigit() for one in figures)


def _dots(picture: Any, figures: Sequence[Record]) -> None:
    """One row for each case, one dot for each size, with whiskers from quartile to quartile."""
    cases = list(dict.fromkeys(one["case"] for one in figures))[::-1]
    sizes = list(dict.fromkeys(one["at"] for one in figures))
    picture.set_size_inches(8, 1.3 + 0.4 * len(cases))
    axes = picture.add_subplot()
    for index, size in enumerate(sizes):
        own = [one for one in figures if one["at"] == size]
        middle = [one["ratio"] for one in own]
        low, high = ([abs(one["ratio_quartiles"][half] - one["ratio"]) for one in own] for half in (0, 1))
        offset = (0.5 + index) / len(sizes) - 0.5
        axes.errorbar(
            middle,
            [cases.index(one["case"]) - 0.6 * offset for one in own],
            xerr=[low, high],
            fmt="o",
            markersize=5,
            color=COLOURS[index % len(COLOURS)],
            label=size,
        )
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    _finish(axes, axes.xaxis, figures, "x")
    if len(sizes) > 1:
        picture.legend(loc="outside upper right", ncols=min(4, len(sizes)), frameon=False)


def _lines(picture: Any, figures: Sequence[Record]) -> None:
    """One line for each case, over its size."""
    picture.set_size_inches(8, 3.6)
    axes = picture.add_subplot()
    for index, case in enumerate(dict.fromkeys(one["case"] for one in figures)):
        own = [one for one in figures if one["case"] == case]
        sizes = [int(one["at"].replace(",", "")) for one in own]
        axes.plot(sizes, [one["ratio"] for one in own], "o-", color=COLOURS[index], label=f"number of {case}")
    axes.set_xscale("log")
    _finish(axes, axes.yaxis, figures, "y")
    picture.legend(loc="outside upper right", ncols=4, frameon=False)


def _finish(axes: Any, ratios: Any, figures: Sequence[Record], way: str) -> None:
    """Marks 1, and labels the axis of the ratios, which is logarithmic if they differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found, baselines = [one["ratio"] for one in figures], {one["baseline"] for one in figures}
    getattr(axes, f"set_{way}label")(f"time / {baselines.pop() if len(baselines) == 1 else 'baseline'}")
    if max(found) > 3 * min(found):
        getattr(axes, f"set_{way}scale")("log")
        ratios.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ratios.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ratios.set_minor_formatter(NullFormatter())
    (axes.axvline if way == "x" else axes.axhline)(1, color=INK, linewidth=1)
    axes.grid(axis=way, color=INK, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
