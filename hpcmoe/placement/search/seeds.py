"""Where a search begins: contiguous, by EPLB's method, or packed, each node's hottest experts with it and greedily on.

Each gives a layer's experts at [P, s], -1 in an empty slot.
"""

from typing import NamedTuple

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_state
from hpcmoe.placement.search.moves import compiled, holds, move, rebuild, undo

NODES_TRIED = 32  # for an expert's first replica: of more nodes, the one of each class that wants it most
GREEDY = 3  # doublings of the exponent, the 8th power: prices of all that are busy, for a layout still to grow


def make_contiguous(layer_data, spread=True):
    """Lay the experts in order along the ranks: evenly over the nodes, or rank by rank from the first."""
    expert_at = np.full((len(layer_data.node_of_rank), layer_data.most_of_rank.max()), EMPTY)
    ranks_of_node = np.diff(layer_data.first_of_node)
    most = np.minimum(
        np.bincount(layer_data.node_of_rank, layer_data.most_of_rank, len(ranks_of_node)), layer_data.most_of_node
    )
    count = np.zeros(len(most), np.int64)
    for _ in range(len(layer_data.tokens)):
        fill = count / np.maximum(ranks_of_node, 1) if spread else np.arange(len(most))
        count[np.argmin(np.where(count < most, fill, np.inf))] += 1

    expert = 0
    for rank, number in enumerate(share_among_ranks(layer_data, count, spread)):
        expert_at[rank, :number] = np.arange(expert, expert + number)
        expert += number
    return expert_at


def share_among_ranks(layer_data, count, spread):
    """Share each node's number of experts [nodes] among its ranks, evenly or rank by rank -> [P]."""
    num_of_rank = np.zeros(len(layer_data.node_of_rank), np.int64)
    for node, number in enumerate(count):
        ranks = layer_data.rank_by_node[layer_data.first_of_node[node] : layer_data.first_of_node[node + 1]]
        for _ in range(int(number)):
            fill = num_of_rank[ranks] if spread else np.arange(len(ranks))
            num_of_rank[
                ranks[np.argmin(np.where(num_of_rank[ranks] < layer_data.most_of_rank[ranks], fill, np.inf))]
            ] += 1
    return num_of_rank


def make_eplb(layer_data):
    """Lay as DeepSeek's Expert Parallelism Load Balancer does without groups (github.com/deepseek-ai/EPLB).

    A spare slot goes to the expert with most tokens a replica; then the replicas, heaviest first, each to the least loaded
    rank with a slot left; all ranks get as many, to within one. It knows neither links nor memory. Two replicas on one
    rank count as one here.
    """
    num_ranks, num_slots, num_experts = (
        len(layer_data.node_of_rank),
        layer_data.most_of_rank.max(),
        len(layer_data.tokens),
    )
    replicas = np.ones(num_experts, np.int64)
    if layer_data.replicate:
        for _ in range(num_ranks * num_slots - num_experts):
            replicas[np.argmax(layer_data.tokens / replicas)] += 1

    weight = np.repeat(layer_data.tokens / replicas, replicas)
    experts = np.repeat(np.arange(num_experts), replicas)
    expert_at = np.full((num_ranks, num_slots), EMPTY)
    load, count = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    base, extras = divmod(len(weight), num_ranks)
    for item in np.argsort(-weight, kind="stable"):
        may_take = count < base + (np.sum(count > base) < extras)
        rank = np.argmin(np.where(may_take, load, np.inf))
        if experts[item] not in expert_at[rank]:
            expert_at[rank, count[rank]] = experts[item]
        load[rank] += weight[item]
        count[rank] += 1
    return expert_at


class PinnedCounts(NamedTuple):
    """How many of its own hottest experts each node, and each rack in all, holds before anything else is laid."""

    of_node: int = 0
    of_rack: int = 0


