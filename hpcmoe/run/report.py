"""The table at the end of a run: what was done, how evenly, over which links, in how much memory."""

import dataclasses

import numpy as np
from tabulate import tabulate

from hpcmoe.errors import on_root
from hpcmoe.run.data import count_sequences
from hpcmoe.run.figures import compare_bandwidth, sampling_floor, sum_by_node
from hpcmoe.run.memory import Memory, measure_memory
from hpcmoe.run.process import ProcessMemory, count_unshared, mean_of_fullest_node, read_process
from hpcmoe.wait import gather_to_all, wait_all

MOST_NODES_IN_A_TABLE = 8
MOST_LAYERS_IN_A_TABLE = 8
TRANSFERS = {"train": 4, "infer": 2}  # of a token's copy in a layer: there and back, and the same backward


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What all ranks did in the measured steps."""

    num_steps: int
    num_tokens: int
    seconds: float  # on the wall of rank 0
    seconds_of_stage: dict  # mean over the ranks
    bytes_of_link: np.ndarray | None  # [P, P] bytes sent from rank to rank; on rank 0 alone
    utilisation: np.ndarray  # U_e [L, E], mean over the steps
    balancedness: float  # of the ranks, mean / max of the tokens served; mean over the steps
    balancedness_of_layer: np.ndarray  # [L]
    link_sigma: float  # mean over the steps
    link_sigma_of_layer: np.ndarray  # [L]
    link_sigma_floor: float  # of a step
    link_sigma_floor_of_layer: np.ndarray  # [L]
    num_dropped: int
    measured: Memory  # of the rank that took most
    process: ProcessMemory  # of the process that took most at its peak
    process_bytes: int  # what a process had unshared beside its arrays, mean of a node's ranks; on the fullest node
    unshared_bytes: int  # what a process had unshared, mean of a node's ranks; on the fullest node
    losses: dict  # name: nats a byte

    @property
    def tokens_per_second(self):
        """Tokens of all ranks by wall-clock second."""
        return self.num_tokens / max(self.seconds, 1e-9)


def sum_up(job, optimizer, losses, snapshot_bytes):
    """Gather a run's totals -> Totals, on all ranks but for bytes_of_link. Collective over all ranks.

    snapshot_bytes: what this rank's copy of the state for checkpoints takes.
    """
    meter, world = job.meter, job.mesh.world
    measured = measure_memory(job.stepper.network, optimizer, job.stepper.exchange, job.stepper.gauge)
    measured = dataclasses.replace(measured, snapshot=snapshot_bytes, moving=job.staged_bytes)
    process = read_process()
    beside = process.unshared - count_unshared(measured, job.stepper.exchange)
    everyone = gather_to_all(world, (measured, process, beside))
    nodes = job.topology.node_of_rank
    steps = max(meter.num_steps, 1)
    floor, floor_of_layer = on_root(world, lambda: find_floors(job))
    return Totals(
        num_steps=meter.num_steps,
        num_tokens=meter.num_tokens,
        seconds=meter.seconds,
        seconds_of_stage=meter.seconds_of_stage,
        bytes_of_link=gather_traffic(job),
        utilisation=meter.utilisation / steps,
        balancedness=meter.balancedness / steps,
        balancedness_of_layer=meter.balancedness_of_layer / steps,
        link_sigma=meter.link_sigma / steps,
        link_sigma_of_layer=meter.link_sigma_of_layer / steps,
        link_sigma_floor=floor,
        link_sigma_floor_of_layer=floor_of_layer,
        num_dropped=meter.num_dropped,
        measured=max((memory for memory, _, _ in everyone), key=lambda memory: memory.total),
        process=max((process for _, process, _ in everyone), key=lambda process: process.peak),
        process_bytes=mean_of_fullest_node([beside for _, _, beside in everyone], nodes),
        unshared_bytes=mean_of_fullest_node([process.unshared for _, process, _ in everyone], nodes),
        losses=losses,
    )


def gather_traffic(job):
    """Gather the bytes that each rank sent to each other -> [P, P] on rank 0, else None. Collective over all ranks."""
    world, row_bytes = job.mesh.world, job.stepper.exchange.sizes.row_bytes
    sent = np.zeros(world.size)
    sent[gather_to_all(job.mesh.group, world.rank)] = job.meter.rows_to_peer * row_bytes
    everyone = np.empty((world.size, world.size)) if world.rank == 0 else None
    wait_all([world.Igather(sent, everyone)])
    return everyone


def find_floors(job):
    """Compute the sampling floor of a step's link sigma -> (of all layers together, of each [L])."""
    model, mesh = job.config.model, job.mesh
    sequences = count_sequences(
        job.config.data.batch_sequences, job.config.pipeline.micro_batches, mesh.num_token_shares
    )
    tokens = sequences[: mesh.group.size] * model.sequence_length  # of the first group

    def floor(layers):
        return sampling_floor(job.placement, tokens, model.top_k, model.num_experts, layers)

    return floor(range(model.num_layers)), np.array([floor([layer]) for layer in range(model.num_layers)])


