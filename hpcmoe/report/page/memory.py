"""The memory of a rank: as it was computed before anything was built, and as it was measured."""

import numpy as np

from hpcmoe.report.page.contents import BarChart, ChartBar, DataTable, ReportSection
from hpcmoe.report.page.recorded import RecordedRun
from hpcmoe.report.placement_tables import Rows

_MB = 1e6


def make_memory(run: RecordedRun) -> ReportSection | None:
    """Show the memory of a rank by what it holds; None where nothing of it is recorded."""
    rows = rows_of_parts(run)
    process = {
        "unshared memory (USS), mean of a node's ranks": run.find_number("run/unshared_bytes"),
        "resident set of the fullest process, at its peak": run.find_number("run/peak_resident_bytes"),
    }
    rows += [(name, "", f"{value / _MB:.1f}") for name, value in process.items() if value is not None]
    if not rows:
        return None
    tables = [
        DataTable(
            name="memory", title="Memory of a rank, MB", headers=("holds", "as computed", "as measured"), rows=rows
        )
    ]
    return ReportSection(
        anchor="memory", title="Memory", charts=[chart] if (chart := chart_parts(run)) else [], tables=tables,
        sentence="Computed before anything is built, for a rank with 2.25 times its even share of rows; measured on "
        "the fullest rank.",
    )  # fmt: skip


def find_parts(run: RecordedRun) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Find what memory holds -> (names, bytes computed [n], bytes measured [n]); empty where not recorded."""
    names = run.find_texts("memory/parts")
    computed, measured = (run.find_array(f"memory/{which}", 1) for which in ("computed_bytes", "measured_bytes"))
    if computed is None or measured is None or not len(names) == len(computed) == len(measured):
        return [], np.empty(0), np.empty(0)
    return names, computed.astype(float), measured.astype(float)


def rows_of_parts(run: RecordedRun) -> Rows:
    """List what memory holds, computed and measured."""
    return [(name, f"{a / _MB:.3f}", f"{b / _MB:.3f}") for name, a, b in zip(*find_parts(run), strict=True)]


def chart_parts(run: RecordedRun) -> BarChart | None:
    """Show all arrays of a rank as two bars, computed and measured."""
    names, computed, measured = find_parts(run)
    kept = [row for row, name in enumerate(names) if not name.startswith(("all ", "one expert", "the process"))]
    kept.sort(key=lambda row: -max(computed[row], measured[row]))
    if not kept:
        return None
    bars = [
        ChartBar(name=name, parts=[(names[row], values[row] / _MB, min(place, 7)) for place, row in enumerate(kept)])
        for name, values in (("computed", computed), ("measured", measured))
    ]
    return BarChart(title="Arrays of a rank", unit="MB", bars=bars)