def make_packed(layer_data, kept):
    """Lay nodes' and racks' own hottest experts, then the missing ones greedily, then replicas while they help.

    Without replicas nothing is kept.
    """
    num_ranks, num_experts = len(layer_data.node_of_rank), layer_data.demand.shape[1]
    state, log = make_state(layer_data, np.full((num_ranks, layer_data.most_of_rank.max()), EMPTY))
    smooth_max, load = SmoothMax(worst_seconds(layer_data), GREEDY), np.zeros(num_ranks)
    rebuild(layer_data, state, log, smooth_max)
    in_rack = np.zeros((len(layer_data.uplink_cost), num_experts))
    np.add.at(in_rack, layer_data.rack_of_node, layer_data.demand)
    if kept.of_node > 0:
        hottest = np.argsort(-layer_data.demand, axis=1, kind="stable")[:, : kept.of_node]
        pin_hottest(layer_data, state, log, smooth_max, hottest, np.arange(len(layer_data.rack_of_node)), load)
    if kept.of_rack > 0:
        hottest = np.argsort(-in_rack, axis=1, kind="stable")[:, : kept.of_rack]
        pin_hottest(layer_data, state, log, smooth_max, hottest, layer_data.rack_of_node, load)
    place_missing(layer_data, state, log, smooth_max, np.argsort(-layer_data.tokens, kind="stable"), load)
    if layer_data.replicate:
        add_replicas(layer_data, state, log, smooth_max, in_rack, load)
    return state.expert_at


def worst_seconds(layer_data):
    """Find about how busy a resource can be at worst, for powers that do not overflow -> seconds."""
    tokens = layer_data.demand.sum(axis=1)
    links = (tokens[:, None] * layer_data.link_cost).max() / max(len(tokens) - 1, 1)
    return max(
        links,
        (tokens * layer_data.egress_cost).max(),
        tokens.sum() * layer_data.rank_cost / len(layer_data.node_of_rank),
        1e-30,
    )


@compiled
def open_rank(t, s, node, expert, load, most_of_rank):
    """Find a node's least loaded rank that has a slot left and not the expert, EMPTY where there is none.

    What is left of the node's memory is kept for its ranks that have too few yet.
    """
    best, left = EMPTY, t.most_of_node[node] - s.count_of_node[node]
    if left <= 0:
        return best
    for k in range(t.first_of_node[node], t.first_of_node[node + 1]):
        left -= max(t.fewest_of_rank[t.rank_by_node[k]] - s.count_of_rank[t.rank_by_node[k]], 0)
    for k in range(t.first_of_node[node], t.first_of_node[node + 1]):
        rank = t.rank_by_node[k]
        is_open = s.count_of_rank[rank] < most_of_rank[rank] and not holds(s, rank, expert)
        is_open &= left > 0 or s.count_of_rank[rank] < t.fewest_of_rank[rank]
        if is_open and (best == EMPTY or load[rank] < load[best]):
            best = rank
    return best


@compiled
def rank_among(t, s, first, expert, load, most_of_rank):
    """Of the nodes first, first + NODES_TRIED, ... take the one that wants an expert most -> its open rank or EMPTY."""
    best, most = EMPTY, -1.0
    for node in range(first, len(t.rack_of_node), NODES_TRIED):
        if t.demand[node, expert] > most:
            rank = open_rank(t, s, node, expert, load, most_of_rank)
            if rank != EMPTY:
                best, most = rank, t.demand[node, expert]
    return best


@compiled
def add(t, s, log, smooth_max, expert, rank, load):
    """Put a replica of an expert into a free slot of a rank."""
    move(t, s, log, smooth_max, EMPTY, rank, expert, EMPTY)
    slot = 0
    while s.expert_at[rank, slot] != EMPTY:
        slot += 1
    s.expert_at[rank, slot] = expert
    load[rank] += t.tokens[expert] / s.num_replicas[expert]


@compiled
def evaluate_addition(t, s, log, smooth_max, expert, rank):
    """Try a replica of an expert on a rank -> change of the sum of powers."""
    change = move(t, s, log, smooth_max, EMPTY, rank, expert, EMPTY)
    undo(t, s, log, EMPTY, rank, expert, EMPTY)
    return change


