"""What a run learned and how fast: loss, gradient, throughput, and where a step's seconds went."""

import numpy as np

from hpcmoe.report.page.contents import BarChart, Chart, ChartBar, DataTable, Line, LineChart, ReportSection
from hpcmoe.report.page.numbers import format_short
from hpcmoe.report.page.recorded import RecordedRun, Series
from hpcmoe.report.placement_tables import Rows

STAGE_COLOURS = {  # of a step, in its order: colour
    "data": 6, "dense": 0, "route": 2, "dispatch": 1, "compute": 5, "combine": 4, "optimizer": 3, "waiting": 7,
}  # fmt: skip
_SMOOTHED = 0.05  # of the steps are averaged for the curve of throughput


def make_learning(run: RecordedRun) -> ReportSection | None:
    """Show losses, the gradients' norm and the learning rate; None of a run that learns nothing."""
    loss, validation = run.find_series("train/loss"), run.find_series("train/validation_loss")
    if loss is None:
        return None
    lines = [Line(name="training", x=loss.steps, y=loss.values)]
    if validation is not None:
        lines.append(Line(name="validation", x=validation.steps, y=validation.values, colour=1, points=True))
    charts: list[Chart] = [LineChart(title="Loss", unit=loss.unit, lines=lines)]
    for name, title, unit in (("gradient_norm", "Gradient norm, before clipping", "norm"),
                              ("learning_rate", "Learning rate", "rate")):  # fmt: skip
        if (series := run.find_series(f"train/{name}")) is not None:
            line = Line(name="", x=series.steps, y=series.values)
            charts.append(LineChart(title=title, unit=series.unit or unit, lines=[line], from_zero=True))
    return ReportSection(
        anchor="learning", title="Learning", charts=charts, tables=[table_of_losses(loss, validation)],
        sentence="The loss of each step's own batch scatters; that of the validation sequences, always the same, "
        "shows what was learned.",
    )  # fmt: skip


def table_of_losses(loss: Series, validation: Series | None) -> DataTable:
    """List the losses at their first, least and last."""
    rows: Rows = []
    for name, series in (("training", loss), ("validation", validation)):
        if series is not None and np.isfinite(series.values).any():
            least = int(np.nanargmin(np.where(np.isfinite(series.values), series.values, np.nan)))
            first, last = (f"{series.values[row]:.4f}" for row in (0, -1))
            rows.append((name, first, f"{series.values[least]:.4f} at step {series.steps[least]}", last))
    return DataTable(name="losses", title=f"Losses, {loss.unit}", headers=("", "first", "least", "last"), rows=rows)


