"""How evenly experts, ranks and links were used, step by step and layer by layer."""

import numpy as np

from hpcmoe.report.page.contents import Chart, DataTable, HeatMap, Line, LineChart, ReportSection
from hpcmoe.report.page.numbers import format_short, group_cells, group_evenly, name_groups
from hpcmoe.report.page.recorded import RecordedRun, Series

LOAD_EDGES = (0.5, 0.8, 1.25, 1.5, 2.0, 3.0, 4.0)  # of U_e; an even share lies in the third shade
_MOST_COLUMNS, _MOST_ROWS = 48, 64  # cells of a map
_MOST_LAYERS = 6  # with a map of their own
_MOST_HOT = 16  # experts in the table
_PERCENTILES = (1, 25, 50, 75, 99)


def make_load(run: RecordedRun) -> ReportSection | None:
    """Show the load of every expert over the steps; None where it is not recorded."""
    load = run.find_series("experts/utilisation", ndim=3)
    if load is None:
        return None
    shown = choose_layers(load)
    charts: list[Chart] = [chart_percentiles(load), map_layers(load)]
    charts += [map_layer(load, layer) for layer in shown]
    num_layers, num_experts = load.values.shape[1:]
    left_out = f" Of {num_layers} layers those {len(shown)} whose hottest expert is hottest have a map of their own."
    return ReportSection(
        anchor="experts", title="Expert load", charts=charts,
        tables=[table_of_layers(run, load), table_of_hottest(load)],
        sentence="U_e is an expert's tokens over what an even router would give it: 1 is even, 2 is twice its share. "
        f"The rank that holds the hottest works longest. {num_experts} experts in each layer."
        + left_out * (num_layers > len(shown)),
    )  # fmt: skip


def choose_layers(load: Series) -> list[int]:
    """Choose the layers that have a map: those whose hottest expert is hottest in the mean of the steps, in order."""
    hottest = np.nan_to_num(load.values.mean(axis=0).max(axis=1))
    return sorted(np.argsort(-hottest, kind="stable")[:_MOST_LAYERS].tolist())


def chart_percentiles(load: Series) -> LineChart:
    """Show the spread of all layers' experts over the steps."""
    flat = load.values.reshape(len(load.steps), -1)
    low, lower, middle, upper, high = np.nanpercentile(flat, _PERCENTILES, axis=1)
    x = load.steps
    lines = [
        Line(name="1 - 99 %", x=x, y=low, upper=high, colour=5),
        Line(name="25 - 75 %", x=x, y=lower, upper=upper, colour=0),
        Line(name="median", x=x, y=middle, colour=7),
        Line(name="hottest", x=x, y=np.nanmax(flat, axis=1), colour=1),
    ]
    return LineChart(
        title="Load of all experts, percentiles", unit="U_e", lines=lines, levels=[("even", 1.0)], from_zero=True
    )


def map_layers(load: Series) -> HeatMap:
    """Map the hottest expert of each layer over the steps."""
    return make_map("Hottest expert of each layer", load.values.max(axis=2).T, load.steps, "layer", ".")


def map_layer(load: Series, layer: int) -> HeatMap:
    """Map the experts of one layer over the steps."""
    return make_map(f"Layer {layer}: its experts", load.values[:, layer].T, load.steps, "expert", ".")


def make_map(title: str, values: np.ndarray, steps: np.ndarray, what: str, end: str) -> HeatMap:
    """Map U_e [rows, steps]; neighbours are put together where they are too many, each cell their largest."""
    rows, columns = values.shape
    starts = steps[group_evenly(columns, _MOST_COLUMNS)]
    grouped = group_cells(group_cells(values, _MOST_ROWS, 0), _MOST_COLUMNS, 1)
    cut = [f"{count} {noun}s" for count, most, noun in ((rows, _MOST_ROWS, what), (columns, _MOST_COLUMNS, "step"))
           if count > most]  # fmt: skip
    note = f"{' and '.join(cut)} in groups of neighbours, each cell the largest of its group{end}" if cut else ""
    return HeatMap(
        title=title, unit="U_e", values=grouped, edges=LOAD_EDGES, x_label="step", y_label=what,
        x_names=[f"{step}" for step in starts], y_names=name_groups(rows, _MOST_ROWS), note=note,
    )  # fmt: skip


