"""A report as Markdown, with the curves as blocks of text. Pure."""

from __future__ import annotations

import re

from eventtrain.subscribers.reports.sections import Content, Section, Table, mapped, one_line


def to_markdown(content: Content, footer: str) -> str:
    """The file's text."""
    safe = mapped(content, lambda text: escaped(one_line(text)))
    parts = [f"# {safe.title or 'Run'}", f"**{safe.outcome}**" + (f": {safe.reason}" if safe.reason else "")]
    if safe.curves:
        rows = [(curve.name, curve.bars) for curve in safe.curves]
        parts.append("## Curves")
        parts.append(_table(Table(("curve", "from the first step to the last"), rows)))
    for section in safe.sections:
        parts += _section(section)
    parts.append(escaped(footer))
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """``text`` so that Markdown shows it as it is, also within a table, and no reader takes it for HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", text)


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}"]
    if section.note:
        parts.append(section.note)
    if section.facts:
        parts.append("\n".join(f"- {name}: {value}" for name, value in section.facts))
    if section.table is not None:
        parts.append(_table(section.table))
    return parts


def _table(table: Table) -> str:
    rule = ["---:" if index in table.numeric else "---" for index in range(len(table.head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.head, rule, *table.rows))