@compiled
def pin_hottest(t, s, log, smooth_max, hottest, group_of_node, load):
    """Put its own hottest experts [groups, n] on each group of nodes, where there is room beside the missing ones.

    A group's replica goes to the node with fewest replicas, among equals to the one that wants it most.
    """
    free, missing = np.sum(t.most_of_node) - np.sum(s.count_of_node), np.sum(s.num_replicas == 0)
    for place in range(hottest.shape[1]):
        for group in range(hottest.shape[0]):
            expert, best, fewest, most = hottest[group, place], EMPTY, np.inf, -1.0
            is_there = False
            for node in range(len(group_of_node)):
                if group_of_node[node] != group:
                    continue
                is_there |= s.replicas[node, expert] > 0
                count, wanted = s.count_of_node[node], t.demand[node, expert]
                if count < fewest or (count == fewest and wanted > most):
                    rank = open_rank(t, s, node, expert, load, t.most_of_rank)
                    if rank != EMPTY:
                        best, fewest, most = rank, count, wanted
            is_new = s.num_replicas[expert] == 0
            if best != EMPTY and not is_there and (is_new or free > missing):
                add(t, s, log, smooth_max, expert, best, load)
                free -= 1
                missing -= is_new


@compiled
def place_missing(t, s, log, smooth_max, order, load):
    """Put each expert that is nowhere yet where it costs least; there is room for all."""
    missing = np.sum(s.num_replicas == 0)
    for expert in order:
        if s.num_replicas[expert] > 0:
            continue
        short = np.maximum(t.fewest_of_rank - s.count_of_rank, 0).sum()
        most_of_rank = t.most_of_rank if missing > short else t.fewest_of_rank  # the last ones go where they must
        missing -= 1
        best, least = EMPTY, np.inf
        for first in range(min(len(t.rack_of_node), NODES_TRIED)):
            rank = rank_among(t, s, first, expert, load, most_of_rank)
            if rank != EMPTY:
                change = evaluate_addition(t, s, log, smooth_max, expert, rank)
                if change < least:
                    best, least = rank, change
        add(t, s, log, smooth_max, expert, best, load)


@compiled
def add_replicas(t, s, log, smooth_max, in_rack, load):
    """Give each node in turn the replica that relieves most, until none relieves: its own, its rack's or all's hottest."""
    num_nodes, num_experts = t.demand.shape
    active, num_active = np.ones(num_nodes, np.bool_), num_nodes
    while num_active > 0:
        for node in range(num_nodes):
            if not active[node]:
                continue

            # Find the experts that the node, its rack and all nodes lack most.
            rack = t.rack_of_node[node]
            own, of_rack, of_all = EMPTY, EMPTY, EMPTY
            for expert in range(num_experts):
                if s.replicas[node, expert] == 0:
                    if own == EMPTY or t.demand[node, expert] > t.demand[node, own]:
                        own = expert
                    if of_all == EMPTY or (
                        t.tokens[expert] * s.num_replicas[of_all] > t.tokens[of_all] * s.num_replicas[expert]
                    ):
                        of_all = expert
                    if s.replicas_in_rack[rack, expert] == 0 and (
                        of_rack == EMPTY or in_rack[rack, expert] > in_rack[rack, of_rack]
                    ):
                        of_rack = expert

            # Take the best of them.
            best, best_rank, least = EMPTY, EMPTY, 0.0
            for expert in (own, of_rack, of_all):
                rank = EMPTY if expert == EMPTY else open_rank(t, s, node, expert, load, t.most_of_rank)
                if rank != EMPTY:
                    change = evaluate_addition(t, s, log, smooth_max, expert, rank)
                    if change < least:
                        best, best_rank, least = expert, rank, change
            if best == EMPTY:
                active[node] = False
                num_active -= 1
            else:
                add(t, s, log, smooth_max, best, best_rank, load)
