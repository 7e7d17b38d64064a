"""Balance within a node: its replicas go to its ranks, the heaviest first, each to the least loaded rank."""

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, LayerData


def balance_nodes(data: LayerData, expert_at: np.ndarray) -> np.ndarray:
    """Assign each node's replicas to its ranks anew, [P, s] -> [P, s]: equal numbers on each, then equal tokens."""
    balanced = np.full_like(expert_at, EMPTY)
    tokens = count_served(data, expert_at)
    for node, weight in enumerate(tokens):
        ranks = data.rank_by_node[data.first_of_node[node] : data.first_of_node[node + 1]]
        experts = expert_at[ranks].ravel()
        experts = experts[experts != EMPTY]
        experts_of_rank = divide_experts(experts, weight, len(ranks))
        if experts_of_rank is None:  # rare: the last replica of an expert finds slots only beside another one
            balanced[ranks] = expert_at[ranks]
            continue
        for rank, held in zip(ranks, experts_of_rank, strict=True):
            balanced[rank, : len(held)] = held
    return balanced


def divide_experts(experts: np.ndarray, weight: np.ndarray, num_ranks: int) -> list[list[int]] | None:
    """Divide replicas of experts [n], weight [E] tokens a replica, among ranks -> a list for each, None where it fails.

    Experts with most replicas go first, for no rank may hold two of one.
    """
    replicas = np.bincount(experts, minlength=len(weight))
    order = np.lexsort((experts, -weight[experts], -replicas[experts]))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    load = np.zeros(num_ranks)
    base, extras = divmod(len(experts), max(num_ranks, 1))
    for expert in experts[order].tolist():
        # Find the ranks that may take one more, and not this expert twice.
        count = np.array([len(of_rank) for of_rank in held])
        extras_left = extras - np.sum(count > base)
        may_take = (count < base) | ((count == base) & (extras_left > 0))
        may_take &= np.array([expert not in of_rank for of_rank in held])
        if not may_take.any():
            return None

        # Give it to the least loaded of them.
        rank = int(np.argmin(np.where(may_take, load, np.inf)))
        held[rank].append(expert)
        load[rank] += weight[expert]
    return held


def count_served(data: LayerData, expert_at: np.ndarray) -> np.ndarray:
    """Count the tokens that each replica of an expert on each node serves: nearest tier, evenly -> [nodes, E]."""
    # Count the replicas on each node.
    num_nodes, num_experts = data.demand.shape
    replicas = np.zeros((num_nodes, num_experts))
    rank, slot = np.nonzero(expert_at != EMPTY)
    np.add.at(replicas, (data.node_of_rank[rank], expert_at[rank, slot]), 1)

    # Share evenly among a tier's replicas the demand of the nodes that have none nearer.
    in_rack = np.zeros((len(data.uplink_cost), num_experts))
    np.add.at(in_rack, data.rack_of_node, replicas)
    alone = replicas == 0
    lacking = alone & (in_rack == 0)[data.rack_of_node]
    from_rack = np.zeros_like(in_rack)
    np.add.at(from_rack, data.rack_of_node, np.where(alone & ~lacking, data.demand, 0.0))
    own = data.demand / np.maximum(replicas, 1)
    near = (from_rack / np.maximum(in_rack, 1))[data.rack_of_node]
    far = np.where(lacking, data.demand, 0.0).sum(axis=0) / np.maximum(replicas.sum(axis=0), 1)
    return np.where(replicas > 0, own + near + far, 0.0)
