"""The picture of a placement: what binds, beside nodes in a ring with links and experts, or maps of many nodes."""

import os
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Circle, FancyArrowPatch, Wedge

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import name_resource
from hpcmoe.placement.result import Placement, Usage

_MOST_NODES_IN_A_RING = 16
_MOST_NAMED_EXPERTS = 12  # of a node; more are drawn without their numbers
_MOST_NAMED_RESOURCES = 2  # of those that bind
_MOST_BUSY = 10  # resources with a bar of their own
_MOST_NODE_NAMES = 24  # along an axis
_KINDS = {
    "link": "link", "egress": "port", "ingress": "port", "uplink_out": "uplink", "uplink_in": "uplink", "rank": "",
}  # fmt: skip
_IDLE = {"egress": "sends", "ingress": "receives", "uplink_out": "sends", "uplink_in": "receives", "rank": "rank"}
_LARGE, _SMALL = 11, 9  # points; a point is 5/3 pixels
_GOLDEN_ANGLE = np.pi * (3 - 5**0.5)


def cut_light_end(name: str) -> Colormap:
    """Return a sequence of colours from visible to dark: the darker, the busier."""
    return LinearSegmentedColormap.from_list(f"{name}_visible", colormaps[name](np.linspace(0.18, 1, 64)))


_TIME_COLOURS, _LOAD_COLOURS = cut_light_end("YlOrBr"), cut_light_end("Blues")  # apart for colour-blind eyes too


def draw_placement(
    problem: PlacementProblem, placement: Placement, usage: Usage, path: str | os.PathLike, kind: str, layer: int
) -> None:
    """Draw a placement to a file of a kind that matplotlib writes: one layer in a ring, or all where nodes are many."""
    # Draw the layer, or all.
    figure = Figure(figsize=(15, 10), layout="constrained")
    if problem.num_nodes <= _MOST_NODES_IN_A_RING:
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.6, 1))
        left, right = halves
        draw_ring(left, problem, usage, layer)
        upper, lower = right.subplots(2, 1, height_ratios=(1, 1.3))
        draw_busiest(lower, problem, {kind: array[layer] for kind, array in usage.seconds.items()}, f"layer {layer}")
        shown = f"layer {layer} of {problem.num_layers}: {1e3 * usage.layer_seconds[layer]:.4g} ms"
        names = [name_resource(problem, *resource) for resource in usage.list_binding(layer)]
        shown += f" ({', '.join(names[:_MOST_NAMED_RESOURCES])})" if names else ""
    else:
        upper = draw_maps(figure, problem, usage)
        shown = f"sums over {problem.num_layers} layers"
    draw_binding(upper, problem, placement, usage)

    # Write the cost above.
    bound = "optimal" if placement.is_optimal else f"lower bound {1e3 * placement.lower_bound_seconds:.4g} ms"
    figure.suptitle(
        f"objective {problem.objective}: {1e3 * placement.objective_seconds:.4g} ms a step ({bound})\n"
        f"{problem.num_experts} experts on {problem.num_ranks} ranks of {problem.num_nodes} nodes; {shown}",
        fontsize=_LARGE + 2,
    )
    figure.savefig(path, format=kind, dpi=120)


