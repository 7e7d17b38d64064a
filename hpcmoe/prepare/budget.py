"""The memory that experts may take: a first look before torch is imported, then exactly, node by node."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from hpcmoe.errors import ClusterError, PlacementError
from hpcmoe.experts.shapes import estimate_expert
from hpcmoe.model.text import VOCABULARY_SIZE
from hpcmoe.placement.problem import format_size

FLOAT32_BYTES = 4  # bytes
GPU_LIBRARY_BYTES = 10**9  # of a rank's GPU for CUDA's kernels and cuBLAS, 0.2 GB on an H200, and holes in torch's pool
COMMUNICATOR_BYTES = 16 * 10**8  # there, of an NCCL communicator; measured of two ranks that share an H200, NCCL 2.32
_MAX_NODE_NAMES = 4  # of nodes that are alike, in a line


def count_dense_parameters(model):
    """Numbers outside the experts: embedding, positions, norms, attention, routers, head."""
    block = model.hidden + model.num_experts * model.hidden
    if model.attention:
        block += model.hidden + 4 * model.hidden**2
    return model.num_layers * block + model.hidden + (2 * VOCABULARY_SIZE + model.sequence_length) * model.hidden


def check_budget(spec, copies, topology):
    """Raise PlacementError when all experts with their state, so many times, take more than all nodes' memory."""
    model, (num_bytes, states) = spec.model, estimate_expert(spec)
    needed = copies * model.num_experts * model.num_layers * num_bytes * states
    there = int(topology.memory_bytes.sum())
    if needed > there:
        raise PlacementError(
            f"{copies} x {model.num_experts} experts x {model.num_layers} layers x {num_bytes * states / 1e9:.3g} GB = "
            f"{needed / 1e9:.3g} GB do not fit into the {there / 1e9:.3g} GB of {topology}; "
            "[model] num_experts, [cluster] memory_bytes_per_node"
        )


def may_use_gpus(device, memory_bytes_per_node, topology):
    """Return True if experts will, or may, lie on GPUs whose memory [cluster] memory_bytes_per_node does not tell."""
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
    def bytes_for_experts(self):
        """What is left on each node -> [nodes] bytes, not below 0."""
        return np.maximum(self.node_bytes - self.num_ranks * sum(self.needs.values()), 0)

    def __str__(self):
        """Say what each rank needs besides experts."""
        parts = join_needs(self.needs, ", ")
        return f"of its node's {self.what} each rank needs {format_size(sum(self.needs.values()))} besides: {parts}"


def make_budget(topology, memory, process_bytes, share_of_gpu, num_communicators=0):
    """Compute the memory budget for experts on each node -> MemoryBudget.

    share_of_gpu [ranks] is the free memory of each rank's GPU over its ranks, None without GPUs or where the config
    tells the memory; num_communicators are those of NCCL that join a rank to others. With GPUs the host's memory bears
    the process, what comes of experts that move, and the copy for checkpoints: ClusterError where it cannot.
    """
    num_ranks = np.bincount(topology.node_of_rank)
    messages = {"messages": memory.buffers}
    process = {"process": process_bytes}
    on_host = {"experts that come": memory.moving, "copy for checkpoints": memory.snapshot}
    rest = {
        "dense parts": memory.dense_with_state,
        "matrices cast or packed": memory.copies,
        "activations": memory.activations,
        "experts at work": memory.working,
    }
    if share_of_gpu is None:
        return MemoryBudget(
            what="memory",
            node_bytes=topology.memory_bytes,
            num_ranks=num_ranks,
            needs=process | messages | on_host | rest,
            process_bytes=process_bytes,
        )
    check_host(topology, num_ranks, process | on_host)
    least = np.full(len(num_ranks), np.inf)
    np.minimum.at(least, topology.node_of_rank, share_of_gpu)
    return MemoryBudget(
        what="GPU memory",
        node_bytes=least * num_ranks,
        num_ranks=num_ranks,
        needs=messages | rest | {"libraries": GPU_LIBRARY_BYTES + num_communicators * COMMUNICATOR_BYTES},
        process_bytes=process_bytes,
    )


def check_host(topology, num_ranks, needs):
    """Raise ClusterError where a node's memory does not hold what each of its ranks needs there beside its GPU."""
    for node, (there, ranks) in enumerate(zip(topology.memory_bytes.tolist(), num_ranks.tolist(), strict=True)):
        needed = ranks * sum(needs.values())
        if needed > there:
            parts = join_needs(needs, " + ")
            raise ClusterError(
                f"{list_names([topology.node_names[node]])}: {ranks} ranks x ({parts}) = {format_size(needed)} do not fit "
                f"into the {format_size(there)} of its memory; fewer ranks a node, or [write] asynchronous = false"
            )


def share_gpu_memory(gpus):
    """Share each GPU's free memory among its ranks: (name, bytes) of each rank, None on the host -> [ranks] or None."""
    if None in gpus:
        return None
    names = [name for name, _ in gpus]
    least = {name: min(free for other, free in gpus if other == name) for name in set(names)}
    return np.array([least[name] / names.count(name) for name in names])


def record_gpu_memory(topology, share_of_gpu):
    """Keep in the topology what each node's GPUs have free for its ranks, share_of_gpu [ranks] or None -> Topology."""
    if share_of_gpu is None:
        return topology
    free = [share_of_gpu[topology.ranks_of_node(node)].sum() for node in range(topology.num_nodes)]
    return dataclasses.replace(
        topology,
        device_memory_bytes=np.array(free, np.int64),
        source=topology.source | {"device memory": "CUDA, when the ranks opened their devices"},
    )


def describe_budget(budget, topology, expert_bytes, num_layers):
    """Write the memory budget, a line for all nodes that are alike -> list of lines."""
    besides = join_needs(budget.needs, " + ")
    names_of_line = {}
    for node, name in enumerate(topology.node_names):
        left = int(budget.bytes_for_experts[node])
        line = (
            f"{format_size(int(budget.node_bytes[node]))} - {budget.num_ranks[node]} ranks x ({besides}) = {format_size(left)} "
            f"for experts of {format_size(expert_bytes)}, holds {left // (expert_bytes * num_layers)} a layer"
        )
        names_of_line.setdefault(line, []).append(name)
    return [f"{budget.what} of {list_names(names)}: {line}" for line, names in names_of_line.items()]


def join_needs(needs, between):
    """Write out what needs how many bytes, but for what needs none."""
    return between.join(f"{name} {format_size(num_bytes)}" for name, num_bytes in needs.items() if num_bytes)


def list_names(names):
    """Name a few nodes and count the others."""
    listed = ", ".join(names[:_MAX_NODE_NAMES]) + (
        f" and {len(names) - _MAX_NODE_NAMES} more" if len(names) > _MAX_NODE_NAMES else ""
    )
    return f"node{'s' * (len(names) > 1)} {listed}" + ", each" * (len(names) > 1)
