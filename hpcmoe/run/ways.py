"""The ways that rows take in this run, and what room they need on each."""

import math

import numpy as np
import torch

from hpcmoe.dispatch.device_exchange import DeviceSizes
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import Sizes, choose_gemm_rows, choose_parcel_tokens, fit_parcels, most_parcels
from hpcmoe.run.gpus import describe_device_ways
from hpcmoe.wait import gather_to_all

SLOWER = 2.0  # times slower than a node's own memory: then a link is worth sums on the other side


def find_routes(config, topology, mesh, slots):
    """Find the ways of this rank's rows -> Routes. Collective over mesh.ep and mesh.tp.

    The ranks of a tensor-parallel group must meet the same rows in the same batches: mates are only those that share a
    node in every one of its expert-parallel groups.
    """
    nodes = np.array(gather_to_all(mesh.ep, int(topology.node_of_rank[mesh.world.rank])))  # [P]
    once = choose_once(config, topology, nodes)[np.ix_(nodes, nodes)]  # [P, P]
    if not config.comm.shared_memory:  # each rank is a node of its own
        nodes, once = np.arange(len(nodes)), np.zeros_like(once)
    nodes, once = fold_nodes(gather_to_all(mesh.tp, (nodes, once)))
    return make_routes(nodes, mesh.ep.rank, slots, once)


def fold_nodes(groups):
    """See several expert-parallel groups as one: (node of each rank [P], once [P, P]) of each -> (nodes [P], once).

    Ranks are on one node where they are in all groups; a token goes to a node once where it does in all. once is
    [nodes, nodes] of the new nodes.
    """
    _, first, nodes = np.unique([n for n, _ in groups], axis=1, return_index=True, return_inverse=True)
    once = np.logical_and.reduce([o for _, o in groups])
    return nodes.ravel(), once[np.ix_(first, first)]


def choose_once(config, topology, node_of_rank):
    """Choose between which nodes a token goes once for all its experts there -> bool [nodes, nodes].

    By itself where a node's memory is faster than the link, and another rank there can share what one lands.
    """
    num_mates = np.bincount(node_of_rank, minlength=topology.num_nodes)
    match config.comm.once_per_node:
        case "on":
            return np.ones((topology.num_nodes, topology.num_nodes), bool)
        case "off":
            return np.zeros((topology.num_nodes, topology.num_nodes), bool)
        case "racks":
            return np.not_equal.outer(topology.rack_of_node, topology.rack_of_node)
        case _:
            within = np.diag(topology.bytes_per_second)
            slower = topology.bytes_per_second * SLOWER < within[None, :]
            return slower & (num_mates > 1)[None, :] & (config.model.top_k > 1)


def reckon_sizes(config, topology, mesh, routes):
    """Compute how many rows a micro-batch brings at most to a rank's home, and likely to its experts -> Sizes."""
    model, pipeline, cluster = config.model, config.pipeline, config.cluster
    sequences = math.ceil(math.ceil(config.data.batch_sequences / pipeline.micro_batches) / mesh.num_token_shares)
    tokens, num_ranks = sequences * model.sequence_length, mesh.expert_parallel
    dtype = getattr(torch, model.dtype)
    row_bytes = model.hidden * dtype.itemsize
    num_berths = 1 if pipeline.schedule == "serial" else min(pipeline.in_flight, pipeline.micro_batches)

    # With fewer experts than ranks and no replicas, the ranks that hold one serve the others too.
    busy = num_ranks if cluster.replicate else min(model.num_experts, num_ranks)
    expert_rows = math.ceil(tokens * model.top_k * num_ranks / busy)

    # Of these some come in parcels, each token before and its results behind.
    parcel_tokens, pool_rows, at_once = 1, 0, 0
    if routes.fewest_mates < num_ranks:  # the same on all ranks
        from_afar = 1 - routes.fewest_mates / num_ranks
        expected = math.ceil(2 * config.comm.buffer_factor * expert_rows * from_afar)
        most = config.comm.pool_bytes // (num_berths * row_bytes)
        links = topology.bytes_per_second, topology.latency_seconds
        wanted = config.comm.message_rows or choose_parcel_tokens(*links, row_bytes)
        wanted = max(min(wanted, tokens), 1)
        copies = min(model.top_k, routes.most_served)
        parcel_tokens, pool_rows, at_once = fit_parcels(wanted, expected, most, copies, row_bytes)
    return Sizes(
        hidden=model.hidden,
        dtype=dtype,
        tokens=tokens,
        top_k=model.top_k,
        num_berths=num_berths,
        num_micro_batches=pipeline.micro_batches,
        expert_rows=expert_rows,
        batch_rows=config.experts.gemm_rows or choose_gemm_rows(row_bytes),
        parcel_tokens=parcel_tokens,
        parcels_sent=most_parcels(len(routes.landings), tokens, model.top_k, parcel_tokens),
        pool_rows=pool_rows,
        parcels_at_once=at_once,
        in_order=pipeline.deterministic or config.run.mode == "train",
        deterministic=pipeline.deterministic,
    )


def describe_ways(sizes, routes):
    """Say what messages take on a rank, and how they travel -> lines."""
    if isinstance(sizes, DeviceSizes):
        return describe_device_ways(sizes)
    lines = [
        f"rows, on each rank: {sizes.shared_bytes(routes) / 1e6:.1f} MB of memory that {len(routes.mates)} ranks of "
        f"its node share + {sizes.send_bytes / 1e6:.1f} MB to send from, for {sizes.num_berths} micro-batches in flight"
    ]
    if sizes.parcels_sent:
        once = f"{len(routes.landings)} ranks" + " for all of their node" * (routes.most_served > routes.num_slots)
        lines.append(
            f"between nodes: messages of at most {sizes.parcel_tokens} tokens to {once}; room for those that land: "
            f"{sizes.num_berths} x {sizes.pool_rows} rows"
        )
    return lines
