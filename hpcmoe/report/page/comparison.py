"""Several runs beside each other: what differs, curves over each other, and ratios to the first."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hpcmoe.report.page.contents import BarChart, Chart, ChartBar, DataTable, HeatMap, Line, LineChart, ReportSection
from hpcmoe.report.page.inputs import describe_place, read_all_keys
from hpcmoe.report.page.links import find_carried, map_bytes
from hpcmoe.report.page.load import find_moves, map_layers
from hpcmoe.report.page.memory import find_parts
from hpcmoe.report.page.numbers import format_short
from hpcmoe.report.page.recorded import RecordedRun
from hpcmoe.report.page.training import STAGE_COLOURS, average, find_predicted, find_stages, window_of
from hpcmoe.report.placement_tables import Rows

_MOST_MAPS = 4  # of each kind
_FEW = 12  # values of a curve that are marked
_CURVES = {  # anchor: (title, sentence, ((metric, title, unit, from zero), ...))
    "learning": ("Learning", "Losses of the same steps can be compared where data and batch are the same.", (
        ("train/loss", "Training loss", "", False),
        ("train/validation_loss", "Validation loss", "", False),
        ("train/gradient_norm", "Gradient norm, before clipping", "norm", True),
    )),
    "speed": ("Speed", "Throughput of all ranks together, and where a mean step's seconds go.", (
        ("run/tokens_per_second", "Throughput", "", True),
    )),
    "balance": ("Balance", "Balancedness is mean / max of the tokens of ranks, sigma is std / mean of the links'.", (
        ("experts/balancedness", "Balancedness of the ranks", "mean / max tokens", True),
        ("dispatch/link_sigma", "Link balance, sigma", "std / mean", True),
    )),
}  # fmt: skip


def compare_runs(runs: Sequence[RecordedRun]) -> list[ReportSection]:
    """Compare runs, the first being what ratios are taken to."""
    sections = [make_ratios(runs), make_differences(runs)]
    for anchor, (title, sentence, metrics) in _CURVES.items():
        charts: list[Chart] = [chart for metric in metrics if (chart := overlay(runs, *metric)) is not None]
        if anchor == "speed":
            charts += charts_of_seconds(runs)
        if charts:
            sections.append(ReportSection(anchor=anchor, title=title, sentence=sentence, charts=charts))
    return [*sections, *sections_of_maps(runs)]


def overlay(runs: Sequence[RecordedRun], name: str, title: str, unit: str, from_zero: bool) -> LineChart | None:
    """Draw the curves of a metric over each other; None where no run has it."""
    lines = []
    for number, run in enumerate(runs):
        if (series := run.find_series(name)) is not None:
            few, unit = len(series.steps) <= _FEW, unit or series.unit
            values = average(series.values) if name == "run/tokens_per_second" else series.values
            lines.append(
                Line(name=run.name, x=series.steps, y=values, colour=number % 8, points=few, dashed=number % 2 == 1)
            )
    smoothed = max((window_of(len(line.x)) for line in lines), default=1) if name == "run/tokens_per_second" else 1
    note = f"Averages of {smoothed} steps." if smoothed > 1 else ""
    return LineChart(title=title, unit=unit, lines=lines, from_zero=from_zero, note=note) if lines else None


def charts_of_seconds(runs: Sequence[RecordedRun]) -> list[Chart]:
    """Show where a mean step's seconds go in each run."""
    bars = [
        ChartBar(
            name=run.name,
            parts=[(name, 1e3 * values.mean(), STAGE_COLOURS[name]) for name, values in find_stages(run).items()],
        )
        for run in runs
    ]
    bars = [bar for bar in bars if bar.parts]
    return [BarChart(title="Where a mean step's seconds go", unit="ms, mean of the ranks", bars=bars)] if bars else []


def sections_of_maps(runs: Sequence[RecordedRun]) -> list[ReportSection]:
    """Show the maps of each run beside each other: the hottest experts of each layer, bytes of links."""
    loads = [(run, load) for run in runs if (load := run.find_series("experts/utilisation", 3)) is not None][
        :_MOST_MAPS
    ]
    maps: list[HeatMap] = []
    for run in runs:
        of_ranks = run.find_array("comm/bytes_of_link", 2)
        if of_ranks is not None and (carried := find_carried(run, of_ranks)) is not None:
            maps.append(map_bytes(f"{run.name}: bytes from node to node", carried.num_bytes, "node", carried.names))
    sections = []
    if loads:
        charts = [rename_map(map_layers(load), run.name) for run, load in loads]
        sentence = "U_e of the hottest expert of each layer: its tokens over what an even router would give it."
        sections.append(ReportSection(anchor="experts", title="Expert load", sentence=sentence, charts=charts))
    if maps:
        sentence = "Experts' rows over the links between nodes in all measured steps; each map has a scale of its own."
        sections.append(ReportSection(anchor="links", title="Links", sentence=sentence, charts=maps[:_MOST_MAPS]))
    return sections


def rename_map(chart: HeatMap, name: str) -> HeatMap:
    """Name the run of a map."""
    return HeatMap(
        **{key: getattr(chart, key) for key in chart.__slots__} | {"title": f"{name}: {chart.title.lower()}"}
    )