def table_of_layers(run: RecordedRun, load: Series) -> DataTable:
    """List percentiles of the experts' mean load, balancedness, sigma and its floor of each layer."""
    mean = load.values.mean(axis=0)  # [L, E]
    columns = [np.percentile(mean, q, axis=1) for q in (0, 1, 25, 50, 75, 99, 100)]
    balance, sigma = (
        run.find_series(name, 2) for name in ("experts/balancedness_of_layer", "dispatch/link_sigma_of_layer")
    )
    floor = run.find_array("dispatch/link_sigma_floor_of_layer", 1)
    others = [None if series is None else series.values.mean(axis=0) for series in (balance, sigma)] + [floor]
    columns += [np.full(len(mean), np.nan) if each is None or len(each) != len(mean) else each for each in others]
    rows = [
        (f"{layer}", *(f"{column[layer]:.3f}" if np.isfinite(column[layer]) else "-" for column in columns),
         f"{mean[layer].argmax()}")
        for layer in range(len(mean))
    ]  # fmt: skip
    headers = ("layer", "least", "1 %", "25 %", "median", "75 %", "99 %", "most", "balancedness", "sigma", "its floor",
               "hottest expert")  # fmt: skip
    title = "Each layer: U_e of its experts, mean of the steps, and how even its ranks and links were"
    return DataTable(name="layers", title=title, headers=headers, rows=rows, folded=len(rows) > 8)


def table_of_hottest(load: Series) -> DataTable:
    """List the hottest experts of all layers."""
    mean, most = load.values.mean(axis=0), load.values.max(axis=0)
    order = np.argsort(-mean, axis=None, kind="stable")[:_MOST_HOT]
    rows = []
    for layer, expert in zip(*np.unravel_index(order, mean.shape), strict=True):
        last = load.values[-1, layer, expert]
        figures = (mean[layer, expert], last, most[layer, expert])
        when = f"{load.steps[load.values[:, layer, expert].argmax()]}"
        rows.append((f"{layer}", f"{expert}", *(f"{figure:.3f}" for figure in figures), when))
    headers = ("layer", "expert", "U_e, mean", "last step", "most", "at step")
    return DataTable(name="hottest", title="Hottest experts", headers=headers, rows=rows, folded=True)


def make_balance(run: RecordedRun) -> ReportSection | None:
    """Show how even the ranks' work and the links' tokens were; None where neither is recorded."""
    balance, sigma = run.find_series("experts/balancedness"), run.find_series("dispatch/link_sigma")
    charts = []
    if balance is not None:
        charts.append(chart_balancedness(run, balance))
    if sigma is not None:
        charts.append(chart_sigma(run, sigma))
    dropped = run.find_series("dispatch/dropped")
    if dropped is not None and dropped.values.any():
        line = Line(name="", x=dropped.steps, y=dropped.values)
        charts.append(
            LineChart(title="Assignments over capacity, dropped", unit="assignments", lines=[line], from_zero=True)
        )
    if not charts:
        return None
    return ReportSection(
        anchor="balance", title="Balance", charts=charts,
        sentence="Balancedness is mean / max of the tokens that ranks serve: 1 is even, its inverse how much longer "
        "the experts' work takes than if it were. Sigma is std / mean of the tokens of the links between ranks.",
    )  # fmt: skip


def chart_balancedness(run: RecordedRun, balance: Series) -> LineChart:
    """Show balancedness, with the least of any layer, and where experts moved."""
    lines = [Line(name="all layers", x=balance.steps, y=balance.values)]
    of_layer = run.find_series("experts/balancedness_of_layer", ndim=2)
    if of_layer is not None and of_layer.values.shape[1] > 1:
        lines.append(Line(name="least of any layer", x=of_layer.steps, y=of_layer.values.min(axis=1), colour=5))
    return LineChart(
        title="Balancedness of the ranks", unit="mean / max tokens", lines=lines, levels=[("even", 1.0)],
        from_zero=True, marks=find_moves(run), mark_name="experts moved",
    )  # fmt: skip


def chart_sigma(run: RecordedRun, sigma: Series) -> LineChart:
    """Show the link balance with its floor and its aim."""
    levels = [
        ("sampling floor", run.find_number("dispatch/link_sigma_floor")),
        ("aim", run.find_number("dispatch/link_sigma_aim")),
    ]
    return LineChart(
        title="Link balance, sigma", unit="std / mean of a step's tokens per link", from_zero=True,
        lines=[Line(name="all layers", x=sigma.steps, y=sigma.values)],
        levels=[(name, level) for name, level in levels if level is not None], marks=find_moves(run),
        mark_name="experts moved", note="The floor is an even router's, since a step's tokens are finitely many.",
    )  # fmt: skip


def find_moves(run: RecordedRun) -> list[int]:
    """Find the steps at which experts moved: the first placement is none."""
    for name in ("cluster/migrated", "cluster/adopted"):
        if (placed := run.find_series(name, ndim=3)) is not None:
            return placed.steps[1:].tolist()
    return []


def describe_hottest(load: Series) -> tuple[str, str]:
    """Write the load of the hottest expert in the mean of the steps, and which it is."""
    mean = load.values.mean(axis=0)
    layer, expert = np.unravel_index(int(np.nanargmax(np.nan_to_num(mean))), mean.shape)
    return format_short(float(mean[layer, expert])), f"expert {expert} of layer {layer}"
