from __future__ import annotations

import xml.dom.minidom

from eventtrain.notebook import html

HOSTILE = '"><img src=x onerror=alert(1)>'


def test_every_text_is_escaped_and_the_whole_is_well_formed() -> None:
    whole = html.box(
        html.title(HOSTILE, HOSTILE),
        html.facts([(HOSTILE, HOSTILE)]),
        html.table([HOSTILE, "last"], [[HOSTILE, HOSTILE]]),
        html.row_of([]),
    )
    assert "<img" not in whole
    assert whole.count("&lt;img src=x") == 7
    xml.dom.minidom.parseString(whole)


def test_rows_beyond_the_limit_are_counted() -> None:
    shown = html.table(["name"], [[index] for index in range(1000)], most=10)
    assert shown.count("<tr") == 12
    assert "990 more" in shown


def test_nothing_to_show_is_no_table() -> None:
    assert html.facts([]) == ""
