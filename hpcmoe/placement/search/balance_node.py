"""Which rank of its node takes which copy: the heaviest first, each to the rank with least to do."""

import numpy as np

from hpcmoe.placement.search.layer_data import HOLE


def seat_evenly(terms, expert_at):
    """Lay each node's copies anew on its ranks, [P, s] -> [P, s]: as many on each, and as many tokens, as can be."""
    seated = np.full_like(expert_at, HOLE)
    tokens = count_served(terms, expert_at)
    for node, weight in enumerate(tokens):
        ranks = terms.rank_by_node[terms.first_of_node[node] : terms.first_of_node[node + 1]]
        experts = expert_at[ranks].ravel()
        experts = experts[experts != HOLE]
        seats = seat_node(experts, weight, len(ranks))
        if seats is None:  # rare: what is left for the last copy of an expert is where another of its copies is
            seated[ranks] = expert_at[ranks]
            continue
        for rank, held in zip(ranks, seats, strict=True):
            seated[rank, : len(held)] = held
    return seated


def seat_node(experts, weight, num_ranks):
    """Deal copies of experts [n], weight [E] tokens a copy, to ranks -> a list for each rank, None where it fails.

    What has most copies goes first, for no rank may hold two of one.
    """
    copies = np.bincount(experts, minlength=len(weight))
    order = np.lexsort((experts, -weight[experts], -copies[experts]))
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


def count_served(terms, expert_at):
    """Count the tokens that each copy of an expert on each node serves: nearest tier, evenly -> [nodes, E]."""
    num_nodes, num_experts = terms.demand.shape
    copies = np.zeros((num_nodes, num_experts))
    rank, slot = np.nonzero(expert_at != HOLE)
    np.add.at(copies, (terms.node_of_rank[rank], expert_at[rank, slot]), 1)

    # A tier's copies share evenly what the nodes ask for that have none nearer.
    in_rack = np.zeros((len(terms.uplink_cost), num_experts))
    np.add.at(in_rack, terms.rack_of_node, copies)
    alone = copies == 0
    lacking = alone & (in_rack == 0)[terms.rack_of_node]
    from_rack = np.zeros_like(in_rack)
    np.add.at(from_rack, terms.rack_of_node, np.where(alone & ~lacking, terms.demand, 0.0))
    own = terms.demand / np.maximum(copies, 1)
    near = (from_rack / np.maximum(in_rack, 1))[terms.rack_of_node]
    far = np.where(lacking, terms.demand, 0.0).sum(axis=0) / np.maximum(copies.sum(axis=0), 1)
    return np.where(copies > 0, own + near + far, 0.0)
