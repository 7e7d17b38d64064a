"""The ways that rows take in this run, and what room they need on each."""

import dataclasses
import math

import numpy as np
import torch

from hpcmoe.comm.mpi import read_max_tag
from hpcmoe.comm.transport import count_tags
from hpcmoe.dispatch.device import DeviceSizes
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import (
    HostSizes,
    Sizes,
    choose_gemm_rows,
    choose_message_tokens,
    count_messages,
    fit_messages,
    max_messages_sent,
)
from hpcmoe.errors import ConfigError
from hpcmoe.wait import gather_to_all

_ALL_ROWS = 2**62  # of a GEMM: a GPU's are not cut
_SLOWER_LINK = 2.0  # times slower than a node's own memory: then a link is worth sums on the other side


def find_routes(comm, topology, mesh, slots, top_k, same_order):
    """Find the ways of this rank's rows by [comm] -> Routes. Collective over mesh.group.

    same_order: experts see rows in one order on all ranks, which costs overlap, for a rank's own rows are there first.
    """
    nodes = np.array(gather_to_all(mesh.group, int(topology.node_of_rank[mesh.world.rank])))  # [P]
    once = choose_once(comm.once_per_node, topology, nodes, top_k * mesh.tensor_parallel)[
        np.ix_(nodes, nodes)
    ]  # [P, P]
    if not comm.shared_memory:  # each rank is a node of its own
        nodes, once = np.arange(len(nodes)), np.zeros_like(once)
    _, first, nodes = np.unique(nodes, return_index=True, return_inverse=True)
    return make_routes(nodes, mesh.group.rank, slots, once[np.ix_(first, first)], same_order)


def choose_once(once_per_node, topology, node_of_rank, assignments):
    """Choose between which nodes a token goes once for all its experts there -> bool [nodes, nodes].

    By itself where a node's memory is faster than the link, and another rank there can share what one lands.
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


def make_sizes(spec, pipeline, batch_sequences, replicate, mesh):
    """Compute how many rows a micro-batch brings at most to a rank's home, and likely to its experts -> Sizes."""
    model, dtype = spec.model, getattr(torch, spec.model.dtype)
    sequences = math.ceil(math.ceil(batch_sequences / pipeline.micro_batches) / mesh.num_token_shares)
    tokens, assignments = sequences * model.sequence_length, model.top_k * mesh.tensor_parallel

    # With fewer experts than ranks and no replicas, the ranks that hold one serve the others too.
    busy = mesh.expert_parallel if replicate else min(model.num_experts, mesh.expert_parallel)
    return Sizes(
        hidden=model.hidden,
        dtype=dtype,
        tokens=tokens,
        top_k=assignments,
        num_in_flight=pipeline.num_in_flight,
        num_micro_batches=pipeline.micro_batches,
        expert_rows=math.ceil(tokens * assignments * mesh.expert_parallel / busy),
        batch_rows=spec.experts.gemm_rows or choose_gemm_rows(model.hidden * dtype.itemsize),
    )


def make_host_sizes(sizes, comm, topology, routes, trains, deterministic):
    """Compute what of the rows comes in messages by [comm], each token before and its results behind -> HostSizes."""
    num_ranks, row_bytes = len(routes.once), sizes.hidden * sizes.dtype.itemsize
    message_tokens, pool_rows, at_once = 1, 0, 0
    if routes.min_local_peers < num_ranks:  # the same on all ranks
        from_afar = 1 - routes.min_local_peers / num_ranks
        expected = math.ceil(2 * comm.buffer_factor * sizes.expert_rows * from_afar)
        most = comm.pool_bytes // (sizes.num_in_flight * row_bytes)
        wanted = comm.message_rows or choose_message_tokens(
            topology.bytes_per_second, topology.latency_seconds, row_bytes
        )
        wanted = max(min(wanted, sizes.tokens), 1)
        together = min(sizes.top_k, routes.most_served)
        message_tokens, pool_rows, at_once = fit_messages(wanted, expected, most, together, row_bytes)
    return HostSizes(
        **dataclasses.asdict(sizes),
        message_tokens=message_tokens,
        num_messages_sent=max_messages_sent(len(routes.receivers), sizes.tokens, sizes.top_k, message_tokens),
        pool_rows=pool_rows,
        messages_at_once=at_once,
        in_order=deterministic or trains,
        deterministic=deterministic,
    )


def make_device_sizes(sizes, buffer_factor):
    """Compute what buffers on a device hold, where no GEMM is cut -> DeviceSizes."""
    return DeviceSizes(**dataclasses.asdict(sizes) | {"batch_rows": _ALL_ROWS}, buffer_factor=buffer_factor)


def check_tags(sizes, num_layers):
    """Raise ConfigError when this MPI has too few tags for a run's messages: rows between nodes, sums of gradients."""
    max_tag = read_max_tag()
    if num_layers > max_tag:  # 0 is of experts that move
        raise ConfigError(
            f"[model] num_layers = {num_layers}: sums of gradients need tags up to {num_layers}, this MPI's end at "
            f"{max_tag} (MPI_TAG_UB)"
        )
    messages = 1
    if isinstance(sizes, HostSizes):
        messages = count_messages(sizes.tokens, sizes.message_tokens) if sizes.num_messages_sent else 0
    num_tags = count_tags(sizes.num_micro_batches, messages)
    if num_tags > max_tag + 1:
        raise ConfigError(
            f"[pipeline] micro_batches = {sizes.num_micro_batches}, [comm] message_rows: {num_tags // messages} tags x "
            f"{messages} messages from one rank to another = {num_tags}, and this MPI has {max_tag + 1} (MPI_TAG_UB)"
        )


def describe_sizes(sizes, routes):
    """Say what messages take on a rank, and how they travel -> lines."""
    if isinstance(sizes, DeviceSizes):
        return describe_device_sizes(sizes)
    lines = [
        f"rows, on each rank: {sizes.shared_bytes(routes) / 1e6:.1f} MB of memory that {len(routes.local_peers)} ranks of "
        f"its node share + {sizes.send_bytes / 1e6:.1f} MB to send from, for {sizes.num_in_flight} micro-batches in flight"
    ]
    if sizes.num_messages_sent:
        once = f"{len(routes.receivers)} ranks" + " for all of their node" * (routes.most_served > routes.num_slots)
        lines.append(
            f"between nodes: messages of at most {sizes.message_tokens} tokens to {once}; room for those that land: "
            f"{sizes.num_in_flight} x {sizes.pool_rows} rows"
        )
    return lines


def describe_device_sizes(sizes):
    """Say what messages take on a rank's device -> lines."""
    return [
        f"rows, on each rank's device: {sizes.num_in_flight} x ({sizes.home_rows} + {sizes.away_rows}) rows of "
        f"{sizes.row_bytes} B = {sizes.buffer_bytes(None) / 1e6:.1f} MB, for {sizes.num_in_flight} micro-batches in flight"
    ]
