"""Layouts of one layer by rules that do not search: contiguous, or by EPLB's method; nothing is compiled for them.

A layout is a layer's experts at [P, s], -1 in an empty slot.
"""

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.placement.eplb import pack_heaviest_first, replicate_hottest
from hpcmoe.placement.layouts import fits
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import make_limits
from hpcmoe.placement.search.layer_data import EMPTY, LayerData, make_layer_data


def make_data(problem: PlacementProblem, layer: int, most_of_node: np.ndarray) -> LayerData:
    """Build a layer's search data with the limits that memory [L, nodes] sets."""
    return make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))


def place_by_rule(problem: PlacementProblem, most_of_node: np.ndarray, method: str) -> list[np.ndarray]:
    """Place by a method that does not search -> layouts [P, s]; PlacementError where one does not fit the memory."""
    layouts = []
    for layer in range(problem.num_layers):
        data = make_data(problem, layer, most_of_node)
        layouts.append(make_contiguous(data) if method == "contiguous" else make_eplb(data))
        if not fits(data, layouts[-1]):
            raise PlacementError(f"{method} placement: layer {layer} does not fit the memory of every node")
    return layouts


def make_contiguous(data: LayerData, spread: bool = True) -> np.ndarray:
    """Place the experts in order along the ranks: evenly over the nodes, or rank by rank from the first."""
    # Count each node's experts.
    expert_at = np.full((len(data.node_of_rank), data.most_of_rank.max()), EMPTY)
    ranks_of_node = np.diff(data.first_of_node)
    slots = np.bincount(data.node_of_rank, data.most_of_rank, len(ranks_of_node))
    most = np.minimum(slots, data.most_of_node)
    count = np.zeros(len(most), np.int64)
    for _ in range(len(data.tokens)):
        fill = count / np.maximum(ranks_of_node, 1) if spread else np.arange(len(most))
        count[np.argmin(np.where(count < most, fill, np.inf))] += 1

    # Fill the ranks in order.
    expert = 0
    for rank, number in enumerate(_divide_among_ranks(data, count, spread)):
        expert_at[rank, :number] = np.arange(expert, expert + number)
        expert += number
    return expert_at


def _divide_among_ranks(data: LayerData, count: np.ndarray, spread: bool) -> np.ndarray:
    """Divide each node's number of experts [nodes] among its ranks, evenly or rank by rank -> [P]."""
    num_of_rank = np.zeros(len(data.node_of_rank), np.int64)
    for node, number in enumerate(count):
        ranks = data.rank_by_node[data.first_of_node[node] : data.first_of_node[node + 1]]
        for _ in range(int(number)):
            fill = num_of_rank[ranks] if spread else np.arange(len(ranks))
            has_slot = num_of_rank[ranks] < data.most_of_rank[ranks]
            num_of_rank[ranks[np.argmin(np.where(has_slot, fill, np.inf))]] += 1
    return num_of_rank


def make_eplb(data: LayerData) -> np.ndarray:
    """Place as DeepSeek's Expert Parallelism Load Balancer without groups (github.com/deepseek-ai/EPLB).

    Ranks get equal numbers of replicas, to within one. Links and memory do not matter. Two replicas of an expert on one
    rank count as one here.
    """
    # Give each spare slot to the expert with most tokens a replica.
    num_ranks, num_slots, num_experts = len(data.node_of_rank), data.most_of_rank.max(), len(data.tokens)
    replicas = replicate_hottest(data.tokens[None], num_ranks * num_slots if data.replicate else num_experts)[0]

    # Place the replicas, heaviest first, each on the least loaded rank with a slot left.
    weight = np.repeat(data.tokens / replicas, replicas)
    experts = np.repeat(np.arange(num_experts), replicas)
    rank_of_item = pack_heaviest_first(weight[None], num_ranks)[0]
    expert_at, count = np.full((num_ranks, num_slots), EMPTY), np.zeros(num_ranks, np.int64)
    for item in np.argsort(-weight, kind="stable"):
        rank = rank_of_item[item]
        if experts[item] not in expert_at[rank]:
            expert_at[rank, count[rank]] = experts[item]
        count[rank] += 1
    return expert_at
