"""Which rank of its node takes which replica: the heaviest first, each to the rank with least to do."""

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY


def balance_nodes(layer_data, expert_at):
    """Lay each node's replicas anew on its ranks, [P, s] -> [P, s]: as many on each, and as many tokens, as can be."""
    seated = np.full_like(expert_at, EMPTY)
    tokens = count_served(layer_data, expert_at)
    for node, weight in enumerate(tokens):
        ranks = layer_data.rank_by_node[layer_data.first_of_node[node] : layer_data.first_of_node[node + 1]]
        experts = expert_at[ranks].ravel()
        experts = experts[experts != EMPTY]
        seats = deal_experts(experts, weight, len(ranks))
        if seats is None:  # rare: what is left for the last replica of an expert is where another of its replicas is
            seated[ranks] = expert_at[ranks]
            continue
        for rank, held in zip(ranks, seats, strict=True):
            seated[rank, : len(held)] = held
    return seated


def deal_experts(experts, weight, num_ranks):
    """Deal replicas of experts [n], weight [E] tokens a replica, to ranks -> a list for each rank, None where it fails.

    What has most replicas goes first, for no rank may hold two of one.
    """
    replicas = np.bincount(experts, minlength=len(weight))
    order = np.lexsort((experts, -weight[experts], -replicas[experts]))
    held, load = [[] for _ in range(num_ranks)], np.zeros(num_ranks)
    base, extras = divmod(len(experts), max(num_ranks, 1))
    for expert in experts[order].tolist():
        count = np.array([len(of_rank) for of_rank in held])
        extras_left = extras - np.sum(count > base)
        may_take = (count < base) | ((count == base) & (extras_left > 0))
        may_take &= np.array([expert not in of_rank for of_rank in held])
        if not may_take.any():
            return None
        rank = int(np.argmin(np.where(may_take, load, np.inf)))
        held[rank].append(expert)
        load[rank] += weight[expert]
    return held


def count_served(layer_data, expert_at):
    """Count the tokens that each replica of an expert on each node serves: nearest tier, evenly -> [nodes, E]."""
    num_nodes, num_experts = layer_data.demand.shape
    replicas = np.zeros((num_nodes, num_experts))
    rank, slot = np.nonzero(expert_at != EMPTY)
    np.add.at(replicas, (layer_data.node_of_rank[rank], expert_at[rank, slot]), 1)

    # A tier's replicas share evenly what the nodes ask for that have none nearer.
    in_rack = np.zeros((len(layer_data.uplink_cost), num_experts))
    np.add.at(in_rack, layer_data.rack_of_node, replicas)
    alone = replicas == 0
    lacking = alone & (in_rack == 0)[layer_data.rack_of_node]
    from_rack = np.zeros_like(in_rack)
    np.add.at(from_rack, layer_data.rack_of_node, np.where(alone & ~lacking, layer_data.demand, 0.0))
    own = layer_data.demand / np.maximum(replicas, 1)
    near = (from_rack / np.maximum(in_rack, 1))[layer_data.rack_of_node]
    far = np.where(lacking, layer_data.demand, 0.0).sum(axis=0) / np.maximum(replicas.sum(axis=0), 1)
    return np.where(replicas > 0, own + near + far, 0.0)
