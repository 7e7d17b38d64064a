"""The table at the end of a run: what was done, how evenly, over which links, in how much memory."""

import numpy as np
from tabulate import tabulate

from hpcmoe.prepare.process import count_unshared
from hpcmoe.report.batches import rows_of_batches
from hpcmoe.report.metrics import SIGMA_AIM, compare_bandwidth, sum_links_by_node

MOST_NODES_IN_A_TABLE = 8
MOST_LAYERS_IN_A_TABLE = 8
TRANSFERS = {
    True: 4,
    False: 2,
}  # in training, and in inference: of an assignment in a layer: there and back, and the same backward


def make_table(job, totals):
    """Lay out a run's figures -> text."""
    balance = rows_of_balance(totals, rows_of_batches(totals.batches, job.stepper.dispatcher.sizes))
    rows = [*rows_of_time(job, totals), *balance, *rows_of_links(job, totals), *rows_of_placement(job)]
    memory = [*rows_of_memory(job.memory, totals), *rows_of_process(job, totals)]
    return "\n\n".join(
        tabulate(table, headers=headers, disable_numparse=True, preserve_whitespace=True)
        for table, headers in (
            (rows, ("figure", "value", "unit")),
            (rows_of_layers(totals), ("layer", "U_e, least - most", "balancedness", "sigma", "its sampling floor")),
            (memory, ("memory of a rank", "as computed", "as measured")),
        )
    )


def rows_of_time(job, totals):
    """List losses, throughput and where the time went."""
    rows = [(name, f"{loss:.4f}", "nats/byte") for name, loss in totals.losses.items()]
    rows += [
        ("steps measured", f"{totals.num_steps}", ""),
        ("tokens per second", f"{totals.tokens_per_second:.0f}", "tokens/s"),
        ("time per token", f"{1e6 * totals.seconds / max(totals.num_tokens, 1):.2f}", "us"),
        ("time per step", f"{1e3 * totals.seconds / max(totals.num_steps, 1):.1f}", "ms"),
    ]
    of_stage = [(f"  in {stage}", seconds) for stage, seconds in totals.seconds_of_stage.items() if seconds]
    return rows + [(name, f"{1e3 * s / max(totals.num_steps, 1):.1f}", "ms, mean of ranks") for name, s in of_stage]


def rows_of_balance(totals, of_batches):
    """List how evenly experts and links were used; of_batches: the rows of the experts' batches."""
    busy = totals.utilisation
    aim = f"aim < {SIGMA_AIM}: {'met' if totals.link_sigma < SIGMA_AIM else 'not met'}"
    return [
        ("expert utilisation U_e", f"{busy.min():.2f} - {busy.max():.2f}", "actual/expected tokens, least - most"),
        *of_batches,
        ("balancedness of ranks", f"{totals.balancedness:.3f}", "mean/max tokens that a rank serves, layer by layer"),
        ("link balance sigma", f"{totals.link_sigma:.3f}", f"std/mean of a step's tokens per link; {aim}"),
        ("  its sampling floor", f"{totals.link_sigma_floor:.3f}", "root mean square of an even router's sigma"),
        ("assignments dropped", f"{totals.num_dropped}", ""),
    ]


def rows_of_layers(totals):
    """List how evenly each layer used experts, ranks and links; of many layers those that kept ranks busy least."""
    shown = np.arange(len(totals.utilisation))
    if len(shown) > MOST_LAYERS_IN_A_TABLE:
        shown = np.sort(np.argsort(totals.balancedness_of_layer, kind="stable")[:MOST_LAYERS_IN_A_TABLE])
    return [
        (
            f"{layer}",
            f"{totals.utilisation[layer].min():.2f} - {totals.utilisation[layer].max():.2f}",
            f"{totals.balancedness_of_layer[layer]:.3f}",
            f"{totals.link_sigma_of_layer[layer]:.3f}",
            f"{totals.link_sigma_floor_of_layer[layer]:.3f}",
        )
        for layer in shown.tolist()
    ]


def rows_of_links(job, totals):
    """List what links between ranks, and between nodes, had to carry and carried."""
    of_ranks, of_nodes = totals.bytes_of_link, sum_links_by_node(totals.bytes_of_link, job.topology.node_of_rank)
    rows = links_between("rank", of_ranks[exchange_links(job.mesh)], job, totals)
    rows += links_between("node", of_nodes[~np.eye(len(of_nodes), dtype=bool)], job, totals)
    if 1 < len(of_nodes) <= MOST_NODES_IN_A_TABLE:
        rows += [row_of_link(job, totals, of_nodes, i, j) for i, j in np.ndindex(of_nodes.shape) if i != j]
    return rows


def row_of_link(job, totals, bytes_of_link, i, j):
    """Tell what the link from node i to node j carried, of what it could in that time."""
    topology = job.topology
    could = topology.bytes_per_second[i, j] * totals.seconds
    name = f"  {topology.node_names[i]} -> {topology.node_names[j]}"
    return name, f"{bytes_of_link[i, j] / 1e6:.2f}", f"MB of {could / 1e6:.0f} it could ({topology.source['links']})"


