"""The page: one HTML file with its figures and styles inside, which asks nothing of any network."""

from collections.abc import Sequence
from html import escape

from hpcmoe import __version__
from hpcmoe.report.page.charts import draw_chart
from hpcmoe.report.page.contents import Chart, DataTable, Headline, Report, ReportSection

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LIVE_POLICY = "; script-src 'unsafe-inline'; connect-src 'self'"
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #171b21; --soft: #59626f; --rule: #dde1e7;
  --accent: #0b5cad; --plate: #e9ecf0; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568d; --c4: #c98300;
  --c5: #4fa3d8; --c6: #8a6a4a; --c7: #a9b1bb; }
@media (prefers-color-scheme: dark) { :root { --page: #101317; --card: #191d23; --ink: #e8ebef; --soft: #9ca6b3;
  --rule: #2c323b; --accent: #7db8f0; --plate: #2b3139; --c0: #4aa3e0; --c1: #f08548; --c2: #2fc198; --c3: #dd8cba;
  --c4: #e8b04a; --c5: #9dd0f3; --c6: #b89878; --c7: #6d7682; } }
* { box-sizing: border-box; }
body { margin: 0; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main, header, nav, footer { max-width: 1240px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0; max-width: 80ch; }
.soft, .sentence, .note { color: var(--soft); }
.note { font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding-top: 14px; padding-bottom: 4px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.headline { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr));
  margin: 16px 0 8px; }
.headline div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; }
.headline dt, .headline .note { font-size: 12.5px; color: var(--soft); }
.headline dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.headline dd small { font-size: 13px; font-weight: 400; color: var(--soft); }
section { padding: 26px 0 4px; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  margin: 12px 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px;
  min-width: 0; }
figure svg { width: 100%; max-width: 560px; height: auto; display: block; }
.tables { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; margin: 12px 0; }
.table { max-width: 100%; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 18px 3px 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
footer { padding-top: 24px; padding-bottom: 32px; font-size: 13px; color: var(--soft); }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .axis-title { fill: var(--soft); }
svg .level-name { fill: var(--soft); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .grid { stroke: var(--rule); fill: none; }
svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .part { stroke: var(--card); stroke-width: 0.8; }
svg .level { stroke: var(--ink); fill: none; stroke-dasharray: 3 3; }
svg .mark { stroke: var(--c3); fill: none; stroke-width: 1.2; stroke-dasharray: 1 3; stroke-linecap: round; }
svg .plate { fill: var(--plate); }
svg .cells { shape-rendering: crispEdges; }
svg .cell-sample { stroke: var(--rule); }
svg text.on-light { fill: #10151c; } svg text.on-dark { fill: #ffffff; }
@media print { .table, figure { break-inside: avoid; } }
"""
_SHADES = (
    "#eef3f8",
    "#cfe0ee",
    "#a5c9e2",
    "#74aed3",
    "#4a8dbd",
    "#2c6a9f",
    "#164a7c",
    "#0a2a4f",
)  # the darker, the more
_FOLLOW = """
let seen = null;
async function follow() {
  try {
    const state = await (await fetch("state")).text();
    if (seen !== null && state !== seen) {
      const text = await (await fetch("./")).text();
      const open = [...document.querySelectorAll("details[open]")].map(each => each.id);
      document.body.innerHTML = new DOMParser().parseFromString(text, "text/html").body.innerHTML;
      open.forEach(id => document.getElementById(id)?.setAttribute("open", ""));
    }
    seen = state;
  } catch (error) { document.title = "ended: " + document.title.replace(/^ended: /, ""); }
  setTimeout(follow, 2000);
}
follow();
"""


def make_page(report: Report, follows: bool = False) -> str:
    """Make the page of a report; follows: it asks its own server, every two seconds, for what is new."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in report.sections)
    body = (
        f"<header><h1>{escape(report.title)}</h1><p class='soft'>{escape(report.subtitle)}</p></header>"
        f"<nav>{links}</nav><main><dl class='headline'>{''.join(map(make_headline, report.headlines))}</dl>"
        f"{''.join(map(make_section, report.sections))}</main>"
        f"<footer>{'<br>'.join(map(escape, [*report.notes, f'Made by hpcmoe {__version__}.']))}</footer>"
    )
    script = f"<script>{_FOLLOW}</script>" if follows else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}{_LIVE_POLICY * follows}">'
        f'<meta name="generator" content="hpcmoe {__version__}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(report.title)}</title><style>{make_style()}</style>{script}</head><body>{body}</body></html>\n"
    )


def make_style() -> str:
    """Make the page's style sheet: each colour of a palette and each shade of a map has a class."""
    colours = [f"svg .line.c{n} {{ stroke: var(--c{n}); }} svg .fill.c{n} {{ fill: var(--c{n}); }}" for n in range(8)]
    shades = [f"svg .s{number} {{ fill: {shade}; }}" for number, shade in enumerate(_SHADES)]
    return "\n".join([_STYLE, *colours, *shades])


def make_headline(headline: Headline) -> str:
    """Make one of the figures at the top."""
    unit = f" <small>{escape(headline.unit)}</small>" if headline.unit else ""
    note = f"<span class='note'>{escape(headline.note)}</span>" if headline.note else ""
    return f"<div><dt>{escape(headline.name)}</dt><dd>{escape(headline.value)}{unit}</dd>{note}</div>"


def make_section(section: ReportSection) -> str:
    """Make a section: its sentence, its figures, its tables."""
    charts = f"<div class='charts'>{''.join(map(make_figure, section.charts))}</div>" if section.charts else ""
    tables = f"<div class='tables'>{''.join(map(make_data_table, section.tables))}</div>" if section.tables else ""
    head = f"<h2>{escape(section.title)}</h2><p class='sentence'>{escape(section.sentence)}</p>"
    return f"<section id='{section.anchor}'>{head}{charts}{tables}</section>"


def make_figure(chart: Chart) -> str:
    """Make a figure with its title and what is to be known of it."""
    note = f"<p class='note'>{escape(chart.note)}</p>" if chart.note else ""
    return f"<figure><figcaption><h3>{escape(chart.title)}</h3></figcaption>{draw_chart(chart)}{note}</figure>"


def make_data_table(table: DataTable) -> str:
    """Make a table, which scrolls by itself where it is wider than the screen."""
    head = make_row(table.headers, "th")
    rows = "".join(make_row(row, "td") for row in table.rows)
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    inside = f"<div class='scroll'><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>{note}"
    if table.folded:
        summary = f"<summary>{escape(table.title)}</summary>"
        return f"<details class='table' id='table-{table.name}'>{summary}{inside}</details>"
    return f"<div class='table'><h3>{escape(table.title)}</h3>{inside}</div>"


def make_row(cells: Sequence[str], name: str) -> str:
    """Make a row of cells."""
    return f"<tr>{''.join(f'<{name}>{escape(cell)}</{name}>' for cell in cells)}</tr>"
