from __future__ import annotations

import re
import xml.dom.minidom

import numpy as np
import pytest

from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.small_chart import (
    EVALUATION,
    HEIGHT,
    LEFT,
    RIGHT,
    TRAIN,
    WIDTH,
    small_chart,
)

HOSTILE = '<script>alert("x")</script>&\x1b[2J\udc80'


def curve(values: object, first: int = 1) -> Curve:
    made = Curve()
    column = np.asarray(values, np.float64)
    made.add(np.arange(first, first + len(column)), column)
    return made


def places(html: str, colour: str) -> list[tuple[float, float]]:
    """Every place that a line or an area of ``colour`` passes."""
    paths = re.findall(rf'<path d="([^"]*)" (?:stroke|fill)="{colour}"', html)
    return [(float(x), float(y)) for path in paths for x, y in re.findall(r"([\d.]+),([\d.]+)", path)]


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [2.0, 2.0, 2.0],
        [1.0, 0.5, 0.25],
        [1e-9, 1.0, 1e9],
        [-1e308, 1e308],
        [1.0, np.nan, 3.0, np.inf],
        [np.nan],
        [],
        np.sin(np.arange(100_000)),
    ],
    ids=str,
)
def test_every_curve_is_well_formed_and_inside_its_picture(values: object) -> None:
    html = small_chart("loss", curve(values), curve(values))
    xml.dom.minidom.parseString(html)
    for x, y in places(html, TRAIN) + places(html, EVALUATION):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_a_million_steps_take_as_much_room_as_a_thousand_and_show_the_one_spike() -> None:
    values = np.ones(1_000_000)
    values[654_321] = 7.0
    html = small_chart("loss", curve(values), curve(values))
    assert len(html) < 12_000
    top = min(places(html, TRAIN), key=lambda place: place[1])
    assert (top[0] - LEFT) / (WIDTH - LEFT - RIGHT) == pytest.approx(0.654, abs=0.02)
    assert ">7</text>" in html


def test_what_is_not_finite_leaves_a_gap_and_a_mark() -> None:
    html = small_chart("loss", curve([1, 2, np.nan, 2, 1]))
    assert html.count(f'stroke="{TRAIN}"') == 2
    assert html.count("h6l-3,-5z") == 1


def test_names_are_text() -> None:
    html = small_chart(HOSTILE, curve([1.0]))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html
    html.encode()
    assert len(small_chart("x" * 10_000, curve([1.0]))) < 3_000
