"""The same report for a terminal: curves and maps of characters, bars, tables; plain ASCII where nothing else shows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from hpcmoe.report.page.charts import choose_shades, measure_bar
from hpcmoe.report.page.contents import BarChart, Chart, ChartBar, DataTable, HeatMap, LineChart, Report, ReportSection
from hpcmoe.report.page.numbers import format_short, group_cells

_NAME, _FIGURES = 24, 26  # columns of a curve's name and of its figures
_MOST_MAP_ROWS = 24
_MOST_TABLE_ROWS = 24


class Ink(NamedTuple):
    """The characters that charts are made of, from few to much."""

    levels: str  # of a curve
    shades: str  # of a map, 8
    bar: str
    kinds: str  # of a bar's parts


UNICODE_INK = Ink("▁▂▃▄▅▆▇█", " ·-+░▒▓█", "█", "█▓▒░▚▞▖▪")
ASCII_INK = Ink("_.-=+*#@", " .:-=+*#", "#", "#=+-o*x.")


def format_report(report: Report, width: int, encoding: str) -> str:
    """Format a report as text of so many columns."""
    ink = choose_ink(encoding)
    lines = [report.title, "=" * min(len(report.title), width), report.subtitle, ""]
    for each in report.headlines:
        lines.append(f"{each.name[:30]:<32}{each.value + ' ' + each.unit:<30}{each.note}"[:width].rstrip())
    for section in report.sections:
        lines += ["", *format_section(section, width, ink)]
    return "\n".join(lines)


def choose_ink(encoding: str) -> Ink:
    """Choose the characters that an encoding has."""
    try:
        "".join(UNICODE_INK).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII_INK
    return UNICODE_INK


def format_section(section: ReportSection, width: int, ink: Ink) -> list[str]:
    """Format a section's charts and tables."""
    lines = [section.title, "-" * len(section.title)]
    for chart in section.charts:
        lines += ["", f"{chart.title} ({chart.unit})"[:width], *format_chart(chart, width, ink)]
    for table in section.tables:
        lines += ["", table.title[:width], *format_table(table, width)]
    return lines


def format_chart(chart: Chart, width: int, ink: Ink) -> list[str]:
    """Format a chart."""
    match chart:
        case LineChart():
            return format_lines(chart, width, ink)
        case BarChart():
            return [line for bar in chart.bars for line in format_bar(bar, chart, width, ink)] + format_levels(chart)
        case HeatMap():
            return format_map(chart, width, ink)
        case _:
            raise ValueError(chart)


def format_lines(chart: LineChart, width: int, ink: Ink) -> list[str]:
    """Format each curve on a line, all on one scale: what it goes through, then least, last and most."""
    series = [(line.name, line.y if line.upper is None else line.upper) for line in chart.lines]
    finite = np.concatenate([values[np.isfinite(values)] for _, values in series] or [np.zeros(1)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    columns = max(10, width - _NAME - _FIGURES)
    shown = []
    for name, values in series:
        figures = [format_short(value) for value in find_extremes(values)]
        curve = draw_curve(values, 0.0 if chart.from_zero or chart.stacked else low, high, columns, ink)
        shown.append(
            f"{name[: _NAME - 2]:<{_NAME}}{curve:<{columns}}  {figures[0]} - {figures[1]}, last {figures[2]}"[:width]
        )
    return shown + format_levels(chart)


def find_extremes(values: np.ndarray) -> tuple[float, float, float]:
    """Find the least, the largest and the last of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max()), float(finite[-1])) if len(finite) else (np.nan,) * 3


def draw_curve(values: np.ndarray, low: float, high: float, columns: int, ink: Ink) -> str:
    """Draw a curve in characters, each the mean of its stretch."""
    stretches = np.array_split(values, min(columns, len(values)))
    means = np.array(
        [stretch[np.isfinite(stretch)].mean() if np.isfinite(stretch).any() else np.nan for stretch in stretches]
    )
    scaled = np.nan_to_num((means - low) / ((high - low) or 1.0)) * (len(ink.levels) - 1)
    marks = [ink.levels[int(level)] for level in np.clip(np.round(scaled), 0, len(ink.levels) - 1)]
    return "".join(" " if np.isnan(mean) else mark for mean, mark in zip(means, marks, strict=True))


def format_levels(chart: LineChart | BarChart) -> list[str]:
    """Format what the values are compared with."""
    return [f"  {name} {format_short(level)}" for name, level in chart.levels]


def format_bar(bar: ChartBar, chart: BarChart, width: int, ink: Ink) -> list[str]:
    """Format a bar, and below it what its parts are; what is not finite has no length."""
    most = max([measure_bar(each) for each in chart.bars] + [level for _, level in chart.levels]) or 1.0
    columns, total = max(10, width - _NAME - 12), measure_bar(bar)
    several = len(bar.parts) > 1
    drawn, reached = "", 0.0
    for number, (_, value, _) in enumerate(bar.parts):
        reached += max(value, 0.0) / most * columns if np.isfinite(value) else 0.0
        drawn += (ink.kinds[number % len(ink.kinds)] if several else ink.bar) * max(0, round(reached) - len(drawn))
    lines = [f"{bar.name[: _NAME - 2]:<{_NAME}}{drawn:<{columns}} {format_short(total)}"[:width]]
    if several:
        words = [f"{ink.kinds[number % len(ink.kinds)]} {name} {format_short(value)}" for number, (name, value, _) in
                 enumerate(bar.parts)]  # fmt: skip
        lines += wrap_words(words, width)
    return lines


def wrap_words(words: Sequence[str], width: int) -> list[str]:
    """Join words to indented lines that are not too long."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 4 > width:
            lines.append("")
        lines[-1] += f"  {word}"
    return lines


def format_map(chart: HeatMap, width: int, ink: Ink) -> list[str]:
    """Format a map: a character or two a cell, and what each shade is."""
    rows, columns = chart.values.shape
    wide = min(12, max(len(name) for name in chart.y_names))
    most = max(8, width - wide - 4)
    values = group_cells(group_cells(chart.values, _MOST_MAP_ROWS, 0), most, 1)
    every = -(-rows // _MOST_MAP_ROWS)
    repeat = max(1, min(4, most // values.shape[1]))
    shades = choose_shades(values, chart.edges)
    lines = [
        f"{chart.y_names[min(row * every, rows - 1)][:wide]:>{wide}} |"
        + "".join(("?" if shade < 0 else ink.shades[shade]) * repeat for shade in line)
        + "|"
        for row, line in enumerate(shades)
    ]
    edges = [format_short(edge) for edge in chart.edges]
    words = [f"'{mark}' < {edge}" for mark, edge in zip(ink.shades, edges, strict=False)] + [f"'{ink.shades[-1]}' more"]
    names = f"rows: {chart.y_label}; columns: {chart.x_label} {chart.x_names[0]} to {chart.x_names[-1]}"
    return [*lines, f"  {names}"[:width], *wrap_words(words, width)]


def format_table(table: DataTable, width: int) -> list[str]:
    """Format a table, of a long one its first rows; lines that are too long are cut."""
    if not table.rows:
        return [f"  {table.note}"]
    rows = table.rows[:_MOST_TABLE_ROWS]
    text = tabulate(rows, headers=table.headers, disable_numparse=True, preserve_whitespace=True)
    left = len(table.rows) - len(rows)
    more = [f"  ... and {left} more rows: --csv writes all"] * bool(left)
    return [line[:width].rstrip() for line in text.splitlines()] + more
