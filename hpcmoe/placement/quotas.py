"""How many copies of each layer a node may hold: its memory spread over the layers, then shifted to where it helps."""

import numpy as np


def spread_memory(problem):
    """Spread each node's memory evenly over the layers, remainders staggered -> most_of_node [L, nodes].

    Every layer's sum is enough for all experts wherever the memory of all layers is.
    """
    layers = problem.num_layers
    base, rest = np.divmod(np.minimum(problem.slots_of_node * layers, problem.memory_copies), layers)
    most = np.tile(base, (layers, 1))
    first = 0
    for node, number in enumerate(rest):
        most[(first + np.arange(number)) % layers, node] += 1
        first += number
    return most


def limit_ranks(problem, most_of_node):
    """Find the fewest and most experts of a layer on each rank, and on each node -> ([P], [P], [nodes]).

    Where they must be even, all ranks get the same number, the last experts one more on any; where memory is short on
    a node, the others hold more.
    """
    num_ranks, ranks, slots = problem.num_ranks, problem.ranks_of_node, problem.slots_per_rank
    if problem.replicate or not problem.even:
        return np.zeros(num_ranks, np.int64), np.full(num_ranks, slots), most_of_node
    level = next(
        level for level in range(1, slots + 1) if np.minimum(level * ranks, most_of_node).sum() >= problem.num_experts
    )
    fewest = np.minimum(level - 1, most_of_node // np.maximum(ranks, 1))[problem.node_of_rank]
    return fewest, np.full(num_ranks, level), np.minimum(level * ranks, most_of_node)