def draw_binding(axes: Axes, problem: PlacementProblem, placement: Placement, usage: Usage) -> None:
    """Draw a bar for each kind of resource, its busiest in each layer and all layers summed, against the bound."""
    names, milliseconds = [], []
    for kind, seconds in usage.seconds.items():
        of_layer = seconds.reshape(len(seconds), -1)
        total = of_layer.sum(axis=0)
        index = np.unravel_index(int(total.argmax()), seconds.shape[1:])
        milliseconds.append(1e3 * of_layer.max(axis=1).sum())
        busiest = (
            name_resource(problem, kind, [int(i) for i in index]) if total.any() else f"{_IDLE.get(kind, '')}: idle"
        )
        names.append(f"{_KINDS[kind]} {busiest}".strip())
    draw_bars(axes, names, milliseconds)

    # Draw what they are compared with.
    cost, bound = 1e3 * placement.objective_seconds, 1e3 * placement.lower_bound_seconds
    axes.axvline(cost, color="0.1", linewidth=1.4, label=f"objective {cost:.4g} ms")
    axes.axvline(bound, color="0.1", linewidth=1.4, linestyle="--", label=f"lower bound {bound:.4g} ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 0.98), ncols=2, fontsize=_SMALL, frameon=False)
    axes.set_xlabel("ms a step, the busiest of a kind in each layer", fontsize=_SMALL)
    axes.set_title("what binds, all layers", fontsize=_LARGE, pad=26)


def draw_busiest(axes: Axes, problem: PlacementProblem, seconds: dict[str, np.ndarray], what: str) -> None:
    """Draw a bar for each of the busiest resources; seconds: by kind, of one layer or summed."""
    found = [(float(busy), kind, index) for kind, array in seconds.items() for index, busy in np.ndenumerate(array)]
    found = sorted((entry for entry in found if entry[0] > 0), key=lambda entry: -entry[0])[:_MOST_BUSY]
    names = [f"{_KINDS[kind]} {name_resource(problem, kind, index)}".strip() for _, kind, index in found]
    draw_bars(axes, names, [1e3 * busy for busy, _, _ in found])
    axes.set_xlabel("ms a step", fontsize=_SMALL)
    axes.set_title(f"busiest resources, {what}", fontsize=_LARGE)


def draw_bars(axes: Axes, names: list[str], milliseconds: list[float]) -> None:
    """Draw horizontal bars with their names and values, the first on top, the darker the busier."""
    most = max(milliseconds, default=0.0) or 1.0
    rows = np.arange(len(names))
    bars = axes.barh(rows, milliseconds, color=[_TIME_COLOURS(value / most) for value in milliseconds], height=0.7)
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, [f"{value:.4g}" for value in milliseconds], padding=4, fontsize=_SMALL, bbox=plate, zorder=4)
    axes.set_yticks(rows, names, fontsize=_SMALL)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.set(xlim=(0, 1.2 * most), ylim=(max(len(names), 1) - 0.4, -0.6))
    axes.spines[["top", "right"]].set_visible(False)


def draw_ring(figure: FigureBase, problem: PlacementProblem, usage: Usage, layer: int) -> None:
    """Draw one layer: nodes around a ring, rack by rack, an arrow for each link in use, experts inside their nodes."""
    # Place the nodes.
    axes = figure.add_subplot(aspect="equal")
    axes.set_axis_off()
    order = np.argsort(problem.rack_of_node, kind="stable")
    angle = np.empty(problem.num_nodes)
    angle[order] = np.pi / 2 - 2 * np.pi * (np.arange(len(order)) + 0.5) / len(order)
    centre = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # [nodes, 2] on the unit circle
    radius = min(0.3, 0.8 * np.sin(np.pi / len(order))) if len(order) > 1 else 0.5
    discs = [Circle(spot, radius, facecolor="white", edgecolor="0.3", zorder=3) for spot in centre]
    for disc in discs:
        axes.add_patch(disc)

    # Draw racks, links, experts, and the nodes' names.
    seconds = {name: array[layer] for name, array in usage.seconds.items()}
    _draw_racks(axes, problem, seconds, angle, radius)
    _draw_links(figure, axes, problem, usage.tokens[layer], discs)
    _draw_experts(figure, axes, usage.tokens_of_expert[layer], usage.replicas[layer], discs)
    for node, (x, y) in enumerate(centre * (1 + radius + 0.24)):
        text = problem.node_names[node] + _format_both_directions(seconds, "egress", "ingress", node)
        axes.text(x, y, text, ha="center", va="center", fontsize=_SMALL, zorder=5)
    axes.set(xlim=(-2, 2), ylim=(-1.6, 1.6))


def _format_both_directions(seconds, sends, receives, index):
    """Format how long a port or uplink sends and receives, where the objective counts these."""
    if sends not in seconds:
        return ""
    return f"\nout {1e3 * seconds[sends][index]:.3g}\nin {1e3 * seconds[receives][index]:.3g} ms"


