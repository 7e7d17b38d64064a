"""What the links carried, against what they can give: between ranks, between nodes, and the busiest of all."""

from typing import NamedTuple

import numpy as np

from hpcmoe.report.page.contents import Chart, DataTable, HeatMap, ReportSection
from hpcmoe.report.page.numbers import format_short, group_cells, name_groups, round_to_few_digits
from hpcmoe.report.page.recorded import RecordedRun
from hpcmoe.report.placement_tables import Rows

_MOST_CELLS = 48  # rows and columns of a map
_MOST_WRITTEN = 8  # with figures in their cells
_MOST_BUSY = 16  # rows of the table
_USE_EDGES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0)  # % of what a link can give


class Carried(NamedTuple):
    """The bytes of all links between nodes, and what they can give."""

    names: list[str]  # of the nodes
    num_bytes: np.ndarray  # [nodes, nodes], of all measured steps
    seconds: float  # of these steps
    rates: np.ndarray | None  # [nodes, nodes] bytes/s that a link can give


def make_links_section(run: RecordedRun) -> ReportSection | None:
    """Show the bytes of every link; None where they are not recorded, as before a run's end."""
    of_ranks = run.find_array("comm/bytes_of_link", 2)
    if of_ranks is None or of_ranks.shape[0] != of_ranks.shape[1]:
        return None
    charts: list[Chart] = [
        map_bytes("Bytes from rank to rank", of_ranks, "rank", [f"{rank}" for rank in range(len(of_ranks))])
    ]
    tables = []
    if (carried := find_carried(run, of_ranks)) is not None and len(carried.names) > 1:
        if len(carried.names) < len(of_ranks):
            charts.append(map_bytes("Bytes from node to node", carried.num_bytes, "node", carried.names))
        if carried.rates is not None:
            charts.append(map_use(carried))
        tables.append(table_of_busiest(carried))
    source = run.find_pairs("cluster/source").get("links", "")
    from_where = f" What a link can give: {source}." if source else ""
    return ReportSection(
        anchor="links", title="Links", charts=charts, tables=tables,
        sentence="Experts' rows over each link in all measured steps, both ways, forward and backward; without sums of "
        "gradients. The diagonal is what a rank or node keeps to itself." + from_where,
    )  # fmt: skip


def find_carried(run: RecordedRun, of_ranks: np.ndarray) -> Carried | None:
    """Sum the bytes of ranks [P, P] by node -> Carried, None where it is not known where ranks were."""
    node_of_rank, names = run.node_of_rank, run.node_names
    if (
        len(node_of_rank) != len(of_ranks)
        or node_of_rank.min(initial=0) < 0
        or node_of_rank.max(initial=0) >= len(names)
    ):
        return None
    sums = np.zeros((len(names), len(names)))
    np.add.at(sums, (node_of_rank[:, None], node_of_rank[None]), np.nan_to_num(of_ranks))
    seconds, rates = run.find_series("run/seconds"), run.find_array("cluster/bytes_per_second", 2)
    total = float(seconds.values.sum()) if seconds is not None else 0.0
    return Carried(names, sums, max(total, 1e-9), rates if rates is not None and rates.shape == sums.shape else None)


def map_bytes(title: str, values: np.ndarray, what: str, names: list[str]) -> HeatMap:
    """Map bytes [n, n] in MB; neighbours are put together where they are too many, each cell their busiest link."""
    megabytes = values / 1e6
    most = float(np.nanmax(megabytes)) if np.isfinite(megabytes).any() else 0.0
    step = round_to_few_digits(most / 8) if most > 0 else 1.0
    edges = [round(step * number, 9) for number in range(1, 8)]
    return make_link_map(title, megabytes, "MB", what, names, edges)


def make_link_map(
    title: str, values: np.ndarray, unit: str, what: str, names: list[str], edges: list[float] | tuple[float, ...]
) -> HeatMap:
    """Map values of links [n, n]."""
    count = len(values)
    note = ""
    if count > _MOST_CELLS:
        names = name_groups(count, _MOST_CELLS)
        values = group_cells(group_cells(values, _MOST_CELLS, 0), _MOST_CELLS, 1)
        note = f"{count} {what}s in {len(names)} groups of neighbours, each cell the busiest link of its group."
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    digits = None if count > _MOST_WRITTEN else 0 if largest >= 100 else 1 if largest >= 10 else 2
    return HeatMap(
        title=title, unit=unit, values=values, edges=edges, x_label=f"to {what}", y_label=f"from {what}", x_names=names,
        y_names=names, note=note, digits=digits,
    )  # fmt: skip


def map_use(carried: Carried) -> HeatMap:
    """Map the share of what each link between nodes can give that the run took in the mean."""
    return make_link_map(
        "Used of what a link can give", 100 * find_use(carried), "%", "node", carried.names, _USE_EDGES
    )


def find_use(carried: Carried) -> np.ndarray:
    """Compute the share that the run took of each link [nodes, nodes]; NaN of a node itself."""
    assert carried.rates is not None
    rates = np.where(carried.rates > 0, carried.rates, np.nan)
    return np.where(np.eye(len(rates), dtype=bool), np.nan, carried.num_bytes / carried.seconds / rates)


def table_of_busiest(carried: Carried) -> DataTable:
    """List the links between nodes that were used most of what they can give, or carried most."""
    off = ~np.eye(len(carried.names), dtype=bool)
    share = find_use(carried) if carried.rates is not None else np.full(off.shape, np.nan)
    order = np.where(np.isfinite(share), share, 0.0) if carried.rates is not None else carried.num_bytes
    links = np.argwhere(off)
    links = links[np.argsort(-order[off], kind="stable")][:_MOST_BUSY]
    rows: Rows = [
        (
            f"{carried.names[i]} -> {carried.names[j]}",
            f"{carried.num_bytes[i, j] / 1e6:.2f}",
            f"{carried.num_bytes[i, j] / 1e6 / carried.seconds:.3f}",
            f"{carried.rates[i, j] / 1e6:.1f}" if carried.rates is not None else "-",
            f"{100 * share[i, j]:.2f} %" if np.isfinite(share[i, j]) else "-",
        )
        for i, j in links.tolist()
    ]
    title = "Busiest links between nodes" + f", {_MOST_BUSY} of {off.sum()}" * bool(off.sum() > _MOST_BUSY)
    headers = ("link", "MB carried", "MB/s, mean", "MB/s it can give", "used")
    note = "The mean is over whole steps; while rows travel, a link is busier."
    return DataTable(name="links", title=title, headers=headers, rows=rows, note=note)


def describe_busiest(run: RecordedRun) -> tuple[str, str] | None:
    """Write the largest use of any link between nodes, and which link; None where it is not known."""
    of_ranks = run.find_array("comm/bytes_of_link", 2)
    carried = find_carried(run, of_ranks) if of_ranks is not None and of_ranks.shape[0] == of_ranks.shape[1] else None
    if carried is None or carried.rates is None or len(carried.names) < 2:
        return None
    share = np.nan_to_num(find_use(carried))
    source, target = np.unravel_index(int(share.argmax()), share.shape)
    return format_short(100 * float(share.max())), f"{carried.names[source]} -> {carried.names[target]}"