def make_speed(run: RecordedRun) -> ReportSection | None:
    """Show throughput and the seconds of a step; None where neither is recorded."""
    rate, stages, seconds = run.find_series("run/tokens_per_second"), find_stages(run), run.find_series("run/seconds")
    if seconds is None or rate is None:
        return None
    charts: list[Chart] = [
        LineChart(title="Throughput", unit="tokens/s", from_zero=True, lines=lines_of_rate("", rate))
    ]
    if stages:
        mean = ChartBar(
            name="mean", parts=[(name, 1e3 * values.mean(), STAGE_COLOURS[name]) for name, values in stages.items()]
        )
        slow = seconds.values.argsort()[-max(1, len(seconds.values) // 20) :]  # by the clock of rank 0
        parts = [(name, 1e3 * values[slow].mean(), STAGE_COLOURS[name]) for name, values in stages.items()]
        bars = [mean, ChartBar(name="slowest 5 %", parts=parts)]
        charts.append(BarChart(title="Where a step's seconds go", unit="ms, mean of the ranks", bars=bars))
        lines = [Line(name=name, x=seconds.steps, y=1e3 * average(values), colour=STAGE_COLOURS[name])
                 for name, values in stages.items()]  # fmt: skip
        charts.append(LineChart(title="Seconds of a step, by step", unit="ms", lines=lines, stacked=True,
                                note=f"Averages of {window_of(len(seconds.steps))} steps."))  # fmt: skip
    if (predicted := find_predicted(run)) is not None:
        charts.append(chart_prediction(run, predicted, seconds))
    return ReportSection(
        anchor="speed", title="Speed", charts=charts, tables=[table_of_stages(seconds, stages)],
        sentence="Dense and compute are the model's own work; dispatch, combine and waiting are what the exchange and "
        "unevenness leave uncovered by it.",
    )  # fmt: skip


def find_stages(run: RecordedRun) -> dict[str, np.ndarray]:
    """Find the seconds of each stage by step, those of all stages that were recorded as often as the steps."""
    seconds = run.find_series("run/seconds")
    found = {name: run.find_series(f"run/seconds_{name}") for name in STAGE_COLOURS}
    return {
        name: np.nan_to_num(series.values)
        for name, series in found.items()
        if series is not None
        and seconds is not None
        and len(series.values) == len(seconds.values)
        and series.values.any()
    }


def find_predicted(run: RecordedRun) -> float | None:
    """Find the seconds of a step that were predicted before the run, None where there is no prediction."""
    names = (name for name in run.values if "predicted" in name and "step" in name)
    return next((value for name in names if (value := run.find_number(name))), None)


def chart_prediction(run: RecordedRun, predicted: float, seconds: Series) -> BarChart:
    """Compare the predicted seconds of a step with the measured."""
    median = float(np.median(seconds.values))
    bars = [
        ChartBar(name="predicted", parts=[("", 1e3 * predicted, 5)]),
        ChartBar(name="measured", parts=[("", 1e3 * median, 0)]),
    ]
    note = f"The median step took {median / predicted:.2f} x what was predicted."
    return BarChart(title="Step as predicted and measured", unit="ms", bars=bars, note=note)


def lines_of_rate(name: str, rate: Series, colour: int = 0) -> list[Line]:
    """Make the curve of throughput, and a thin average over it where steps are many."""
    x, mean = rate.steps, average(rate.values)
    if window_of(len(x)) == 1:
        return [Line(name=name, x=x, y=rate.values, colour=colour)]
    return [
        Line(name=f"{name}, each step" if name else "each step", x=x, y=rate.values, colour=7),
        Line(name=name or f"average of {window_of(len(x))} steps", x=x, y=mean, colour=colour),
    ]


def window_of(count: int) -> int:
    """Return over how many of so many steps curves are averaged."""
    return max(1, int(count * _SMOOTHED))


def average(values: np.ndarray) -> np.ndarray:
    """Average each value with its neighbours; at both ends with those that there are."""
    window = np.ones(window_of(len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def table_of_stages(seconds: Series, stages: dict[str, np.ndarray]) -> DataTable:
    """List the seconds of each stage, and of the whole step by the clock of rank 0."""
    parts = {"step": seconds.values, **stages}
    rows = [
        (
            name,
            f"{1e3 * values.mean():.2f}",
            *(f"{1e3 * np.percentile(values, q):.2f}" for q in (50, 95)),
            f"{1e3 * values.max():.2f}",
            f"{100 * values.mean() / max(seconds.values.mean(), 1e-12):.1f} %",
        )
        for name, values in parts.items()
    ]
    headers = ("stage", "mean, ms", "median", "95 %", "most", "share of the step")
    return DataTable(
        name="stages", title=f"A step's seconds, of {len(seconds.steps)} steps", headers=headers, rows=rows
    )


def describe_exposed(stages: dict[str, np.ndarray], seconds: Series) -> str:
    """Write the share of a step that goes into dispatch, combine and waiting."""
    spent = sum(stages[name].sum() for name in ("dispatch", "combine", "waiting") if name in stages)
    return format_short(100 * spent / max(seconds.values.sum(), 1e-12))