def _draw_racks(axes, problem, seconds, angle, radius):
    """Draw a shade over the part of the ring that each rack's nodes are on, where there are several racks."""
    racks, half = np.unique(problem.rack_of_node), np.pi / problem.num_nodes
    for rack in racks if len(racks) > 1 else ():
        of_rack = angle[problem.rack_of_node == rack]
        ends = np.degrees([of_rack.min() - 0.94 * half, of_rack.max() + 0.94 * half])
        axes.add_patch(Wedge((0, 0), 1.28 + radius, *ends, width=0.34 + 2 * radius, color="0.94", zorder=0))
        middle, out = np.radians(ends.mean()), 1.31 + radius
        text = f"rack {rack}" + _format_both_directions(seconds, "uplink_out", "uplink_in", rack)
        side = "left" if np.cos(middle) > 0 else "right"
        axes.text(out * np.cos(middle), out * np.sin(middle), text, ha=side, va="center", color="0.2", fontsize=_SMALL)


def _draw_links(figure, axes, problem, tokens, discs):
    """Draw an arrow for each link with tokens [nodes, nodes]: coloured by its time, as wide as it has tokens."""
    crossing = np.where(np.eye(len(tokens)), 0.0, tokens)
    milliseconds = 1e3 * (crossing * problem.link_cost + np.where(crossing > 0, problem.link_latency, 0.0))
    scale = ScalarMappable(Normalize(0, milliseconds.max() or 1), _TIME_COLOURS)
    for source, target in np.argwhere(crossing > 0):
        busy = milliseconds[source, target] / scale.norm.vmax
        width = 0.3 + 4 * crossing[source, target] / crossing.max()
        arrow = FancyArrowPatch(
            discs[source].center, discs[target].center, patchA=discs[source], patchB=discs[target],
            connectionstyle="arc3,rad=0.14", arrowstyle="-|>", mutation_scale=8 + width, shrinkA=0, shrinkB=1,
            linewidth=width, color=_TIME_COLOURS(busy), alpha=0.1 + 0.9 * busy**2, zorder=1 + busy,
        )  # fmt: skip
        axes.add_patch(arrow)
    if crossing.any():
        add_scale(figure, axes, scale, "time of a link, ms (width: its tokens)")


def _draw_experts(figure, axes, tokens, replicas, discs):
    """Draw the experts [nodes, E] inside their nodes' discs, coloured and sized by the tokens they serve there."""
    scale = ScalarMappable(Normalize(0, tokens.max() or 1), _LOAD_COLOURS)
    for node, disc in enumerate(discs):
        experts = np.flatnonzero(replicas[node])
        spacing = 0.8 * disc.radius / max(len(experts), 1) ** 0.5
        for place, expert in enumerate(experts[np.argsort(-tokens[node, experts], kind="stable")]):
            # Place them like a sunflower's seeds: evenly over the disc, the hottest in the middle.
            reach = (disc.radius - 0.6 * spacing) * ((place + 0.5 * (len(experts) > 1)) / len(experts)) ** 0.5
            turn = np.array([np.cos(place * _GOLDEN_ANGLE), np.sin(place * _GOLDEN_ANGLE)])
            spot, load = disc.center + reach * turn, tokens[node, expert] / scale.norm.vmax
            size = spacing * (0.36 + 0.36 * load**0.5)
            axes.add_patch(Circle(spot, size, facecolor=_LOAD_COLOURS(load), edgecolor="0.3", linewidth=0.6, zorder=4))

            # Name them where they are few.
            if len(experts) <= _MOST_NAMED_EXPERTS:
                name = f"{expert}" if replicas[node, expert] == 1 else f"{expert}x{replicas[node, expert]}"
                ink = "white" if load > 0.6 else "black"
                axes.text(spot[0], spot[1], name, ha="center", va="center", fontsize=_SMALL - 1, color=ink, zorder=5)
    add_scale(figure, axes, scale, "tokens that an expert serves on a node")


