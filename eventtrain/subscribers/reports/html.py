"""A report as one HTML file: no script, nothing fetched, light or dark by the reader's setting. Pure."""

from __future__ import annotations

import html

from eventtrain.subscribers.reports.sections import Content, Section, Table, mapped, one_line

ROWS_OPEN = 12
"""Longer tables are folded."""

STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
header { margin-bottom: 20px; }
h1 { font-size: 26px; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
.reason { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.outcome { display: inline-block; border-radius: 999px; padding: 1px 12px; margin-right: 8px; font-weight: 600;
  color: var(--paper); background: var(--soft); }
.completed { background: var(--mark); } .stopped { background: var(--train); }
.interrupted { background: var(--evaluation); } .failed { background: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 20px; }
.figures div { flex: 1 1 130px; }
.figures div, section { background: var(--paper); border: 1px solid var(--grid); border-radius: 10px; }
.figures div { padding: 10px 16px; }
.figures dt { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.figures dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
section { padding: 16px 20px; margin-bottom: 16px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
img { min-width: min(100%, 192px); max-width: 100%; image-rendering: pixelated; }
.key { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
.key i { display: inline-block; width: 20px; height: 0; border-top: 3px solid; vertical-align: middle;
  margin: 0 6px 0 14px; }
.key i:first-child { margin-left: 0; }
.note { color: var(--soft); margin: 0 0 10px; overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 3px 20px; margin: 0 0 10px; }
dl.facts dt { color: var(--soft); overflow-wrap: anywhere; } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  overflow-wrap: break-word; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); }
footer { color: var(--soft); font-size: 13px; }
@media print { body { background: none; } section, .figures div { break-inside: avoid; } }
"""

KEY = (
    '<p class="key"><i style="border-color: var(--train)"></i>training'
    '<i style="border-color: var(--evaluation)"></i>evaluation'
    '<i style="border-color: var(--mark)"></i>hyperparameter, its changes dotted'
    '<i style="border-color: var(--bad)"></i>not finite</p>'
)


def to_html(content: Content, light: object, dark: object) -> str:
    """Returns the text of the file. ``light`` and ``dark`` are dataclasses of colours, whose names the style uses."""
    safe = mapped(content, lambda text: html.escape(one_line(text)))
    outcome = safe.outcome if safe.outcome in ("completed", "stopped", "interrupted", "failed") else ""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{safe.title}: {safe.outcome}</title>",
        f"<style>{_style(light, dark)}</style></head><body><main>",
        f"<header><h1>{safe.title}</h1>",
        f'<p class="reason"><span class="outcome {outcome}">{safe.outcome}</span>{safe.reason}</p></header>',
        '<dl class="figures">',
        *(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in safe.figures),
        "</dl>",
    ]
    if safe.drawings:
        parts.append('<section><h2>Curves</h2><div class="curves">')
        parts += [f"<figure><figcaption>{one.name}</figcaption>{one.svg}</figure>" for one in safe.drawings]
        parts.append(f"</div>{KEY}</section>")
    if safe.images:
        parts.append('<section><h2>Samples</h2><div class="curves">')
        parts += [
            f'<figure><figcaption>{one.caption}</figcaption><img src="data:image/png;base64,{one.image}" '
            'alt=""></figure>'
            for one in safe.images
        ]
        parts.append("</div></section>")
    parts += [_section(section) for section in safe.sections]
    parts.append(f"<footer>{safe.footer}</footer></main></body></html>")
    return "\n".join(parts) + "\n"


def _style(light: object, dark: object) -> str:
    style = STYLE
    for mark, colours, page in (("LIGHT", light, "#f4f6f8"), ("DARK", dark, "#0d1014")):
        values = {"page": page, **vars(colours)}
        style = style.replace(mark, " ".join(f"--{name}: {value};" for name, value in values.items()))
    return style


def _section(section: Section) -> str:
    note = f'<p class="note">{section.note}</p>' if section.note else ""
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in section.facts)
    facts = f'<dl class="facts">{facts}</dl>' if facts else ""
    return f"<section><h2>{section.title}</h2>{note}{facts}{_table(section.table)}</section>"


def _table(table: Table | None) -> str:
    if table is None:
        return ""
    kinds = [' class="n"' if index in table.numeric else "" for index in range(len(table.head))]
    head = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, table.head, strict=True))
    rows = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in table.rows
    )
    whole = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if len(table.rows) <= ROWS_OPEN:
        return whole
    return f"<details><summary>{len(table.rows)} rows</summary>{whole}</details>"
