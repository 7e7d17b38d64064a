"""The report's tables as CSV, and every figure of every step that is one number."""

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np

from hpcmoe.report.page.contents import Report
from hpcmoe.report.page.recorded import RecordedRun


def list_spreadsheets(report: Report, runs: Sequence[RecordedRun]) -> Iterator[tuple[str, str]]:
    """Yield (name of a file, its text) of all tables, and of the steps of each run."""
    for section in report.sections:
        for table in section.tables:
            yield f"{table.name}.csv", format_csv([table.headers, *table.rows])
    for number, run in enumerate(runs):
        yield f"steps{f'-{number}' * (len(runs) > 1)}.csv", format_csv(rows_of_steps(run))


def format_csv(rows: Sequence[Sequence[object]]) -> str:
    """Format rows as CSV; a cell that a spreadsheet would compute is shown as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[quote_cell(cell) for cell in row] for row in rows])
    return text.getvalue()


def quote_cell(cell: object) -> object:
    """Add an apostrophe before what would be a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "@", "+", "\t") else cell


def rows_of_steps(run: RecordedRun) -> list[Sequence[object]]:
    """List each step with all figures that are one number; empty where a step has none."""
    found = {name: series for name in sorted(run.metrics) if (series := run.find_series(name)) is not None}
    steps = np.unique(np.concatenate([series.steps for series in found.values()] or [np.empty(0, np.int64)]))
    columns = []
    for series in found.values():
        column = np.full(len(steps), "", dtype=object)
        column[np.searchsorted(steps, series.steps)] = [f"{value:.9g}" for value in series.values.tolist()]
        columns.append(column)
    headers = [f"{name} ({series.unit})" if series.unit else name for name, series in found.items()]
    return [("step", *headers), *zip(steps.tolist(), *columns, strict=True)]
