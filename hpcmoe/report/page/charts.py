"""Each kind of chart as SVG."""

from collections.abc import Sequence

import numpy as np

from hpcmoe.report.page.contents import BarChart, Chart, ChartBar, HeatMap, Line, LineChart
from hpcmoe.report.page.numbers import choose_ticks, format_short, thin_curve
from hpcmoe.report.page.svg import (
    WIDTH,
    Frame,
    draw_axes,
    draw_legend,
    make_element,
    make_label,
    make_path,
    make_svg,
    measure_text,
    shorten,
)

NUM_SHADES = 8  # of a map, from few to much
_PLOT_HEIGHT, _LEFT, _RIGHT, _BELOW, _ABOVE = 170, 46, 14, 38, 22
_BAR_HEIGHT, _BAR_GAP, _MOST_NAME = 15, 7, 150
_MOST_DOTS = 60  # marks of one curve
_TALLEST_CELL, _LARGEST_MAP = 22, 300


def draw_chart(chart: Chart) -> str:
    """Draw a chart -> its svg element."""
    match chart:
        case LineChart():
            return draw_line_chart(chart)
        case BarChart():
            return draw_bar_chart(chart)
        case HeatMap():
            return draw_heat_map(chart)
        case _:
            raise ValueError(chart)


def draw_line_chart(chart: LineChart) -> str:
    """Draw curves, bands or stacked areas over the steps."""
    lines = stack_lines(chart.lines) if chart.stacked else chart.lines
    entries = [(line.name, sample_line(line)) for line in lines if line.name]
    if chart.marks:
        entries.append((chart.mark_name, make_element("path", d="M7 0v10", class_="mark")))
    legend, top = draw_legend(entries)
    frame = frame_lines(chart, lines, top + _ABOVE)
    parts = [*legend, *draw_axes(frame, "step", chart.unit)]

    # Draw bands first, curves over them, then what is marked.
    for line in sorted(lines, key=lambda line: line.upper is None):
        parts += draw_line(frame, line)
    for name, level in chart.levels:
        y = frame.place_y(level)
        parts.append(make_element("path", d=f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}", class_="level"))
        parts.append(make_label(frame.right, y - 4, f"{name} {format_short(level)}", "end", "level-name"))
    for step in chart.marks:
        x = frame.place_x(step)
        parts.append(make_element("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}", class_="mark"))
    return make_svg(frame.bottom + _BELOW, chart.title, parts)


def stack_lines(lines: Sequence[Line]) -> list[Line]:
    """Add up curves of the same steps -> bands, each on those before it."""
    stacked, below = [], np.zeros(len(lines[0].x)) if lines else np.zeros(0)
    for line in lines:
        above = below + np.nan_to_num(line.y)
        stacked.append(Line(name=line.name, x=line.x, y=below, upper=above, colour=line.colour))
        below = above
    return stacked


def sample_line(line: Line) -> str:
    """Draw a curve's sample for the legend."""
    colour = f"c{line.colour}"
    if line.upper is not None:
        return make_element("rect", width=14, height=10, rx=2, class_=f"fill {colour}")
    dash = {"stroke_dasharray": "4 3"} if line.dashed else {}
    dot = make_element("circle", cx=7, cy=5, r=2.6, class_=f"fill {colour}") if line.points else ""
    return make_element("path", d="M0 5h14", class_=f"line {colour}", **dash) + dot


def frame_lines(chart: LineChart, lines: Sequence[Line], top: float) -> Frame:
    """Choose what the axes span."""
    x = np.concatenate([line.x for line in lines] or [np.zeros(1)])
    heights = [array for line in lines for array in (line.y, line.upper) if array is not None]
    y = np.concatenate([*heights, np.array([level for _, level in chart.levels])])
    y = y[np.isfinite(y)] if np.isfinite(y).any() else np.zeros(1)
    low, high = float(y.min()), float(y.max())
    if chart.from_zero or chart.stacked:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = low if low == 0 else low - margin
    return Frame(
        left=_LEFT, right=WIDTH - _RIGHT, top=top, bottom=top + _PLOT_HEIGHT,
        x_low=float(x.min()), x_high=float(max(x.max(), x.min() + 1)), y_low=low, y_high=high + margin,
    )  # fmt: skip


def draw_line(frame: Frame, line: Line) -> list[str]:
    """Draw one curve or band."""
    colour = f"c{line.colour}"
    if line.upper is not None:
        x, low = thin_curve(line.x, line.y)
        high = np.interp(x, line.x, line.upper) if len(x) < len(line.x) else line.upper
        edge = [*place_points(frame, x, high), *place_points(frame, x[::-1], low[::-1])]
        return [make_element("path", d=make_path(edge) + "Z", class_=f"fill {colour}")]
    x, y = thin_curve(line.x, line.y)
    dash = {"stroke_dasharray": "5 4"} if line.dashed else {}
    parts = [make_element("path", d=make_path(place_points(frame, x, y)), class_=f"line {colour}", **dash)]
    if (line.points or len(x) == 1) and len(x) <= _MOST_DOTS:
        spots = [(cx, cy) for cx, cy in place_points(frame, x, y) if np.isfinite(cy)]
        parts += [make_element("circle", cx=cx, cy=cy, r=2.8, class_=f"fill {colour}") for cx, cy in spots]
    return parts


def place_points(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Place values in a frame -> points."""
    return [(frame.place_x(a), frame.place_y(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def draw_bar_chart(chart: BarChart) -> str:
    """Draw bars beside their names, each with its sum, and the levels that they are compared with."""
    # Choose what the axis spans.
    sums = [measure_bar(bar) for bar in chart.bars]
    most = max([*sums, *(level for _, level in chart.levels)], default=0.0) or 1.0
    wide = max([measure_text(bar.name) for bar in chart.bars], default=0.0)
    kinds = {what: colour for bar in chart.bars for what, _, colour in bar.parts if what}
    swatches = [
        (what, make_element("rect", width=14, height=10, rx=2, class_=f"fill c{c}")) for what, c in kinds.items()
    ]
    swatches += [(f"{name} {format_short(level)}", make_element("path", d="M7 0v10", class_="level"))
                 for name, level in chart.levels]  # fmt: skip
    legend, top = draw_legend(swatches)
    pitch = _BAR_HEIGHT + _BAR_GAP
    top += 8
    frame = Frame(
        left=min(wide, _MOST_NAME) + 10, right=WIDTH - 50, top=top, bottom=top + pitch * len(chart.bars),
        x_low=0.0, x_high=most, y_low=0.0, y_high=1.0,
    )  # fmt: skip

    # Draw the bars on the grid, the axis below them.
    parts = [*legend, *draw_bar_axis(frame, chart.unit)]
    for number, (bar, total) in enumerate(zip(chart.bars, sums, strict=True)):
        parts += draw_bar(frame, bar, total, top + pitch * number + _BAR_GAP / 2)
    for _, level in chart.levels:
        x = frame.place_x(level)
        parts.append(make_element("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}", class_="level"))
    return make_svg(frame.bottom + _BELOW, chart.title, parts)


def measure_bar(bar: ChartBar) -> float:
    """Return the sum of a bar's parts that are finite and above 0."""
    return sum(value for _, value, _ in bar.parts if np.isfinite(value) and value > 0)


def draw_bar_axis(frame: Frame, unit: str) -> list[str]:
    """Draw the grid and the axis below bars."""
    parts = []
    for tick in choose_ticks(frame.x_low, frame.x_high, 4):
        x = frame.place_x(tick)
        parts.append(make_element("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}", class_="grid"))
        parts.append(make_label(x, frame.bottom + 15, format_short(tick), "middle"))
    parts.append(make_label(frame.right, frame.bottom + 30, unit, "end", "axis-title"))
    return parts


def draw_bar(frame: Frame, bar: ChartBar, total: float, y: float) -> list[str]:
    """Draw one bar with its name and its sum."""
    parts = [make_label(frame.left - 6, y + 11.5, shorten(bar.name, _MOST_NAME), "end")]
    x = frame.left
    for what, value, colour in bar.parts:
        if np.isfinite(value) and value > 0:
            width = frame.place_x(value) - frame.left
            name = make_element(
                "title", f"{shorten(what or bar.name, 400)}: {format_short(value)}".replace("<", "&lt;")
            )
            area = {"x": x, "y": y, "width": max(width, 0.8), "height": float(_BAR_HEIGHT), "rx": 1.5}
            parts.append(make_element("rect", name, **area, class_=f"fill part c{colour}"))
            x += width
    return [*parts, make_label(x + 5, y + 11.5, format_short(total))]


def draw_heat_map(chart: HeatMap) -> str:
    """Draw a map: shades in steps, of which the legend shows each; neighbours of one shade are one shape."""
    rows, columns = chart.values.shape
    entries = [(name, make_element("rect", width=14, height=10, class_=f"s{shade} cell-sample"))
               for shade, name in name_shades(chart)]  # fmt: skip
    legend, top = draw_legend(entries)
    left = min(max(measure_text(name) for name in chart.y_names) + 10, 110)
    width = WIDTH - _RIGHT - left
    height = min(rows * min(_TALLEST_CELL, width / columns if rows == columns else _TALLEST_CELL), _LARGEST_MAP)
    height = max(height, 40.0)
    frame = Frame(left, top + _ABOVE, left + width, top + _ABOVE + height, 0.0, columns, 0.0, rows)

    # Draw all cells of a shade as one path, in units of cells.
    shades = choose_shades(chart.values, chart.edges)
    grid = f"translate({frame.left:.2f} {frame.top:.2f}) scale({width / columns:.5f} {height / rows:.5f})"
    cells = "".join(
        make_element("path", d=data, class_=f"s{shade}")
        for shade in range(NUM_SHADES)
        if (data := make_runs(shades == shade))
    )
    plate = make_element("rect", x=frame.left, y=frame.top, width=width, height=height, class_="plate")
    parts = [*legend, plate, make_element("g", cells, transform=grid, class_="cells")]
    parts += draw_map_names(frame, chart)
    if chart.digits is not None:
        parts += write_cells(frame, chart, shades)
    return make_svg(frame.bottom + _BELOW, chart.title, parts)


def choose_shades(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Choose the shade of each value: the number of edges at or below it; -1 where there is none."""
    return np.where(np.isnan(values), -1, np.searchsorted(np.asarray(edges), values, side="right"))


def name_shades(chart: HeatMap) -> list[tuple[int, str]]:
    """Name the shades that a map has, from its least to its most -> (shade, name)."""
    edges = [format_short(edge) for edge in chart.edges]
    names = [f"< {edges[0]}", *(f"{a}-{b}" for a, b in zip(edges, edges[1:], strict=False)), f"≥ {edges[-1]}"]
    return list(enumerate(names))


def make_runs(mask: np.ndarray) -> str:
    """Make a path's data of the cells of a mask, each run of neighbours in a row as one box."""
    words = []
    for row, line in enumerate(mask):
        change = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        words += [f"M{a} {row}h{b - a}v1h{a - b}z" for a, b in change.reshape(-1, 2).tolist()]
    return "".join(words)


def draw_map_names(frame: Frame, chart: HeatMap) -> list[str]:
    """Name some rows and columns, and both axes; a name stands at the middle of its cell."""
    rows, columns = chart.values.shape
    parts = [make_label(2, frame.top - 7, f"{chart.y_label}, {chart.unit}", "start", "axis-title")]
    for row in range(0, rows, -(-rows * 13 // int(frame.bottom - frame.top))):
        y = frame.top + (row + 0.5) * (frame.bottom - frame.top) / rows
        parts.append(make_label(frame.left - 5, y + 3.5, shorten(chart.y_names[row], frame.left - 8), "end"))
    widest = max(measure_text(name) for name in chart.x_names) + 8
    for column in range(0, columns, max(1, -int(-columns * widest // (frame.right - frame.left)))):
        x = frame.left + (column + 0.5) * (frame.right - frame.left) / columns
        parts.append(make_label(x, frame.bottom + 14, chart.x_names[column], "middle"))
    return [*parts, make_label(frame.right, frame.bottom + 30, chart.x_label, "end", "axis-title")]


def write_cells(frame: Frame, chart: HeatMap, shades: np.ndarray) -> list[str]:
    """Write the values into the cells of a small map."""
    (rows, columns), parts = chart.values.shape, []
    for (row, column), value in np.ndenumerate(chart.values):
        if np.isfinite(value):
            x = frame.left + (column + 0.5) * (frame.right - frame.left) / columns
            y = frame.top + (row + 0.5) * (frame.bottom - frame.top) / rows
            ink = "on-dark" if shades[row, column] >= NUM_SHADES // 2 else "on-light"
            parts.append(make_label(x, y + 3.5, f"{value:.{chart.digits}f}", "middle", f"label {ink}"))
    return parts
