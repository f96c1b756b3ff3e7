"""A report as Markdown, with the curves as block characters. Pure."""

from __future__ import annotations

import re

from eventtrain.subscribers.reports.sections import Content, Section, Table, mapped, one_line


def to_markdown(content: Content) -> str:
    """Returns the text of the file."""
    safe = mapped(content, lambda text: escaped(one_line(text)))
    parts = [f"# {safe.title or 'Run'}", f"**{safe.outcome}**" + (f": {safe.reason}" if safe.reason else "")]
    if safe.drawings:
        rows = [(drawing.name, drawing.bars) for drawing in safe.drawings]
        parts += ["## Curves", _table(Table(("curve", "from the first step to the last"), rows))]
    for section in safe.sections:
        parts += _section(section)
    parts.append(safe.footer)
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Returns ``text`` so that Markdown shows it unchanged, also in a table, and no reader takes it for HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", text)


def _section(section: Section) -> list[str]:
    facts = "\n".join(f"- {name}: {value}" for name, value in section.facts)
    table = _table(section.table) if section.table is not None else ""
    return [part for part in (f"## {section.title}", section.note, facts, table) if part]


def _table(table: Table) -> str:
    rule = ["---:" if index in table.numeric else "---" for index in range(len(table.head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.head, rule, *table.rows))
