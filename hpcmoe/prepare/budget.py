"""The memory budget of experts: a first look before torch is imported, then exactly, node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcmoe.cluster.topology import Topology
from hpcmoe.config import NetworkSpec
from hpcmoe.errors import ClusterError, PlacementError
from hpcmoe.experts.shapes import estimate_expert, make_expert_shape
from hpcmoe.messages import format_size

if TYPE_CHECKING:
    from hpcmoe.prepare.memory import Memory  # imports torch

GPU_LIBRARY_BYTES = 10**9  # of a rank's GPU for CUDA's kernels and cuBLAS, 0.2 GB on an H200, and holes in torch's pool
COMMUNICATOR_BYTES = 16 * 10**8  # there, of an NCCL communicator; measured of two ranks that share an H200, NCCL 2.32
_MAX_NODE_NAMES = 4  # of nodes that are alike, in a line


def check_budget(spec: NetworkSpec, copies: int, topology: Topology) -> None:
    """Raise PlacementError when all experts with their state, so many times, take more than all nodes' memory."""
    model, (num_bytes, states) = spec.model, estimate_expert(make_expert_shape(spec), spec.trains)
    needed = copies * model.num_experts * model.num_layers * num_bytes * states
    there = int(topology.memory_bytes.sum())
    if needed > there:
        raise PlacementError(
            f"{copies} x {model.num_experts} experts x {model.num_layers} layers x {num_bytes * states / 1e9:.3g} GB = "
            f"{needed / 1e9:.3g} GB do not fit into the {there / 1e9:.3g} GB of {topology}; "
            "[model] num_experts, [cluster] memory_bytes_per_node"
        )


def may_use_gpus(device: str, memory_bytes_per_node: int, topology: Topology) -> bool:
    """Return True if experts may lie on GPUs whose memory [cluster] memory_bytes_per_node does not give."""
    may = device == "cuda" or (device == "auto" and bool(topology.devices_of_node.any()))
    return may and not memory_bytes_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What each node has for experts, and what its ranks need besides."""

    what: str  # memory, or GPU memory
    node_bytes: np.ndarray  # [nodes] for all ranks there
    num_ranks: np.ndarray  # [nodes]
    needs: dict[str, int]  # what each rank needs besides experts: bytes
    process_bytes: int = 0  # of a rank's process in the steps, beside the arrays that are counted

    @property
    def bytes_for_experts(self) -> np.ndarray:
        """Return what is left on each node: [nodes] bytes, not below 0."""
        return np.maximum(self.node_bytes - self.num_ranks * sum(self.needs.values()), 0)

    def __str__(self) -> str:
        total, parts = format_size(sum(self.needs.values())), format_needs(self.needs, ", ")
        return f"of its node's {self.what} each rank needs {total} besides: {parts}"


def make_budget(
    topology: Topology, memory: Memory, process_bytes: int, share_of_gpu: np.ndarray | None, num_communicators: int = 0
) -> MemoryBudget:
    """Compute the memory budget for experts on each node.

    share_of_gpu [ranks] is the free memory of each rank's GPU over its ranks, None without GPUs or where the config
    gives the memory; num_communicators are those of NCCL that join a rank to others. With GPUs the host's memory holds
    the process, experts that are received, and the copy for checkpoints: ClusterError where it cannot.
    """
    # Count what each rank needs, by where it lies.
    messages, process = {"messages": memory.buffers}, {"process": process_bytes}
    on_host = {"experts that come": memory.moving, "copy for checkpoints": memory.snapshot}
    beside_experts = {
        "dense parts": memory.dense_with_state,
        "matrices cast or packed": memory.copies,
        "activations": memory.activations,
        "experts at work": memory.working,
    }

    # Give each node its own memory, or that of its tightest GPU to each of its ranks.
    num_ranks, what, node_bytes = np.bincount(topology.node_of_rank), "memory", topology.memory_bytes
    if share_of_gpu is None:
        needs = process | messages | on_host | beside_experts
    else:
        check_host(topology, num_ranks, process | on_host)
        least = np.full(len(num_ranks), np.inf)
        np.minimum.at(least, topology.node_of_rank, share_of_gpu)
        what, node_bytes = "GPU memory", least * num_ranks
        libraries = {"libraries": GPU_LIBRARY_BYTES + num_communicators * COMMUNICATOR_BYTES}
        needs = messages | beside_experts | libraries
    return MemoryBudget(what=what, node_bytes=node_bytes, num_ranks=num_ranks, needs=needs, process_bytes=process_bytes)


def check_host(topology: Topology, num_ranks: np.ndarray, needs: dict[str, int]) -> None:
    """Raise ClusterError where a node's memory does not hold what each of its ranks needs there beside its GPU."""
    for node, (there, ranks) in enumerate(zip(topology.memory_bytes.tolist(), num_ranks.tolist(), strict=True)):
        needed, name = ranks * sum(needs.values()), topology.node_names[node]
        if needed > there:
            raise ClusterError(
                f"node {name}: {ranks} ranks x ({format_needs(needs, ' + ')}) = {format_size(needed)} do not fit into "
                f"the {format_size(there)} of its memory; fewer ranks a node, or [write] asynchronous = false"
            )


def share_gpu_memory(gpus: Sequence[tuple[str, int] | None]) -> np.ndarray | None:
    """Share each GPU's free memory among its ranks: (name, bytes) of each rank, None on the host -> [ranks] or None."""
    known = [gpu for gpu in gpus if gpu is not None]
    if len(known) < len(gpus):
        return None
    names = [name for name, _ in known]
    least = {name: min(free for other, free in known if other == name) for name in set(names)}
    return np.array([least[name] / names.count(name) for name in names])


def record_gpu_memory(topology: Topology, share_of_gpu: np.ndarray | None) -> Topology:
    """Return the topology with the free memory of each node's GPUs: share_of_gpu [ranks] of each rank, or None."""
    if share_of_gpu is None:
        return topology
    free = [share_of_gpu[topology.ranks_of_node(node)].sum() for node in range(topology.num_nodes)]
    return dataclasses.replace(
        topology,
        device_memory_bytes=np.array(free, np.int64),
        source=topology.source | {"device memory": "CUDA, when the ranks opened their devices"},
    )


def format_budget(budget: MemoryBudget, topology: Topology, expert_bytes: int, num_layers: int) -> list[str]:
    """Format the memory budget, a line for all nodes that are alike."""
    needs = format_needs(budget.needs, " + ")
    names_of_line: dict[str, list[str]] = {}
    for node, name in enumerate(topology.node_names):
        there, left = int(budget.node_bytes[node]), int(budget.bytes_for_experts[node])
        line = (
            f"{format_size(there)} - {budget.num_ranks[node]} ranks x ({needs}) = {format_size(left)} for experts of "
            f"{format_size(expert_bytes)}, holds {left // (expert_bytes * num_layers)} a layer"
        )
        names_of_line.setdefault(line, []).append(name)
    return [f"{budget.what} of {list_names(names)}: {line}" for line, names in names_of_line.items()]


def format_needs(needs: dict[str, int], separator: str) -> str:
    """Format what needs how many bytes, without what needs none."""
    return separator.join(f"{name} {format_size(num_bytes)}" for name, num_bytes in needs.items() if num_bytes)


def list_names(names: list[str]) -> str:
    """Format the names of a few nodes and the number of the others."""
    if len(names) == 1:
        return f"node {names[0]}"
    others = f" and {len(names) - _MAX_NODE_NAMES} more" * (len(names) > _MAX_NODE_NAMES)
    return f"nodes {', '.join(names[:_MAX_NODE_NAMES])}{others}, each"
