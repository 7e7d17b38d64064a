"""Totals of a run, gathered from all ranks for the table at its end and for its record."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from hpcmoe.clock import Timer
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.config import NetworkSpec
from hpcmoe.errors import on_root
from hpcmoe.placement.result import Placement
from hpcmoe.prepare.activations import measure_memory
from hpcmoe.prepare.budget import MemoryBudget
from hpcmoe.prepare.memory import Memory
from hpcmoe.prepare.placement import RunPlacement
from hpcmoe.prepare.process import ProcessMemory, count_unshared, mean_of_fullest_node, read_process
from hpcmoe.report.batches import BatchSizes, record_batches
from hpcmoe.report.meter import MEANS, Meter
from hpcmoe.report.metrics import SIGMA_AIM, Recorder, compute_sampling_floor
from hpcmoe.wait import gather_to_all, wait_all


class MeasuredRun(Protocol):
    """What the report reads of a run."""

    budget: MemoryBudget
    memory: Memory  # of a rank, as estimated
    stepper: Any  # its network, dispatcher and activation tracker
    meter: Meter
    staged_bytes: int  # the most that this rank has held of experts that move to it
    loss_unit: str  # nats of what

    @property
    def mesh(self) -> Mesh:
        """Return the ranks' mesh."""

    @property
    def topology(self) -> Topology:
        """Return where the ranks are."""

    @property
    def run_placement(self) -> RunPlacement:
        """Return the present placement, and what other methods would have given."""

    @property
    def spec(self) -> NetworkSpec:
        """Return the network's keys."""

    @property
    def sequences_of_rank(self) -> np.ndarray:
        """Return the sequences of a step's batch that each rank reads, [ranks]."""

    @property
    def placement(self) -> Placement:
        """Return the present placement."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What all ranks did in the measured steps."""

    num_steps: int
    num_tokens: int
    num_dropped: int
    seconds: float  # wall-clock of rank 0
    seconds_of_stage: dict[Timer, float]  # mean over the ranks
    bytes_of_link: np.ndarray | None  # [P, P] bytes sent from rank to rank; on rank 0 alone
    utilisation: np.ndarray  # U_e [L, E], mean over the steps
    balancedness: float  # of the ranks, mean / max of the tokens served; mean over the steps
    balancedness_of_layer: np.ndarray  # [L]
    link_sigma: float  # mean over the steps
    link_sigma_of_layer: np.ndarray  # [L]
    link_sigma_floor: float  # of a step
    link_sigma_floor_of_layer: np.ndarray  # [L]
    batches: BatchSizes  # of the experts' GEMMs
    measured: Memory  # of the rank that took most
    process: ProcessMemory  # of the process that took most at its peak
    process_bytes: int  # unshared memory of a process beside its arrays, mean of a node's ranks; of the fullest node
    unshared_bytes: int  # unshared memory of a process, mean of a node's ranks; of the fullest node
    losses: dict[str, float]  # by name, in the loss_unit; perplexities
    loss_unit: str  # nats of what
    hidden_share: float | None = None  # of the transfers, behind the experts' work; None where it was not traced

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of all ranks per wall-clock second."""
        return self.num_tokens / max(self.seconds, 1e-9)


def gather_totals(run: MeasuredRun, optimizer: Any, losses: dict[str, float], snapshot_bytes: int) -> Totals:
    """Gather a run's totals -> Totals, on all ranks but for bytes_of_link. Collective over world.

    snapshot_bytes: of this rank's snapshot of the state for checkpoints.
    """
    meter, world, model, dispatcher = run.meter, run.mesh.world, run.spec.model, run.stepper.dispatcher

    # Measure the memory of this rank, and gather that of all.
    measured = measure_memory(run.stepper.network, optimizer and optimizer.adamw, dispatcher, run.stepper.tracker)
    measured = dataclasses.replace(measured, snapshot=snapshot_bytes, moving=run.staged_bytes)
    process = read_process()
    beside = process.unshared - count_unshared(measured, dispatcher)
    everyone = gather_to_all(world, (measured, process, beside))
    node_of_rank = run.topology.node_of_rank

    # Sum the experts' batches, and average what was metered in each step.
    meter.batches.credit_experts(run.placement, run.mesh.expert_index)
    floor, floor_of_layer = on_root(world, lambda: compute_sampling_floors(run))
    means = {name: meter.sums[name] / max(meter.num_steps, 1) for name in MEANS}
    return Totals(
        num_steps=meter.num_steps,
        seconds_of_stage=meter.seconds_of_stage,
        bytes_of_link=gather_traffic(run.mesh, meter.rows_to_peer * dispatcher.sizes.row_bytes),
        link_sigma_floor=floor,
        link_sigma_floor_of_layer=floor_of_layer,
        batches=meter.batches.sum_over(world, model.num_layers, model.num_experts),
        measured=max((memory for memory, _, _ in everyone), key=lambda memory: memory.total),
        process=max((process for _, process, _ in everyone), key=lambda process: process.peak),
        process_bytes=mean_of_fullest_node([beside for _, _, beside in everyone], node_of_rank),
        unshared_bytes=mean_of_fullest_node([process.unshared for _, process, _ in everyone], node_of_rank),
        losses=losses,
        loss_unit=run.loss_unit,
        hidden_share=meter.hidden_share,
        **meter.sums | means,
    )


def gather_traffic(mesh: Mesh, bytes_to_peer: np.ndarray) -> np.ndarray | None:
    """Gather the bytes that each rank sent to its group -> [P, P] on rank 0, else None. Collective over world."""
    world = mesh.world
    sent = np.zeros(world.size)
    sent[gather_to_all(mesh.group, world.rank)] = bytes_to_peer
    everyone = np.empty((world.size, world.size)) if world.rank == 0 else None
    wait_all([world.Igather(sent, everyone)])
    return everyone


def compute_sampling_floors(run: MeasuredRun) -> tuple[float, np.ndarray]:
    """Compute the sampling floor of a step's link sigma -> (of all layers together, of each [L])."""
    model = run.spec.model
    tokens = run.sequences_of_rank[: run.mesh.group.size] * model.sequence_length  # of the first group

    def floor(layers: Iterable[int]) -> float:
        return compute_sampling_floor(run.placement, tokens, model.top_k, model.num_experts, layers)

    return floor(range(model.num_layers)), np.array([floor([layer]) for layer in range(model.num_layers)])