def make_ratios(runs: Sequence[RecordedRun]) -> ReportSection:
    """List figures of all runs, and their ratios to the first's."""
    rows: Rows = []
    for name, unit, find in _FIGURES:
        found = [find(run) for run in runs]
        if any(value is not None for value in found):
            shown = ["-" if value is None else format_short(value) for value in found]
            ratios = ["-" if not value or not found[0] else f"{value / found[0]:.3f}" for value in found[1:]]
            rows.append((name, unit, *shown, *ratios))
    names = [run.name for run in runs]
    headers = ("figure", "unit", *names, *(f"{name} / {names[0]}" for name in names[1:]))
    table = DataTable(name="ratios", title="Figures and ratios", headers=headers, rows=rows)
    sentence = f"Ratios are to {names[0]}: above 1 a run has more of it."
    return ReportSection(anchor="ratios", title="Ratios", sentence=sentence, tables=[table])


def mean_of(name: str, factor: float = 1.0) -> Callable[[RecordedRun], float | None]:
    """Make a function that finds the mean of a metric over the steps."""

    def find(run: RecordedRun) -> float | None:
        series = run.find_series(name)
        return None if series is None else factor * float(np.nanmean(series.values))

    return find


def last_of(name: str) -> Callable[[RecordedRun], float | None]:
    """Make a function that finds a metric's last value."""

    def find(run: RecordedRun) -> float | None:
        series = run.find_series(name)
        return None if series is None else float(series.values[-1])

    return find


def find_rate(run: RecordedRun) -> float | None:
    """Find the tokens per second of a whole run, of one under way the mean of its steps."""
    return run.find_number("run/tokens_per_second_overall") or mean_of("run/tokens_per_second")(run)


def find_hottest(run: RecordedRun) -> float | None:
    """Find the load of the hottest expert in the mean of the steps."""
    load = run.find_series("experts/utilisation", 3)
    return None if load is None else float(np.nan_to_num(load.values.mean(axis=0)).max())


def find_sum(name: str) -> Callable[[RecordedRun], float | None]:
    """Make a function that sums an array of the whole run, but for its diagonal, in MB."""

    def find(run: RecordedRun) -> float | None:
        array = run.find_array(name, 2)
        return None if array is None else float(array.sum() - np.trace(array)) / 1e6

    return find


def find_measured_memory(run: RecordedRun) -> float | None:
    """Find the MB of all arrays of the fullest rank."""
    names, _, measured = find_parts(run)
    return next((float(size) / 1e6 for name, size in zip(names, measured, strict=True) if name == "all of these"), None)


def scale_number(name: str, factor: float) -> Callable[[RecordedRun], float | None]:
    """Make a function that finds a number of the whole run in another unit."""

    def find(run: RecordedRun) -> float | None:
        value = run.find_number(name)
        return None if value is None else factor * value

    return find


_FIGURES: tuple[tuple[str, str, Callable[[RecordedRun], float | None]], ...] = (
    ("steps", "", lambda run: float(run.num_steps)),
    ("tokens per second", "tokens/s", find_rate),
    ("time per step, mean", "ms", mean_of("run/seconds", 1e3)),
    *((f"  in {name}", "ms", mean_of(f"run/seconds_{name}", 1e3)) for name in STAGE_COLOURS),
    ("predicted step", "ms", lambda run: None if (value := find_predicted(run)) is None else 1e3 * value),
    ("training loss, last", "nats", last_of("train/loss")),
    ("validation loss, last", "nats", last_of("train/validation_loss")),
    ("hottest expert", "U_e", find_hottest),
    ("balancedness, mean", "mean/max", mean_of("experts/balancedness")),
    ("sigma, mean", "std/mean", mean_of("dispatch/link_sigma")),
    ("its sampling floor", "std/mean", scale_number("dispatch/link_sigma_floor", 1)),
    ("transfers hidden", "%", scale_number("comm/hidden_share", 100)),
    ("between ranks", "MB", find_sum("comm/bytes_of_link")),
    ("placement's objective", "ms", scale_number("cluster/objective_seconds", 1e3)),
    ("experts moved", "times", lambda run: float(len(find_moves(run)))),
    ("arrays of the fullest rank", "MB", find_measured_memory),
    ("resident set at its peak", "MB", scale_number("run/peak_resident_bytes", 1e-6)),
)


def make_differences(runs: Sequence[RecordedRun]) -> ReportSection:
    """List what differs between runs in config, versions and cluster."""
    tables = [
        table_of_differences("config", "Config", [read_all_keys(run) for run in runs], runs),
        table_of_differences("versions", "Versions", [run.find_pairs("run/versions") for run in runs], runs),
        table_of_differences("cluster", "Cluster", [describe_place(run) for run in runs], runs),
    ]
    sentence = "Keys that a run's file leaves out stand at their defaults of today. What is alike is not listed."
    return ReportSection(anchor="differences", title="Differences", sentence=sentence, tables=tables)


def table_of_differences(
    name: str, title: str, found: Sequence[Mapping[str, str]], runs: Sequence[RecordedRun]
) -> DataTable:
    """List the keys that have not the same value in all runs."""
    keys = dict.fromkeys(key for values in found for key in values)
    rows: Rows = [
        (key, *(values.get(key, "-") for values in found))
        for key in keys
        if len({values.get(key) for values in found}) > 1
    ]
    note = "" if rows else "No difference."
    return DataTable(name=name, title=title, headers=("", *(run.name for run in runs)), rows=rows, note=note)
