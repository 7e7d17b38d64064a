"""The routes that rows take in this run, and the sizes of their buffers, from the config."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.mpi import read_max_tag
from hpcmoe.comm.transport import count_tags
from hpcmoe.config import CommConfig, NetworkSpec, PipelineConfig
from hpcmoe.dispatch.routes import Routes, make_routes
from hpcmoe.dispatch.sizes import AnySizes, DeviceSizes, HostSizes, Sizes, choose_gemm_rows, count_messages
from hpcmoe.errors import ConfigError
from hpcmoe.experts.options import ExpertsOptions
from hpcmoe.wait import gather_to_all

_SLOWER_LINK = 2.0  # times slower than a node's own memory: then a link is worth sums on the other side


def find_routes(comm: CommConfig, topology: Topology, mesh: Mesh, slots: int, top_k: int, same_order: bool) -> Routes:
    """Find the routes of this rank's rows by [comm]. Collective over mesh.group.

    same_order: experts see rows in one order on all ranks, which costs overlap, for a rank's own rows are there first.
    """
    nodes = np.array(gather_to_all(mesh.group, int(topology.node_of_rank[mesh.world.rank])))  # [P]
    once = choose_once(comm.once_per_node, topology, nodes, top_k * mesh.tensor_parallel)
    once = once[np.ix_(nodes, nodes)]  # [P, P]
    if not comm.shared_memory:  # each rank is a node of its own
        nodes, once = np.arange(len(nodes)), np.zeros_like(once)
    _, first, nodes = np.unique(nodes, return_index=True, return_inverse=True)
    return make_routes(nodes, mesh.group.rank, slots, once[np.ix_(first, first)], same_order)


def choose_once(once_per_node: str, topology: Topology, node_of_rank: np.ndarray, assignments: int) -> np.ndarray:
    """Choose between which nodes a token goes once for all its experts there -> bool [nodes, nodes].

    "auto" does so where a node's memory is faster than the link, and another rank there can share what one receives.
    """
    num_local_peers = np.bincount(node_of_rank, minlength=topology.num_nodes)
    match once_per_node:
        case "on":
            return np.ones((topology.num_nodes, topology.num_nodes), bool)
        case "off":
            return np.zeros((topology.num_nodes, topology.num_nodes), bool)
        case "racks":
            return np.not_equal.outer(topology.rack_of_node, topology.rack_of_node)
        case _:
            within = np.diag(topology.bytes_per_second)
            slower = topology.bytes_per_second * _SLOWER_LINK < within[None, :]
            return slower & (num_local_peers > 1)[None, :] & (assignments > 1)


def make_sizes(spec: NetworkSpec, pipeline: PipelineConfig, batch_sequences: int, replicate: bool, mesh: Mesh) -> Sizes:
    """Compute how many rows a micro-batch has at most at a rank's home, and likely at its experts."""
    model, dtype = spec.model, getattr(torch, spec.model.dtype)
    sequences = math.ceil(math.ceil(batch_sequences / pipeline.micro_batches) / mesh.num_token_shares)
    tokens, top_k = sequences * model.sequence_length, model.top_k * mesh.tensor_parallel
    # With fewer experts than ranks and no replicas, the ranks that hold one serve the others too.
    busy = mesh.expert_parallel if replicate else min(model.num_experts, mesh.expert_parallel)
    return Sizes(
        hidden=model.hidden,
        dtype=dtype,
        tokens=tokens,
        top_k=top_k,
        num_in_flight=pipeline.num_in_flight,
        num_micro_batches=pipeline.micro_batches,
        expert_rows=math.ceil(tokens * top_k * mesh.expert_parallel / busy),
        batch_rows=spec.experts.gemm_rows or choose_gemm_rows(model.hidden * dtype.itemsize),
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


def check_tags(sizes: AnySizes, num_layers: int) -> None:
    """Raise ConfigError when this MPI has too few tags for a run's messages: rows between nodes, sums of gradients."""
    # Check the sums of gradients, one tag a layer; 0 is of experts that move.
    max_tag = read_max_tag()
    if num_layers > max_tag:
        raise ConfigError(
            f"[model] num_layers = {num_layers}: sums of gradients need tags up to {num_layers}, this MPI's end at "
            f"{max_tag} (MPI_TAG_UB)"
        )

    # Check the rows between nodes, several tags a micro-batch and message.
    messages = 1
    if isinstance(sizes, HostSizes):
        messages = count_messages(sizes.tokens, sizes.message_tokens) if sizes.num_messages_sent else 0
    num_tags = count_tags(sizes.num_micro_batches, messages)
    if num_tags > max_tag + 1:
        raise ConfigError(
            f"[pipeline] micro_batches = {sizes.num_micro_batches}, [comm] message_rows: {num_tags // messages} tags x "
            f"{messages} messages from one rank to another = {num_tags}, and this MPI has {max_tag + 1} (MPI_TAG_UB)"
        )


def format_sizes(sizes: AnySizes, routes: Routes) -> Iterator[str]:
    """Format the sizes of a rank's buffers, and how its messages travel -> lines."""
    in_flight = f"for {sizes.num_in_flight} micro-batches in flight"
    if isinstance(sizes, DeviceSizes):
        yield (
            f"rows, on each rank's device: {sizes.num_in_flight} x ({sizes.home_rows} + {sizes.away_rows}) rows of "
            f"{sizes.row_bytes} B = {sizes.buffer_bytes(None) / 1e6:.1f} MB, {in_flight}"
        )
        return
    yield (
        f"rows, on each rank: {sizes.shared_bytes(routes) / 1e6:.1f} MB of memory that {len(routes.local_peers)} ranks "
        f"of its node share + {sizes.send_bytes / 1e6:.1f} MB to send from, {in_flight}"
    )
    if sizes.num_messages_sent:
        once = f"{len(routes.receivers)} ranks" + " for all of their node" * (routes.most_served > routes.num_slots)
        yield (
            f"between nodes: messages of at most {sizes.message_tokens} tokens to {once}; room for those that land: "
            f"{sizes.num_in_flight} x {sizes.pool_rows} rows"
        )