def exchange_links(mesh):
    """Find the ordered pairs of different ranks among which tokens travel -> bool [P, P] over all ranks."""
    rank = np.arange(mesh.world.size)
    group = rank // (mesh.expert_parallel * mesh.tensor_parallel)
    return (group[:, None] == group) & ~np.eye(len(rank), dtype=bool)


def links_between(what, bytes_of_link, job, totals):
    """List the bandwidth of the links [n] between ranks or nodes; nothing where there is only one of these."""
    model, sizes = job.spec.model, job.stepper.dispatcher.sizes
    transfers = sizes.top_k * model.num_layers * TRANSFERS[job.spec.trains]
    seconds = max(totals.seconds, 1e-9)
    bandwidth = compare_bandwidth(bytes_of_link, totals.tokens_per_second, sizes.row_bytes, transfers, seconds)
    if bandwidth is None:
        return []
    carried = bytes_of_link / 1e6
    sigma = carried.std() / max(carried.mean(), 1e-9)
    unit = "MB/s a link"
    counted = f"{unit}, x {sizes.top_k} assignments x {TRANSFERS[job.spec.trains]} ways x {model.num_layers} layers"
    return [
        (f"links between {what}s", f"{bandwidth.num_links}", "experts' rows alone, no sums of gradients"),
        ("  bytes carried", f"{carried.min():.2f} / {carried.mean():.2f} / {carried.max():.2f}",
         f"MB a link, least / mean / most; sigma {sigma:.3f}"),
        ("  required, BW_min", f"{bandwidth.plain / 1e6:.4f}", f"{unit}: tokens/s x token bytes / links"),
        ("  required, counted", f"{bandwidth.counted / 1e6:.4f}", counted),
        ("  achieved", f"{bandwidth.achieved / 1e6:.4f}", f"{unit}; busiest {bandwidth.busiest / 1e6:.4f}"),
    ]  # fmt: skip


def rows_of_placement(job):
    """List where the experts are and what the links were predicted to need."""
    placement, topology = job.placement, job.topology
    meaning = {
        "links": "dispatch on the busiest link",
        "ports": "dispatch on the busiest link, NIC or uplink",
        "step": "dispatch or forward compute, whichever is busiest",
    }
    others = [
        (f"  {method} would give", "-" if seconds is None else f"{1e3 * seconds:.4f}", "ms a step")
        for method, seconds in job.run_placement.seconds_of_method.items()
    ]
    return [
        ("cluster", f"{topology}", ""),
        ("placement", placement.method, f"{placement.slots_per_rank} slots a rank and layer"),
        (f"  objective {placement.objective}", f"{1e3 * placement.objective_seconds:.4f}",
         f"ms a step, {meaning[placement.objective]}"),
        ("  lower bound", f"{1e3 * placement.lower_bound_seconds:.4f}", f"ms a step{', optimal' * placement.is_optimal}"),
        *others,
        ("  tokens between nodes", f"{100 * placement.cross_node_share:.1f}", "% of the assignments, as placed"),
        ("  search", f"{placement.search_stats.seconds:.3f}", "s"),
    ]  # fmt: skip


def rows_of_memory(computed, totals):
    """List memory by what it holds, as computed and as measured on the fullest rank."""
    names = {
        "one_expert": "one expert of a layer, all its matrices",
        "experts": "experts, parameters",
        "copies": "experts, matrices cast or packed",
        "dense": "dense parts, parameters",
        "gradients": "gradients",
        "optimizer": "optimizer's moments",
        "buffers": "message buffers",
        "activations": "activations in flight",
        "working": "experts at work on a batch",
        "moving": "experts that move here, on their way",
        "snapshot": "copy of the state for checkpoints",
        "total": "all of these",
    }
    both = [(text, getattr(computed, name), getattr(totals.measured, name)) for name, text in names.items()]
    return [(text, *map(format_bytes, num_bytes)) for text, *num_bytes in both if any(num_bytes)]


def rows_of_process(job, totals):
    """List what a rank's process has in the host's memory, mean of a node's ranks: alone, and with others."""
    process_bytes = job.budget.process_bytes
    both = [
        ("the process itself: Python, torch, MPI", process_bytes, totals.process_bytes),
        ("all that it shares with no other (USS)", process_bytes + count_unshared(job.memory, job.stepper.dispatcher),
         totals.unshared_bytes),
    ]  # fmt: skip
    rows = [(text, *map(format_bytes, num_bytes)) for text, *num_bytes in both]
    return [
        *rows,
        ("libraries and files that processes share", "", format_bytes(totals.process.libraries)),
        ("resident set of the process, at its peak", "", format_bytes(totals.process.peak)),
    ]


def format_bytes(num_bytes):
    """Show bytes in MB."""
    return f"{num_bytes / 1e6:.3f} MB"
