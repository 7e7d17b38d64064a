"""What a report holds, apart from how it is shown: sections of figures and tables, for page and terminal alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcmoe.report.placement_tables import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve, or the points of one where values are rare."""

    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n], NaN where there is none
    colour: int = 0  # number of a palette's colour
    dashed: bool = False
    points: bool = False  # are the values marked?
    upper: np.ndarray | None = None  # [n] of a band, whose lower edge is y


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """Curves over the steps; stacked, areas on each other."""

    title: str
    unit: str
    lines: Sequence[Line]
    note: str = ""
    stacked: bool = False
    from_zero: bool = False
    levels: Sequence[tuple[str, float]] = ()  # horizontal: an aim, a floor
    marks: Sequence[int] = ()  # steps at which something happened
    mark_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartBar:
    """A bar of one or more parts, one after the other."""

    name: str
    parts: Sequence[tuple[str, float, int]]  # what, value, number of a colour


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Horizontal bars on one axis from zero."""

    title: str
    unit: str
    bars: Sequence[ChartBar]
    note: str = ""
    levels: Sequence[tuple[str, float]] = ()  # vertical: a bound


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """A map of values by row and column: the darker, the more; NaN is empty."""

    title: str
    unit: str
    values: np.ndarray  # [rows, columns]
    edges: Sequence[float]  # between the shades, ascending
    x_label: str
    y_label: str
    x_names: Sequence[str]  # a name per column
    y_names: Sequence[str]  # a name per row
    note: str = ""
    digits: int | None = None  # written into the cells of a small map


Chart = LineChart | BarChart | HeatMap


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """Figures in rows."""

    name: str  # of its file
    title: str
    headers: tuple[str, ...]
    rows: Rows
    note: str = ""
    folded: bool = False  # does the page show it on demand alone?


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSection:
    """A part of the report: what it is about in one sentence, its figures and tables."""

    anchor: str
    title: str
    sentence: str
    charts: Sequence[Chart] = ()
    tables: Sequence[DataTable] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One of the figures that a report begins with."""

    name: str
    value: str
    unit: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report of one run, or of several beside each other."""

    title: str
    subtitle: str
    headlines: Sequence[Headline]
    sections: Sequence[ReportSection]
    notes: Sequence[str] = field(default_factory=tuple)
