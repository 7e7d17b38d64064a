"""Where experts lived: what binds, before and after moves, how much each rank served, which experts each node held."""

import dataclasses
from typing import NamedTuple

import numpy as np

from hpcmoe.messages import format_ranges
from hpcmoe.placement.cost import count_replicas, make_nearest_shares, resource_seconds, tokens_on_ranks
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import list_resources, name_resource
from hpcmoe.report.page.contents import BarChart, Chart, ChartBar, DataTable, HeatMap, ReportSection
from hpcmoe.report.page.load import find_moves
from hpcmoe.report.page.numbers import format_short, group_cells, name_groups
from hpcmoe.report.page.recorded import RecordedRun, Series
from hpcmoe.report.placement_tables import MOST_NODE_ROWS, Rows

KIND_NAMES = {
    "link": "link", "egress": "node sends", "ingress": "node receives", "uplink_out": "rack uplink sends",
    "uplink_in": "rack uplink receives", "rank": "rank computes",
}  # fmt: skip
_MOST_SHARES = 3 * 10**7  # of nodes, slots and layers; of more, layers at even distances are evaluated
_SERVED_EDGES = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)  # of the mean rank's tokens
_MOST_CELLS = 64
_MOVES = {  # metric: (header, factor, digits)
    "moved": ("replicas moved", 1, 0),
    "moved_bytes": ("MB", 1e-6, 2),
    "move_seconds": ("ms it took", 1e3, 2),
    "move_seconds_predicted": ("ms predicted", 1e3, 2),
    "gain_seconds_predicted": ("ms to be gained", 1e3, 3),
}


class Evaluated(NamedTuple):
    """What one placement asks of every kind of resource, one way, in the layers that were evaluated."""

    busiest: dict[
        str, tuple[float, str]
    ]  # by kind: seconds of its busiest in each layer, summed; the most often busiest
    seconds: float  # of the busiest of all in each layer, summed
    served: np.ndarray  # [layers, ranks] tokens
    layers: list[int]


def make_living(run: RecordedRun) -> ReportSection | None:
    """Show where experts were; None where it is not recorded."""
    problem, first = run.problem, find_first(run)
    if problem is None or first is None:
        return None
    last = find_last(run)
    charts: list[Chart] = [chart_binding(run, problem, first)]
    tables = []
    before = evaluate_layout(problem, *first)
    if last is not None:
        after = evaluate_layout(problem, *last)
        charts.append(chart_moves(before, after))
        tables.append(table_of_moves(run))
        charts += [map_served(problem, before, "at the start"), map_served(problem, after, "at the end")]
    else:
        charts.append(map_served(problem, before, ""))
    tables += tables_of_nodes(problem, first[0], None if last is None else last[0])
    method = run.find_texts("cluster/placement")
    sampled = f" Evaluated: layers {format_ranges(before.layers)}." if len(before.layers) < problem.num_layers else ""
    return ReportSection(
        anchor="placement", title="Placement", charts=charts, tables=tables,
        sentence=f"Placed by {method[0] if method else 'an unknown method'}. A layer costs what its busiest resource "
        "takes, tokens one way or forward compute: that binds. No placement goes below the bound." + sampled,
    )  # fmt: skip


def find_first(run: RecordedRun) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Find the placement that the run began with -> (experts [L, S], shares [L, nodes, S] or None), if it fits."""
    layout = run.find_array("cluster/expert_of_replica", 2)
    return None if layout is None else check_layout(run.problem, layout, run.find_array("cluster/split", 3))


def find_last(run: RecordedRun) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Find the placement that the run ended with; None where nothing moved."""
    placed = run.find_series("cluster/migrated", 3) or run.find_series("cluster/adopted", 3)
    if placed is None or not find_moves(run):
        return None
    split = run.find_series("cluster/migrated_split", 4)
    return check_layout(run.problem, placed.values[-1], None if split is None else split.values[-1])


