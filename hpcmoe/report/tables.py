"""Tables at the end of a run: what was done, how evenly, over which links, in how much memory."""

import numpy as np
from tabulate import tabulate

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.prepare.memory import Memory
from hpcmoe.prepare.process import count_unshared
from hpcmoe.report.batches import rows_of_batches
from hpcmoe.report.metrics import SIGMA_AIM, Recorder, sum_links_by_node
from hpcmoe.report.placement_tables import Rows
from hpcmoe.report.totals import MeasuredRun, Totals, record_totals

_MAX_NODES, _MAX_LAYERS = 8, 8  # in a table
_OBJECTIVES = {
    "links": "dispatch on the busiest link",
    "ports": "dispatch on the busiest link, NIC or uplink",
    "step": "dispatch or forward compute, whichever is busiest",
}
_PARTS_OF_MEMORY = {
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


def make_table(run: MeasuredRun, totals: Totals) -> str:
    """Format a run's figures as tables."""
    batches = rows_of_batches(totals.batches, run.stepper.dispatcher.sizes)
    balance = rows_of_balance(totals, batches)
    rows = [*rows_of_time(totals), *balance, *rows_of_links(run, totals), *rows_of_placement(run)]
    memory = [*rows_of_memory(run.memory, totals.measured), *rows_of_process(run, totals)]
    return "\n\n".join(
        tabulate(table, headers=headers, disable_numparse=True, preserve_whitespace=True)
        for table, headers in (
            (rows, ("figure", "value", "unit")),
            (rows_of_layers(totals), ("layer", "U_e, least - most", "balancedness", "sigma", "its sampling floor")),
            (memory, ("memory of a rank", "as computed", "as measured")),
        )
    )


def rows_of_time(totals: Totals) -> Rows:
    """List losses, throughput and the seconds of each stage."""
    num_steps, num_tokens = max(totals.num_steps, 1), max(totals.num_tokens, 1)
    stages = [(stage, seconds) for stage, seconds in totals.seconds_of_stage.items() if seconds]
    return [
        *((name, f"{loss:.4f}", totals.loss_unit * ("loss" in name)) for name, loss in totals.losses.items()),
        ("steps measured", f"{totals.num_steps}", ""),
        ("tokens per second", f"{totals.tokens_per_second:.0f}", "tokens/s"),
        ("time per token", f"{1e6 * totals.seconds / num_tokens:.2f}", "us"),
        ("time per step", f"{1e3 * totals.seconds / num_steps:.1f}", "ms"),
        *((f"  in {stage}", f"{1e3 * seconds / num_steps:.1f}", "ms, mean of ranks") for stage, seconds in stages),
        *(
            ("  transfers hidden", f"{share:.2f}", "behind the experts' work, in the steps of [run] trace; 1 all")
            for share in (totals.hidden_share,)
            if share is not None
        ),
    ]


def rows_of_balance(totals: Totals, of_batches: Rows) -> Rows:
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


def rows_of_layers(totals: Totals) -> Rows:
    """List each layer's balance of experts, ranks and links; of many layers those of least balancedness."""
    shown = np.sort(np.argsort(totals.balancedness_of_layer, kind="stable")[:_MAX_LAYERS])
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


def rows_of_links(run: MeasuredRun, totals: Totals) -> Rows:
    """List what links between ranks, and between nodes, had to carry and carried."""
    of_ranks, topology = totals.bytes_of_link, run.topology
    assert of_ranks is not None  # the table is made on rank 0
    of_nodes = sum_links_by_node(of_ranks, topology.node_of_rank)
    between = ~np.eye(len(of_nodes), dtype=bool)
    rows = rows_between("rank", of_ranks[find_group_links(run.mesh)], run, totals)
    rows += rows_between("node", of_nodes[between], run, totals)
    if 1 < len(of_nodes) <= _MAX_NODES:
        for i, j in np.argwhere(between).tolist():
            capacity = f"MB of {topology.bytes_per_second[i, j] * totals.seconds / 1e6:.0f} it could"
            name = f"  {topology.node_names[i]} -> {topology.node_names[j]}"
            rows.append((name, f"{of_nodes[i, j] / 1e6:.2f}", f"{capacity} ({topology.source['links']})"))
    return rows


def find_group_links(mesh: Mesh) -> np.ndarray:
    """Find the ordered pairs of different ranks among which tokens travel -> bool [P, P] over all ranks."""
    rank = np.arange(mesh.world.size)
    group = rank // (mesh.expert_parallel * mesh.tensor_parallel)
    return (group[:, None] == group) & ~np.eye(len(rank), dtype=bool)


def rows_between(what: str, bytes_of_link: np.ndarray, run: MeasuredRun, totals: Totals) -> Rows:
    """List required and achieved bandwidth of the links [n] between ranks or nodes; nothing where there is none.

    The plain formula is BW_min = tokens per second x token bytes / links. It is counted K x ways x layers times.
    """
    if len(bytes_of_link) == 0:
        return []
    # Compare the bandwidth required by the tokens with that of the bytes carried.
    num_layers, sizes = run.spec.model.num_layers, run.stepper.dispatcher.sizes
    transfers = 4 if run.spec.trains else 2  # there and back, and the same backward
    required = totals.tokens_per_second * sizes.row_bytes / len(bytes_of_link) / 1e6
    carried, seconds, unit = bytes_of_link / 1e6, max(totals.seconds, 1e-9), "MB/s a link"
    sigma = carried.std() / max(carried.mean(), 1e-9)
    return [
        (f"links between {what}s", f"{len(carried)}", "experts' rows alone, no sums of gradients"),
        ("  bytes carried", f"{carried.min():.2f} / {carried.mean():.2f} / {carried.max():.2f}",
         f"MB a link, least / mean / most; sigma {sigma:.3f}"),
        ("  required, BW_min", f"{required:.4f}", f"{unit}: tokens/s x token bytes / links"),
        ("  required, counted", f"{required * sizes.top_k * transfers * num_layers:.4f}",
         f"{unit}, x {sizes.top_k} assignments x {transfers} ways x {num_layers} layers"),
        ("  achieved", f"{carried.mean() / seconds:.4f}", f"{unit}; busiest {carried.max() / seconds:.4f}"),
    ]  # fmt: skip


def rows_of_placement(run: MeasuredRun) -> Rows:
    """List where the experts are and what the links were predicted to need."""
    placement = run.placement
    return [
        ("cluster", f"{run.topology}", ""),
        ("placement", placement.method, f"{placement.slots_per_rank} slots a rank and layer"),
        (f"  objective {placement.objective}", f"{1e3 * placement.objective_seconds:.4f}",
         f"ms a step, {_OBJECTIVES[placement.objective]}"),
        ("  lower bound", f"{1e3 * placement.lower_bound_seconds:.4f}",
         f"ms a step{', optimal' * placement.is_optimal}"),
        *((f"  {method} would give", "-" if seconds is None else f"{1e3 * seconds:.4f}", "ms a step")
          for method, seconds in run.run_placement.seconds_of_method.items()),
        ("  tokens between nodes", f"{100 * placement.cross_node_share:.1f}", "% of the assignments, as placed"),
        ("  search", f"{placement.search_stats.seconds:.3f}", "s"),
    ]  # fmt: skip


def rows_of_memory(computed: Memory, measured: Memory) -> Rows:
    """List memory by what it holds, as computed and as measured on the fullest rank; what is zero is left out."""
    both = [(text, getattr(computed, name), getattr(measured, name)) for name, text in _PARTS_OF_MEMORY.items()]
    return [(text, *map(format_bytes, num_bytes)) for text, *num_bytes in both if any(num_bytes)]


def rows_of_process(run: MeasuredRun, totals: Totals) -> Rows:
    """List what a rank's process has in the host's memory, mean of a node's ranks: alone, and with others."""
    computed = run.budget.process_bytes
    unshared = computed + count_unshared(run.memory, run.stepper.dispatcher)
    process = totals.process
    return [
        ("the process itself: Python, torch, MPI", format_bytes(computed), format_bytes(totals.process_bytes)),
        ("all that it shares with no other (USS)", format_bytes(unshared), format_bytes(totals.unshared_bytes)),
        ("libraries and files that processes share", "", format_bytes(process.libraries)),
        ("resident set of the process, at its peak", "", format_bytes(process.peak)),
    ]


def record_results(records: Recorder, run: MeasuredRun, totals: Totals) -> None:
    """Record the figures of the whole run, and the memory of a rank by what it holds, as computed and as measured."""
    record_totals(records, totals)
    parts = {
        text: (getattr(run.memory, name), getattr(totals.measured, name)) for name, text in _PARTS_OF_MEMORY.items()
    }
    parts = {text: both for text, both in parts.items() if any(both)}
    parts["the process itself: Python, torch, MPI"] = run.budget.process_bytes, totals.process_bytes
    computed, measured = np.array([*parts.values()]).T
    records.describe("memory", "parts", list(parts))
    records.describe("memory", "computed_bytes", computed, "B")
    records.describe("memory", "measured_bytes", measured, "B")


def format_bytes(num_bytes: float) -> str:
    """Format bytes in MB."""
    return f"{num_bytes / 1e6:.3f} MB"