def format_sampling_floors(run: MeasuredRun) -> str:
    """Format how uneven links would be under an even router, for the log. Collective over world."""
    floor, of_layer = on_root(run.mesh.world, lambda: compute_sampling_floors(run))
    return (
        f"sigma of links under an even router, which draws finitely many tokens: {floor:.3f} a step, "
        f"{of_layer.min():.3f}-{of_layer.max():.3f} a layer"
    )


def record_totals(records: Recorder, totals: Totals) -> None:
    """Record the figures of the whole run."""
    records.describe("run", "tokens_per_second_overall", totals.tokens_per_second, "tokens/s")
    records.describe("comm", "bytes_of_link", totals.bytes_of_link, "B, rank to rank")
    if totals.hidden_share is not None:
        records.describe("comm", "hidden_share", totals.hidden_share, "1, of the transfers, behind the experts' work")
    records.describe("dispatch", "link_sigma_floor", totals.link_sigma_floor, "1")
    records.describe("dispatch", "link_sigma_floor_of_layer", totals.link_sigma_floor_of_layer, "1")
    records.describe("dispatch", "link_sigma_aim", SIGMA_AIM, "1, an even exchange has less")
    record_batches(records, totals.batches)
    records.describe("run", "peak_resident_bytes", totals.process.peak, "B")
    records.describe("run", "unshared_bytes", totals.unshared_bytes, "B, mean of a node's ranks")
