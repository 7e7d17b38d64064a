"""The ways that rows take in this run, and what room they need on each."""

import math

import numpy as np
import torch

from hpcmoe.comm.mpi import read_max_tag
from hpcmoe.comm.transport import count_tags
from hpcmoe.dispatch.device import DeviceSizes
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import (
    HostSizes,
    choose_gemm_rows,
    choose_message_tokens,
    count_messages,
    fit_messages,
    max_messages_sent,
)
from hpcmoe.errors import ConfigError
from hpcmoe.prepare.gpus import describe_device_sizes
from hpcmoe.wait import gather_to_all

_SLOWER_LINK = 2.0  # times slower than a node's own memory: then a link is worth sums on the other side


def find_routes(config, topology, mesh, slots):
    """Find the ways of this rank's rows -> Routes. Collective over mesh.group."""
    nodes = np.array(gather_to_all(mesh.group, int(topology.node_of_rank[mesh.world.rank])))  # [P]
    assignments = config.model.top_k * mesh.tensor_parallel
    once = choose_once(config, topology, nodes, assignments)[np.ix_(nodes, nodes)]  # [P, P]
    if not config.comm.shared_memory:  # each rank is a node of its own
        nodes, once = np.arange(len(nodes)), np.zeros_like(once)
    _, first, nodes = np.unique(nodes, return_index=True, return_inverse=True)
    # One order for all ranks costs overlap, for a rank's own rows are there first: only where experts may move.
    same_order = config.pipeline.deterministic and config.run.mode == "train" and config.rebalance.every > 0
    return make_routes(nodes, mesh.group.rank, slots, once[np.ix_(first, first)], same_order)


def choose_once(config, topology, node_of_rank, assignments):
    """Choose between which nodes a token goes once for all its experts there -> bool [nodes, nodes].

    By itself where a node's memory is faster than the link, and another rank there can share what one lands.
    """
    num_local_peers = np.bincount(node_of_rank, minlength=topology.num_nodes)
    match config.comm.once_per_node:
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


def make_host_sizes(config, topology, mesh, routes):
    """Compute how many rows a micro-batch brings at most to a rank's home, and likely to its experts -> HostSizes."""
    model, pipeline = config.model, config.pipeline
    sequences = math.ceil(math.ceil(config.data.batch_sequences / pipeline.micro_batches) / mesh.num_token_shares)
    tokens, num_ranks = sequences * model.sequence_length, mesh.expert_parallel * mesh.tensor_parallel
    assignments = model.top_k * mesh.tensor_parallel  # of a token: one goes to each shard of each of its experts
    dtype = getattr(torch, model.dtype)
    row_bytes = model.hidden * dtype.itemsize
    num_in_flight = 1 if pipeline.schedule == "serial" else min(pipeline.in_flight, pipeline.micro_batches)

    # With fewer experts than ranks and no replicas, the ranks that hold one serve the others too.
    busy = mesh.expert_parallel if config.placement.replicate else min(model.num_experts, mesh.expert_parallel)
    expert_rows = math.ceil(tokens * assignments * mesh.expert_parallel / busy)

    # Of these some come in messages, each token before and its results behind.
    message_tokens, pool_rows, at_once = 1, 0, 0
    if routes.min_local_peers < num_ranks:  # the same on all ranks
        from_afar = 1 - routes.min_local_peers / num_ranks
        expected = math.ceil(2 * config.comm.buffer_factor * expert_rows * from_afar)
        most = config.comm.pool_bytes // (num_in_flight * row_bytes)
        links = topology.bytes_per_second, topology.latency_seconds
        wanted = config.comm.message_rows or choose_message_tokens(*links, row_bytes)
        wanted = max(min(wanted, tokens), 1)
        together = min(assignments, routes.most_served)
        message_tokens, pool_rows, at_once = fit_messages(wanted, expected, most, together, row_bytes)
    return HostSizes(
        hidden=model.hidden,
        dtype=dtype,
        tokens=tokens,
        top_k=assignments,
        num_in_flight=num_in_flight,
        num_micro_batches=pipeline.micro_batches,
        expert_rows=expert_rows,
        batch_rows=config.experts.gemm_rows or choose_gemm_rows(row_bytes),
        message_tokens=message_tokens,
        num_messages_sent=max_messages_sent(len(routes.receivers), tokens, assignments, message_tokens),
        pool_rows=pool_rows,
        messages_at_once=at_once,
        in_order=pipeline.deterministic or config.run.mode == "train",
        deterministic=pipeline.deterministic,
    )


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