def add_scale(figure: FigureBase, axes: Axes, scale: ScalarMappable, label: str) -> None:
    """Add a scale of colours below axes."""
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.55, aspect=36, pad=0.02)
    bar.set_label(label, fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL)


def draw_maps(figure: Figure, problem: PlacementProblem, usage: Usage) -> Axes:
    """Draw all layers together -> axes for what binds. A map of the links' times, and panels of what binds first."""
    # Map the links.
    grid = figure.add_gridspec(4, 2, width_ratios=(1.15, 1), height_ratios=(1.3, 1.5, 1, 1))
    crossing = np.where(np.eye(problem.num_nodes), 0.0, usage.tokens.sum(axis=0))  # [nodes, nodes]
    axes = figure.add_subplot(grid[:3, 0])
    milliseconds = np.where(crossing > 0, 1e3 * crossing * problem.link_cost, np.nan)  # white where nothing goes
    add_scale(figure, axes, axes.imshow(milliseconds, cmap=_TIME_COLOURS, vmin=0, interpolation="nearest"), "ms a step")
    axes.set_title("time of a link, ms", fontsize=_LARGE)
    name_nodes(axes, problem, "x", "to node")
    name_nodes(axes, problem, "y", "from node")
    for border in np.flatnonzero(np.diff(problem.rack_of_node)) + 0.5:
        axes.axhline(border, color="0.3", linewidth=0.6)
        axes.axvline(border, color="0.3", linewidth=0.6)

    # Draw what is busiest, and the bars of the nodes.
    upper = figure.add_subplot(grid[0, 1])
    summed = {kind: array.sum(axis=0) for kind, array in usage.seconds.items()}
    draw_busiest(figure.add_subplot(grid[1, 1]), problem, summed, "all layers")
    ms_bytes = 1e3 * problem.bytes_per_token
    ports = {
        "sends": ms_bytes * crossing.sum(axis=1) / problem.egress_bytes_per_second,
        "receives": ms_bytes * crossing.sum(axis=0) / problem.ingress_bytes_per_second,
    }
    for place, title, unit, series in (
        (grid[2, 1], "time of a port, ms", "ms a step", ports),
        (grid[3, 1], "tokens served", "tokens a step", {"tokens": usage.tokens.sum(axis=(0, 1))}),
        (grid[3, 0], "experts, replicas in all layers", "replicas", {"replicas": usage.replicas.sum(axis=(0, 2))}),
    ):
        draw_nodes(figure.add_subplot(place), problem, title, unit, series)
    return upper


def draw_nodes(axes: Axes, problem: PlacementProblem, title: str, unit: str, series: dict[str, np.ndarray]) -> None:
    """Draw a figure of each node [nodes], one filled or several as outlines."""
    colours = dict(zip(series, ("#0072b2", "#d55e00"), strict=False))
    for label, height in series.items():
        edges, is_single = np.arange(problem.num_nodes + 1) - 0.5, len(series) == 1
        baseline = 0 if is_single else None
        axes.stairs(height, edges, fill=is_single, baseline=baseline, label=label, color=colours[label], linewidth=1.4)
    axes.set_title(title, fontsize=_LARGE)
    axes.set_ylabel(unit, fontsize=_SMALL)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    name_nodes(axes, problem, "x", "node")
    if len(series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, fontsize=_SMALL, frameon=False)


def name_nodes(axes: Axes, problem: PlacementProblem, axis: str, label: str) -> None:
    """Name some of the nodes along an axis."""
    places = np.arange(0, problem.num_nodes, -(-problem.num_nodes // _MOST_NODE_NAMES))
    names = [problem.node_names[node] for node in places]
    upright = axis == "x" and max(len(name) for name in names) > 2
    set_ticks, set_label = (axes.set_xticks, axes.set_xlabel) if axis == "x" else (axes.set_yticks, axes.set_ylabel)
    set_ticks(places, names, fontsize=_SMALL - 1, rotation=90 if upright else 0)
    set_label(label, fontsize=_SMALL)
    if axis == "x":
        axes.set_xlim(-0.5, problem.num_nodes - 0.5)