def tell_floors(job):
    """Say how uneven links would be under an even router -> a line for the log. Collective over all ranks."""
    floor, of_layer = on_root(job.mesh.world, lambda: find_floors(job))
    return (
        f"sigma of links under an even router, which draws finitely many tokens: {floor:.3f} a step, "
        f"{of_layer.min():.3f}-{of_layer.max():.3f} a layer"
    )


def describe_totals(records, totals):
    """Keep the figures of the whole run."""
    records.describe("run", "tokens_per_second_overall", totals.tokens_per_second, "tokens/s")
    records.describe("comm", "bytes_of_link", totals.bytes_of_link, "B, rank to rank")
    records.describe("dispatch", "link_sigma_floor", totals.link_sigma_floor, "1")
    records.describe("dispatch", "link_sigma_floor_of_layer", totals.link_sigma_floor_of_layer, "1")
    records.describe("run", "peak_resident_bytes", totals.process.peak, "B")
    records.describe("run", "unshared_bytes", totals.unshared_bytes, "B, mean of a node's ranks")


def make_table(job, totals):
    """Lay out a run's figures -> text."""
    rows = [*rows_of_pace(job, totals), *rows_of_balance(totals), *rows_of_links(job, totals), *rows_of_placement(job)]
    memory = [*rows_of_memory(job.memory, totals), *rows_of_process(job, totals)]
    return "\n\n".join(
        tabulate(table, headers=headers, disable_numparse=True, preserve_whitespace=True)
        for table, headers in (
            (rows, ("figure", "value", "unit")),
            (rows_of_layers(totals), ("layer", "U_e, least - most", "balancedness", "sigma", "its sampling floor")),
            (memory, ("memory of a rank", "as computed", "as measured")),
        )
    )


def rows_of_pace(job, totals):
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


def rows_of_balance(totals):
    """List how evenly experts and links were used."""
    busy = totals.utilisation
    return [
        ("expert utilisation U_e", f"{busy.min():.2f} - {busy.max():.2f}", "actual/expected tokens, least - most"),
        ("balancedness of ranks", f"{totals.balancedness:.3f}", "mean/max tokens that a rank serves, layer by layer"),
        ("link balance sigma", f"{totals.link_sigma:.3f}", "std/mean of a step's tokens per link"),
        ("  its sampling floor", f"{totals.link_sigma_floor:.3f}", "an even router's sigma at a step's token count"),
        ("copies dropped", f"{totals.num_dropped}", ""),
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
    of_ranks, of_nodes = totals.bytes_of_link, sum_by_node(totals.bytes_of_link, job.topology.node_of_rank)
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
    model, sizes = job.config.model, job.stepper.exchange.sizes
    transfers = sizes.top_k * model.num_layers * TRANSFERS[job.config.run.mode]
    seconds = max(totals.seconds, 1e-9)
    bandwidth = compare_bandwidth(bytes_of_link, totals.tokens_per_second, sizes.row_bytes, transfers, seconds)
    if bandwidth is None:
        return []
    carried = bytes_of_link / 1e6
    sigma = carried.std() / max(carried.mean(), 1e-9)
    unit = "MB/s a link"
    counted = f"{unit}, x {sizes.top_k} copies x {TRANSFERS[job.config.run.mode]} ways x {model.num_layers} layers"
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
        for method, seconds in job.layout.seconds_of_method.items()
    ]
    return [
        ("cluster", f"{topology}", ""),
        ("placement", placement.method, f"{placement.slots_per_rank} slots a rank and layer"),
        (f"  objective {placement.objective}", f"{1e3 * placement.objective_seconds:.4f}",
         f"ms a step, {meaning[placement.objective]}"),
        ("  lower bound", f"{1e3 * placement.lower_bound_seconds:.4f}", f"ms a step{', optimal' * placement.optimal}"),
        *others,
        ("  tokens between nodes", f"{100 * placement.cross_node_share:.1f}", "% of the copies, as placed"),
        ("  search", f"{placement.spent.seconds:.3f}", "s"),
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
    process_bytes = job.room.process_bytes
    both = [
        ("the process itself: Python, torch, MPI", process_bytes, totals.process_bytes),
        ("all that it shares with no other (USS)", process_bytes + count_unshared(job.memory, job.stepper.exchange),
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