def check_layout(
    problem: PlacementProblem | None, layout: np.ndarray, split: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return a layout with its shares, or None where it is none of the problem's: records come from any version."""
    if (
        problem is None
        or not fits_together(problem)
        or layout.shape != (problem.num_layers, problem.num_ranks * problem.slots_per_rank)
    ):
        return None
    if not np.isfinite(layout).all() or layout.min() < -1 or layout.max() >= problem.num_experts:
        return None
    if any(len(np.unique(experts[experts >= 0])) < problem.num_experts for experts in layout):
        return None
    fits = split is not None and split.shape == (problem.num_layers, problem.num_nodes, layout.shape[1])
    return layout.astype(np.int64), split if fits else None


def fits_together(problem: PlacementProblem) -> bool:
    """Return True if a recorded problem's arrays have the sizes that they tell each other."""
    nodes, ranks, racks = problem.num_nodes, problem.num_ranks, len(problem.uplink_bytes_per_second)
    shapes = (
        (problem.bytes_per_second, (nodes, nodes)), (problem.latency_seconds, (nodes, nodes)),
        (problem.egress_bytes_per_second, (nodes,)), (problem.ingress_bytes_per_second, (nodes,)),
        (problem.tokens_of_rank, (ranks,)), (problem.probability, (problem.num_layers, nodes, problem.num_experts)),
    )  # fmt: skip
    places = ((problem.node_of_rank, nodes), (problem.rack_of_node, racks))
    in_range = all(array.min(initial=0) >= 0 and array.max(initial=0) < size for array, size in places)
    return bool(in_range and all(np.shape(array) == shape for array, shape in shapes))


def evaluate_layout(problem: PlacementProblem, layout: np.ndarray, split: np.ndarray | None) -> Evaluated:
    """Compute what a placement asks of the resources, layer by layer: few are in memory at a time."""
    # Choose the layers.
    most = max(1, _MOST_SHARES // max(problem.num_nodes * layout.shape[1], 1))
    layers = np.unique(np.linspace(0, problem.num_layers - 1, min(most, problem.num_layers)).astype(int)).tolist()

    # Sum the busiest of each kind, and of all.
    sums: dict[str, np.ndarray] = {}
    kinds, seconds, served = dict.fromkeys(list_resources(problem.objective), 0.0), 0.0, []
    for layer in layers:
        experts = layout[layer]
        shares = make_nearest_shares(problem, experts)
        if split is not None:
            shares = np.where(np.isnan(split[layer]), shares, split[layer])  # as recorded where all goes to the nearest
        busy = resource_seconds(problem, layer, experts, shares)
        for kind in kinds:
            kinds[kind] += float(busy[kind].max(initial=0.0))
            sums[kind] = sums.get(kind, 0.0) + busy[kind]
        seconds += max(float(busy[kind].max(initial=0.0)) for kind in kinds)
        served.append(tokens_on_ranks(problem, layer, experts, shares))
    return Evaluated({kind: (total, name_busiest(problem, kind, sums[kind])) for kind, total in kinds.items()}, seconds,
                     np.stack(served), layers)  # fmt: skip


def name_busiest(problem: PlacementProblem, kind: str, seconds: np.ndarray) -> str:
    """Name the resource of a kind that is busiest in all layers together; nothing where none is busy."""
    if not seconds.size or seconds.max() <= 0:
        return ""
    return name_resource(
        problem, kind, [int(index) for index in np.unravel_index(int(seconds.argmax()), seconds.shape)]
    )


def chart_binding(run: RecordedRun, problem: PlacementProblem, first: tuple[np.ndarray, np.ndarray | None]) -> BarChart:
    """Show each kind of resource against the bound, for the loads that the placement knew."""
    known = run.find_array("problem/probability", 3)
    shape = problem.num_layers, problem.num_nodes, problem.num_experts
    if known is not None and known.shape in (shape, (shape[0], 1, shape[2])):
        problem = dataclasses.replace(problem, probability=np.broadcast_to(known, shape))
    evaluated = evaluate_layout(problem, *first)
    bars = [
        ChartBar(name=KIND_NAMES[kind], parts=[("", 1e3 * seconds, 1 if is_largest(evaluated, seconds) else 5)])
        for kind, (seconds, _) in evaluated.busiest.items()
    ]
    bound = run.find_number("cluster/lower_bound_seconds")
    levels = [("lower bound", 1e3 * bound)] if bound and len(evaluated.layers) == problem.num_layers else []
    busiest = [f"{KIND_NAMES[kind]}: {name}" for kind, (_, name) in evaluated.busiest.items() if name]
    return BarChart(
        title="What binds, as placed at the start", unit="ms a step, busiest of each kind, layers summed", bars=bars,
        levels=levels,
        note=f"Objective {format_short(1e3 * evaluated.seconds)} ms. Busiest: {'; '.join(busiest) or '-'}.",
    )  # fmt: skip


def is_largest(evaluated: Evaluated, seconds: float) -> bool:
    """Return True if a kind's seconds are those that most of the objective is made of."""
    return seconds > 0 and seconds == max(total for total, _ in evaluated.busiest.values())


def chart_moves(before: Evaluated, after: Evaluated) -> BarChart:
    """Compare the kinds of resource before and after the run's moves, for the tokens that it routed."""
    bars = []
    for kind, (seconds, _) in before.busiest.items():
        bars.append(ChartBar(name=KIND_NAMES[kind], parts=[("before", 1e3 * seconds, 5)]))
        bars.append(ChartBar(name="", parts=[("after", 1e3 * after.busiest[kind][0], 0)]))
    note = f"Objective {format_short(1e3 * before.seconds)} ms before, {format_short(1e3 * after.seconds)} ms after."
    return BarChart(
        title="Before and after moves, for the tokens routed", unit="ms a step, layers summed", bars=bars, note=note
    )


def map_served(problem: PlacementProblem, evaluated: Evaluated, when: str) -> HeatMap:
    """Map the tokens that each rank serves in each layer, over the mean rank's."""
    served = evaluated.served.T  # [ranks, layers]
    ratio = served / np.maximum(served.mean(axis=0), 1e-300)
    values = group_cells(group_cells(ratio, _MOST_CELLS, 0), _MOST_CELLS, 1)
    ranks = len(ratio)
    names = [f"{rank} {problem.node_names[problem.node_of_rank[rank]]}" for rank in range(ranks)]
    note = "For the tokens routed in the run."
    if ranks > _MOST_CELLS:
        names = name_groups(ranks, _MOST_CELLS)
        note += f" {ranks} ranks in {len(names)} groups of neighbours, each cell the busiest rank of its group."
    groups = name_groups(len(evaluated.layers), _MOST_CELLS)
    if len(evaluated.layers) < problem.num_layers:
        groups = [f"{layer}" for layer in evaluated.layers][: len(groups)]
    return HeatMap(
        title="Tokens that each rank serves" + f", {when}" * bool(when), unit="over the mean rank's", values=values,
        edges=_SERVED_EDGES, x_label="layer", y_label="rank", x_names=groups, y_names=names, note=note,
        digits=2 if values.shape[1] <= 6 and ranks <= 16 else None,
    )  # fmt: skip


def table_of_moves(run: RecordedRun) -> DataTable:
    """List the migrations of a run."""
    found: dict[str, Series] = {}
    for name in _MOVES:
        if (series := run.find_series(f"cluster/{name}")) is not None:
            found[name] = series
    rows: Rows = []
    for step in find_moves(run):
        cells = [f"{step}"]
        for name, series in found.items():
            at = np.flatnonzero(series.steps == step)
            _, factor, digits = _MOVES[name]
            cells.append(f"{factor * series.values[at[0]]:.{digits}f}" if len(at) else "-")
        rows.append(tuple(cells))
    headers = ("step", *(_MOVES[name][0] for name in found))
    return DataTable(name="moves", title="Experts that moved", headers=headers, rows=rows, folded=len(rows) > 8)


def tables_of_nodes(problem: PlacementProblem, first: np.ndarray, last: np.ndarray | None) -> list[DataTable]:
    """List which experts of a layer each node held, at the start and at the end."""
    layer = 0 if last is None else int((first != last).sum(axis=1).argmax())  # the one that changed most
    counts = [count_replicas(problem, layout[layer]) for layout in (first, last) if layout is not None]  # [nodes, E]
    shown = range(min(problem.num_nodes, MOST_NODE_ROWS))
    rows = [
        (
            problem.node_names[node],
            f"{problem.rack_of_node[node]}",
            format_ranges(np.flatnonzero(problem.node_of_rank == node)),
            *(format_ranges(np.repeat(np.arange(problem.num_experts), count[node])) for count in counts),
        )
        for node in shown
    ]
    when = ("experts",) if last is None else ("experts at the start", "experts at the end")
    note = f"The first {MOST_NODE_ROWS} of {problem.num_nodes} nodes." if problem.num_nodes > MOST_NODE_ROWS else ""
    headers = ("node", "rack", "ranks", *when)
    title = f"Who lives where: layer {layer}"
    return [DataTable(name="nodes", title=title, headers=headers, rows=rows, note=note)]
