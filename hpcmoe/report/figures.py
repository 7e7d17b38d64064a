"""The picture of a placement: nodes in a ring, links by time, experts by load; maps and bars where nodes are many."""

import os

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Wedge

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import name_resource
from hpcmoe.placement.result import Placement, Usage

_MOST_NODES_IN_A_RING = 16
_MOST_NAMED_EXPERTS = 12  # of a node; more are drawn without their numbers
_MOST_NAMED_RESOURCES = 2  # of those that bind
_TIME_COLOURS, _LOAD_COLOURS = colormaps["plasma_r"], colormaps["Greens"]
_GOLDEN_ANGLE = np.pi * (3 - 5**0.5)


def draw_placement(
    problem: PlacementProblem, placement: Placement, usage: Usage, path: str | os.PathLike, kind: str, layer: int
) -> None:
    """Draw a placement to a file of a kind that matplotlib writes: one layer in a ring, or all where nodes are many."""
    # Draw the layer, or all.
    figure = Figure(figsize=(12, 9) if problem.num_nodes <= _MOST_NODES_IN_A_RING else (14, 9), layout="constrained")
    if problem.num_nodes <= _MOST_NODES_IN_A_RING:
        draw_ring(figure, problem, usage, layer)
        shown = f"layer {layer} of {problem.num_layers}: {1e3 * usage.layer_seconds[layer]:.4g} ms"
        names = [name_resource(problem, *resource) for resource in usage.list_binding(layer)]
        shown += f" ({', '.join(names[:_MOST_NAMED_RESOURCES])})" if names else ""
    else:
        draw_maps(figure, problem, usage)
        shown = f"sums over {problem.num_layers} layers"

    # Write the cost above.
    bound = "optimal" if placement.is_optimal else f"lower bound {1e3 * placement.lower_bound_seconds:.4g} ms"
    figure.suptitle(
        f"objective {problem.objective}: {1e3 * placement.objective_seconds:.4g} ms a step ({bound})\n"
        f"{problem.num_experts} experts on {problem.num_ranks} ranks of {problem.num_nodes} nodes; {shown}"
    )
    figure.savefig(path, format=kind, dpi=120)


def draw_ring(figure: Figure, problem: PlacementProblem, usage: Usage, layer: int) -> None:
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
    for node, (x, y) in enumerate(centre * (1 + radius + 0.15)):
        text = problem.node_names[node] + _format_both_directions(seconds, "egress", "ingress", node)
        axes.text(x, y, text, ha="center", va="center", fontsize=8, zorder=5)
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
        axes.text(out * np.cos(middle), out * np.sin(middle), text, ha=side, va="center", color="0.3", fontsize=9)


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
        figure.colorbar(scale, ax=axes, shrink=0.7, label="time of a link, ms (width: its tokens)")


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
                axes.text(spot[0], spot[1], name, ha="center", va="center", fontsize=7, color=ink, zorder=5)
    figure.colorbar(scale, ax=axes, shrink=0.7, label="tokens that an expert serves on a node")


def draw_maps(figure: Figure, problem: PlacementProblem, usage: Usage) -> None:
    """Draw all layers together: a map of the links' times, and bars of each node's port, experts and tokens."""
    # Map the links.
    crossing = np.where(np.eye(problem.num_nodes), 0.0, usage.tokens.sum(axis=0))  # [nodes, nodes]
    grid = figure.add_gridspec(3, 2, width_ratios=(1.25, 1))
    axes = figure.add_subplot(grid[:, 0])
    milliseconds = np.where(crossing > 0, 1e3 * crossing * problem.link_cost, np.nan)  # white where nothing goes
    figure.colorbar(axes.imshow(milliseconds, cmap=_TIME_COLOURS, vmin=0, interpolation="nearest"), ax=axes, shrink=0.8)
    axes.set(title="time of a link, ms", xlabel="to node", ylabel="from node")
    for border in np.flatnonzero(np.diff(problem.rack_of_node)) + 0.5:
        axes.axhline(border, color="0.3", linewidth=0.6)
        axes.axvline(border, color="0.3", linewidth=0.6)

    # Draw the bars of the nodes.
    ms_bytes = 1e3 * problem.bytes_per_token
    for row, (title, series) in enumerate((
        ("time of a port, ms", {
            "sends": ms_bytes * crossing.sum(axis=1) / problem.egress_bytes_per_second,
            "receives": ms_bytes * crossing.sum(axis=0) / problem.ingress_bytes_per_second,
        }),
        ("experts, replicas in all layers", {"replicas": usage.replicas.sum(axis=(0, 2))}),
        ("tokens served", {"tokens": usage.tokens.sum(axis=(0, 1))}),
    )):  # fmt: skip
        axes = figure.add_subplot(grid[row, 1])
        for label, height in series.items():
            edges, is_single = np.arange(problem.num_nodes + 1) - 0.5, len(series) == 1
            axes.stairs(height, edges, fill=is_single, baseline=0 if is_single else None, label=label)
        axes.set(title=title, xlim=(-0.5, problem.num_nodes - 0.5))
        axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(loc="lower right", fontsize=8)
    axes.set_xlabel("node")
