"""What a run came to, gathered from all ranks: for the table at its end and for its record."""

import dataclasses

import numpy as np

from hpcmoe.errors import on_root
from hpcmoe.prepare.activations import measure_memory
from hpcmoe.prepare.memory import Memory
from hpcmoe.prepare.process import ProcessMemory, count_unshared, mean_of_fullest_node, read_process
from hpcmoe.report.batches import BatchSizes, record_batches, sum_batches
from hpcmoe.report.metrics import SIGMA_AIM, compute_sampling_floor
from hpcmoe.wait import gather_to_all, wait_all


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
    batches: BatchSizes  # on which the experts worked
    measured: Memory  # of the rank that took most
    process: ProcessMemory  # of the process that took most at its peak
    process_bytes: int  # what a process had unshared beside its arrays, mean of a node's ranks; on the fullest node
    unshared_bytes: int  # what a process had unshared, mean of a node's ranks; on the fullest node
    losses: dict  # name: nats a byte

    @property
    def tokens_per_second(self):
        """Tokens of all ranks by wall-clock second."""
        return self.num_tokens / max(self.seconds, 1e-9)


def gather_totals(job, optimizer, losses, snapshot_bytes):
    """Gather a run's totals -> Totals, on all ranks but for bytes_of_link. Collective over all ranks.

    snapshot_bytes: what this rank's copy of the state for checkpoints takes.
    """
    meter, world = job.meter, job.mesh.world
    stepper, adamw = job.stepper, optimizer and optimizer.adamw
    measured = measure_memory(stepper.network, adamw, stepper.dispatcher, stepper.tracker)
    measured = dataclasses.replace(measured, snapshot=snapshot_bytes, moving=job.staged_bytes)
    process = read_process()
    beside = process.unshared - count_unshared(measured, job.stepper.dispatcher)
    everyone = gather_to_all(world, (measured, process, beside))
    nodes = job.topology.node_of_rank
    steps = max(meter.num_steps, 1)
    floor, floor_of_layer = on_root(world, lambda: compute_sampling_floors(job))
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
        batches=sum_batches(job),
        measured=max((memory for memory, _, _ in everyone), key=lambda memory: memory.total),
        process=max((process for _, process, _ in everyone), key=lambda process: process.peak),
        process_bytes=mean_of_fullest_node([beside for _, _, beside in everyone], nodes),
        unshared_bytes=mean_of_fullest_node([process.unshared for _, process, _ in everyone], nodes),
        losses=losses,
    )


def gather_traffic(job):
    """Gather the bytes that each rank sent to each other -> [P, P] on rank 0, else None. Collective over all ranks."""
    world, row_bytes = job.mesh.world, job.stepper.dispatcher.sizes.row_bytes
    sent = np.zeros(world.size)
    sent[gather_to_all(job.mesh.group, world.rank)] = job.meter.rows_to_peer * row_bytes
    everyone = np.empty((world.size, world.size)) if world.rank == 0 else None
    wait_all([world.Igather(sent, everyone)])
    return everyone


def compute_sampling_floors(job):
    """Compute the sampling floor of a step's link sigma -> (of all layers together, of each [L])."""
    model = job.spec.model
    tokens = job.sequences_of_rank[: job.mesh.group.size] * model.sequence_length  # of the first group

    def floor(layers):
        return compute_sampling_floor(job.placement, tokens, model.top_k, model.num_experts, layers)

    return floor(range(model.num_layers)), np.array([floor([layer]) for layer in range(model.num_layers)])


def format_sampling_floors(job):
    """Say how uneven links would be under an even router -> a line for the log. Collective over all ranks."""
    floor, of_layer = on_root(job.mesh.world, lambda: compute_sampling_floors(job))
    return (
        f"sigma of links under an even router, which draws finitely many tokens: {floor:.3f} a step, "
        f"{of_layer.min():.3f}-{of_layer.max():.3f} a layer"
    )


def record_totals(records, totals):
    """Keep the figures of the whole run."""
    records.describe("run", "tokens_per_second_overall", totals.tokens_per_second, "tokens/s")
    records.describe("comm", "bytes_of_link", totals.bytes_of_link, "B, rank to rank")
    records.describe("dispatch", "link_sigma_floor", totals.link_sigma_floor, "1")
    records.describe("dispatch", "link_sigma_floor_of_layer", totals.link_sigma_floor_of_layer, "1")
    records.describe("dispatch", "link_sigma_aim", SIGMA_AIM, "1, an even exchange has less")
    record_batches(records, totals.batches)
    records.describe("run", "peak_resident_bytes", totals.process.peak, "B")
    records.describe("run", "unshared_bytes", totals.unshared_bytes, "B, mean of a node's ranks")
