"""What a layer of the library needs before it is built: where its experts go, and the buffers for its rows."""

import math

import numpy as np
import torch

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.dispatch.sizes import Sizes, choose_gemm_rows
from hpcmoe.errors import PlacementError
from hpcmoe.experts.options import ExpertsOptions
from hpcmoe.placement.groups import fold_groups, list_groups
from hpcmoe.placement.problem import PlacementProblem, count_slots_per_rank
from hpcmoe.placement.result import Placement, SearchStats, evaluate


def place_layer(options: ExpertsOptions, topology: Topology, mesh: Mesh, where: str) -> Placement:
    """Place a layer's experts as given, else evenly in their order -> Placement of one layer.

    Raises PlacementError that begins with `where` for a placement that does not fit.
    """
    num_ranks, num_experts = mesh.expert_parallel, options.num_experts
    slots = count_slots_per_rank(num_experts, num_ranks, options.spare_slots_per_rank)
    expert_of_slot = deal_experts(num_experts, num_ranks, slots, options.replicate)
    if options.placement:
        expert_of_slot = np.array(options.placement, np.int64)
        if error := find_slot_error(expert_of_slot, num_experts, num_ranks):
            raise PlacementError(f"{where}: placement: {error}")
    problem = make_even_problem(options, topology, mesh, len(expert_of_slot) // num_ranks)
    method = "given" if options.placement else "even"
    return evaluate(problem, expert_of_slot[None], [0.0], method, SearchStats())


def deal_experts(num_experts: int, num_ranks: int, slots: int, replicate: bool) -> np.ndarray:
    """Deal experts evenly to ranks, in order; replicas, if wanted, fill the other slots -> int64 [S], -1: empty."""
    # Give each rank a run of experts.
    expert_at = np.full((num_ranks, slots), -1)
    for rank, experts in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
        expert_at[rank, : len(experts)] = experts

    # Give each free slot the expert with fewest replicas that its rank does not hold, slot by slot over all ranks.
    count = np.ones(num_experts, np.int64)
    for slot, rank in np.argwhere(expert_at.T < 0) if replicate else ():
        held = expert_at[rank][expert_at[rank] >= 0]
        if len(held) < num_experts:
            count_elsewhere = np.where(np.isin(np.arange(num_experts), held), num_ranks + 1, count)
            expert_at[rank, slot] = np.argmin(count_elsewhere)
            count[expert_at[rank, slot]] += 1
    return expert_at.ravel()


def find_slot_error(expert_of_slot: np.ndarray, num_experts: int, num_ranks: int) -> str:
    """Return what is wrong with a given placement [S], "" where nothing is."""
    if len(expert_of_slot) % num_ranks:
        return f"{len(expert_of_slot)} slots: must be a multiple of the {num_ranks} ranks that share the experts"
    if expert_of_slot.max() >= num_experts:
        return f"names expert {expert_of_slot.max()}, num_experts = {num_experts}"
    if missing := np.setdiff1d(np.arange(num_experts), expert_of_slot).tolist():
        return f"has no slot of expert {missing[0]}"
    for rank, held in enumerate(expert_of_slot.reshape(num_ranks, -1)):
        experts, count = np.unique(held[held >= 0], return_counts=True)
        if (count > 1).any():
            return f"rank {rank} holds expert {experts[count > 1][0]} twice"
    return ""


def make_even_problem(options: ExpertsOptions, topology: Topology, mesh: Mesh, slots: int) -> PlacementProblem:
    """Build the placement problem of a layer whose tokens choose all experts alike, with memory for all slots."""
    nodes, network = fold_groups(topology, list_groups(mesh))
    num_nodes = len(network["rack_of_node"])
    return PlacementProblem(
        num_layers=1,
        num_experts=options.num_experts,
        slots_per_rank=slots,
        replicate=options.replicate,
        memory_bytes=np.full(num_nodes, 2**62),
        expert_bytes=1,
        bytes_per_token=options.hidden * getattr(torch, options.dtype).itemsize,
        tokens_of_rank=np.full(mesh.expert_parallel, float(options.max_tokens * options.top_k)),
        probability=np.full((1, num_nodes, options.num_experts), 1 / options.num_experts),
        **network,
    )


def make_layer_sizes(options: ExpertsOptions, mesh: Mesh, num_ranks_with_experts: int, num_in_flight: int) -> Sizes:
    """Compute how many rows of a layer pass through a rank at most, and likely at its experts."""
    dtype, top_k = getattr(torch, options.dtype), options.top_k * mesh.tensor_parallel
    rows = options.max_tokens * top_k
    return Sizes(
        hidden=options.hidden,
        dtype=dtype,
        tokens=options.max_tokens,
        top_k=top_k,
        num_in_flight=num_in_flight,
        num_micro_batches=num_in_flight,
        expert_rows=math.ceil(rows * mesh.expert_parallel / num_ranks_with_experts),
        batch_rows=choose_gemm_rows(options.hidden * dtype.itemsize),
    )
