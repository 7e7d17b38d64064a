"""The tables of a placement: its figures, its nodes, what is busiest and what binds; short for any cluster."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from tabulate import tabulate

from hpcmoe.messages import format_ranges, format_size
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import name_resource
from hpcmoe.placement.result import Placement, Usage

MOST_NODE_ROWS = 16  # rows of the table of nodes; of a larger cluster those that serve most
_MOST_BUSY = 4  # rows of each kind of resource
_MOST_OFTEN = 2  # resources named in a row of what binds
Rows = list[tuple[str, ...]]
KINDS = {
    "link": "link", "egress": "port", "ingress": "port", "uplink_out": "uplink", "uplink_in": "uplink", "rank": "rank",
}  # fmt: skip


def make_placement_tables(
    problem: PlacementProblem, placement: Placement, usage: Usage, rivals: Mapping[str, float | None], layer: int
) -> str:
    """Format a placement, what it uses, and the seconds of other methods, None where they do not fit -> text.

    The table of nodes shows the experts of one layer.
    """
    parts = [
        (rows_of_figures(problem, placement, usage, rivals, layer), ("figure", "value", "unit")),
        (rows_of_nodes(problem, usage, layer), headers_of_nodes(layer)),
        (rows_of_busiest(problem, usage), ("busiest", "", "ms a step", "ms, worst layer", "layer")),
        (rows_of_binding(problem, usage), ("what binds", "layers", "ms a step", "most often")),
    ]
    return "\n\n".join(
        tabulate(rows, headers=headers, disable_numparse=True, preserve_whitespace=True)
        for rows, headers in parts
        if rows
    )


def rows_of_figures(
    problem: PlacementProblem, placement: Placement, usage: Usage, rivals: Mapping[str, float | None], layer: int
) -> Rows:
    """List the cost of the placement as a whole, and of others."""
    # Count what is placed where.
    layers, other = problem.num_layers, (placement.expert_of_replica != placement.expert_of_replica[layer]).any(axis=1)
    slots = f"of {plural(layers, 'layer')}, {plural(problem.slots_per_rank, 'slot')} a rank"
    nodes = f"of {plural(problem.num_nodes, 'node')} in {plural(len(set(problem.rack_of_node)), 'rack')}"

    # Compare the cost with its bound and with other methods.
    cost, bound = placement.objective_seconds, placement.lower_bound_seconds
    rows = [
        ("placed", plural(problem.num_experts, "expert"), slots),
        ("on", plural(problem.num_ranks, "rank"), nodes),
        (f"objective {problem.objective}", in_ms(cost), "ms a step, one way, the slowest part of each layer"),
        ("  lower bound", in_ms(bound), format_gap(placement)),
    ]
    for method, seconds in rivals.items():
        ratio = f"ms; {seconds / cost:.3f} x the objective" if seconds and cost else "ms"
        rows.append((f"  {method}", *(("-", "does not fit") if seconds is None else (in_ms(seconds), ratio))))
    of_rank = usage.served.sum(axis=0)
    return [
        *rows,
        ("cross-node share", f"{placement.cross_node_share:.3f}", "of all assignments"),
        ("sigma of links", f"{placement.link_sigma:.3f}", "std/mean of tokens per link between nodes"),
        ("busiest rank", f"{of_rank.max() / max(of_rank.mean(), 1e-300):.3f}", "of the mean rank's tokens"),
        ("search", f"{placement.search_stats.seconds:.2f}", f"s, {placement.search_stats.num_proposals} proposals"),
        (f"layers unlike layer {layer}", f"{other.sum()}", f"of {layers} have their experts elsewhere"),
    ]


def format_gap(placement: Placement) -> str:
    """Format how far a placement is from its lower bound."""
    cost, bound = placement.objective_seconds, placement.lower_bound_seconds
    if placement.is_optimal:
        return "ms; met: optimal"
    return f"ms; the objective is {100 * (cost / bound - 1):.2f} % above" if bound > 0 else "ms; tells nothing here"


def headers_of_nodes(layer: int) -> tuple[str, ...]:
    """Name the columns of the table of nodes."""
    return ("node", "rack", "ranks", f"experts of layer {layer}", "replicas", "memory used", "of", "tokens", "x mean")


def rows_of_nodes(problem: PlacementProblem, usage: Usage, layer: int) -> Rows:
    """List the nodes: their experts of one layer, replicas and memory of all layers, tokens served in all layers."""
    # Choose the nodes to show.
    tokens = usage.tokens.sum(axis=(0, 1))  # [nodes]
    replicas = usage.replicas.sum(axis=(0, 2))
    shown = np.arange(problem.num_nodes)
    if len(shown) > MOST_NODE_ROWS:
        shown = np.argsort(-tokens, kind="stable")[:MOST_NODE_ROWS]

    # List them, and the mean of the others.
    rows: Rows = [
        (
            problem.node_names[node],
            f"{problem.rack_of_node[node]}",
            f"{problem.ranks_of_node[node]}",
            format_ranges(np.repeat(np.arange(problem.num_experts), usage.replicas[layer, node])),
            f"{replicas[node]}",
            format_size(int(replicas[node] * problem.expert_bytes)),
            format_size(int(problem.memory_bytes[node])),
            f"{tokens[node]:.0f}",
            f"{tokens[node] / max(tokens.mean(), 1e-300):.3f}",
        )
        for node in shown
    ]
    left = np.setdiff1d(np.arange(problem.num_nodes), shown)
    if len(left) > 0:
        mean = f"{tokens[left].mean():.0f}", f"{tokens[left].mean() / max(tokens.mean(), 1e-300):.3f}"
        what = "each at most as many tokens; mean"
        rows.append((f"{len(left)} others", "", "", what, f"{replicas[left].mean():.0f}", "", "", *mean))
    return rows


def rows_of_busiest(problem: PlacementProblem, usage: Usage) -> Rows:
    """List the busiest few of each kind of resource, by their seconds over all layers."""
    rows: Rows = []
    for kind in dict.fromkeys(KINDS.values()):
        # Sort the resources of this kind.
        found: list[tuple[float, str, tuple[int, ...]]] = []
        for name, seconds in usage.seconds.items():
            if KINDS[name] == kind:
                found += [(total, name, index) for index, total in np.ndenumerate(seconds.sum(axis=0)) if total > 0]
        found.sort(key=lambda entry: -entry[0])

        # List the first, each with its worst layer.
        for total, name, index in found[:_MOST_BUSY]:
            of_layer = np.array([seconds[index] for seconds in usage.seconds[name]])  # [L]
            worst = int(of_layer.argmax())
            rows.append((kind, name_resource(problem, name, index), in_ms(total), in_ms(of_layer[worst]), f"{worst}"))
    return rows


def rows_of_binding(problem: PlacementProblem, usage: Usage) -> Rows:
    """List the kinds of resource that bind: in how many layers, what these cost, and which do most often.

    A layer in which several kinds are equally busy counts for the first of them.
    """
    # Group the layers by the kind that binds.
    seconds = usage.layer_seconds
    layers_of_kind: dict[str, list[tuple[int, list]]] = {}
    for layer in range(problem.num_layers):
        if binding := usage.list_binding(layer):
            layers_of_kind.setdefault(KINDS[binding[0][0]], []).append((layer, binding))

    # Count how often each resource binds.
    rows: Rows = []
    for kind, layers in layers_of_kind.items():
        names = Counter(name_resource(problem, *resource) for _, binding in layers for resource in binding)
        often = ", ".join(f"{name} in {count}" for name, count in names.most_common(_MOST_OFTEN))
        more = f" and {len(names) - _MOST_OFTEN} more" * (len(names) > _MOST_OFTEN)
        numbers = [layer for layer, _ in layers]
        rows.append((kind, f"{len(layers)}: {format_ranges(numbers)}", in_ms(seconds[numbers].sum()), often + more))
    return rows


def plural(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}{'s' * (number != 1)}"


def in_ms(seconds: float) -> str:
    """Write seconds in milliseconds, to four digits at least."""
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"
