"""Layouts that a search begins with beside those of rules: packed greedily around nodes' hottest experts.

A layout is a layer's experts at [P, s], -1 in an empty slot.
"""

from typing import NamedTuple

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, LayerData, SmoothMax, make_state
from hpcmoe.placement.search.moves import compiled, holds, move, rebuild, undo

_NODES_TRIED = 32  # for an expert's first replica: of more nodes, the one of each class that wants it most
_GREEDY = 3  # doublings of the exponent, the 8th power: prices of all that are busy, for a layout still to grow


class PinnedCounts(NamedTuple):
    """The numbers of its own hottest experts that each node, and each rack in all, holds before all others."""

    of_node: int = 0
    of_rack: int = 0


def make_packed(data: LayerData, pinned: PinnedCounts) -> np.ndarray:
    """Place nodes' and racks' own hottest experts, then the missing ones greedily, then replicas while they help."""
    # Begin with an empty layout.
    num_ranks, num_experts = len(data.node_of_rank), data.demand.shape[1]
    state, log = make_state(data, np.full((num_ranks, data.most_of_rank.max()), EMPTY))
    smooth_max, load = SmoothMax(_estimate_worst_seconds(data), _GREEDY), np.zeros(num_ranks)
    rebuild(data, state, log, smooth_max)

    # Pin what each node's and each rack's tokens ask for most.
    in_rack = np.zeros((len(data.uplink_cost), num_experts))
    np.add.at(in_rack, data.rack_of_node, data.demand)
    if pinned.of_node > 0:
        hottest = np.argsort(-data.demand, axis=1, kind="stable")[:, : pinned.of_node]
        _pin_hottest(data, state, log, smooth_max, hottest, np.arange(len(data.rack_of_node)), load)
    if pinned.of_rack > 0:
        hottest = np.argsort(-in_rack, axis=1, kind="stable")[:, : pinned.of_rack]
        _pin_hottest(data, state, log, smooth_max, hottest, data.rack_of_node, load)

    # Add the others where they cost least.
    _place_missing(data, state, log, smooth_max, np.argsort(-data.tokens, kind="stable"), load)
    if data.replicate:
        _add_replicas(data, state, log, smooth_max, in_rack, load)
    return state.expert_at


def _estimate_worst_seconds(data: LayerData) -> float:
    """Estimate the seconds of a resource at worst, a scale by which powers do not overflow."""
    tokens = data.demand.sum(axis=1)
    links = (tokens[:, None] * data.link_cost).max() / max(len(tokens) - 1, 1)
    ranks = tokens.sum() * data.rank_cost / len(data.node_of_rank)
    return max(links, (tokens * data.egress_cost).max(), ranks, 1e-30)


@compiled
def _find_open_rank(t, s, node, expert, load, most_of_rank):
    """Find a node's least loaded rank that has a slot left and not the expert, EMPTY where there is none."""
    # Reserve memory for the node's ranks that have too few experts yet.
    best, left = EMPTY, t.most_of_node[node] - s.count_of_node[node]
    if left <= 0:
        return best
    for k in range(t.first_of_node[node], t.first_of_node[node + 1]):
        left -= max(t.fewest_of_rank[t.rank_by_node[k]] - s.count_of_rank[t.rank_by_node[k]], 0)

    # Compare the ranks.
    for k in range(t.first_of_node[node], t.first_of_node[node + 1]):
        rank = t.rank_by_node[k]
        is_open = s.count_of_rank[rank] < most_of_rank[rank] and not holds(s, rank, expert)
        is_open &= left > 0 or s.count_of_rank[rank] < t.fewest_of_rank[rank]
        if is_open and (best == EMPTY or load[rank] < load[best]):
            best = rank
    return best


@compiled
def _find_rank_among(t, s, first, expert, load, most_of_rank):
    """Find an open rank on the node of most demand for an expert, of every _NODES_TRIED-th -> it or EMPTY."""
    best, most = EMPTY, -1.0
    for node in range(first, len(t.rack_of_node), _NODES_TRIED):
        if t.demand[node, expert] > most:
            rank = _find_open_rank(t, s, node, expert, load, most_of_rank)
            if rank != EMPTY:
                best, most = rank, t.demand[node, expert]
    return best


@compiled
def _add_replica(t, s, log, smooth_max, expert, rank, load):
    """Add a replica of an expert to a rank with a free slot."""
    move(t, s, log, smooth_max, EMPTY, rank, expert, EMPTY)
    slot = 0
    while s.expert_at[rank, slot] != EMPTY:
        slot += 1
    s.expert_at[rank, slot] = expert
    load[rank] += t.tokens[expert] / s.num_replicas[expert]


@compiled
def _evaluate_addition(t, s, log, smooth_max, expert, rank):
    """Compute the change of the sum of powers by one more replica of an expert on a rank."""
    change = move(t, s, log, smooth_max, EMPTY, rank, expert, EMPTY)
    undo(t, s, log, EMPTY, rank, expert, EMPTY)
    return change


@compiled
def _pin_hottest(t, s, log, smooth_max, hottest, group_of_node, load):
    """Place its own hottest experts [groups, n] on each group of nodes, where memory suffices for the missing ones too.

    A group's replica goes to the node with fewest replicas, among equals to the one of most demand.
    """
    free, missing = np.sum(t.most_of_node) - np.sum(s.count_of_node), np.sum(s.num_replicas == 0)
    for place in range(hottest.shape[1]):
        for group in range(hottest.shape[0]):
            # Choose the node and its rank.
            expert, best, fewest, most = hottest[group, place], EMPTY, np.inf, -1.0
            is_there = False
            for node in range(len(group_of_node)):
                if group_of_node[node] != group:
                    continue
                is_there |= s.replicas[node, expert] > 0
                count, wanted = s.count_of_node[node], t.demand[node, expert]
                if count < fewest or (count == fewest and wanted > most):
                    rank = _find_open_rank(t, s, node, expert, load, t.most_of_rank)
                    if rank != EMPTY:
                        best, fewest, most = rank, count, wanted

            # Place it there, unless the group has it or a missing expert needs the slot.
            is_new = s.num_replicas[expert] == 0
            if best != EMPTY and not is_there and (is_new or free > missing):
                _add_replica(t, s, log, smooth_max, expert, best, load)
                free -= 1
                missing -= is_new


@compiled
def _place_missing(t, s, log, smooth_max, order, load):
    """Place each expert that is nowhere yet where it costs least; there is memory for all."""
    missing = np.sum(s.num_replicas == 0)
    for expert in order:
        if s.num_replicas[expert] > 0:
            continue

        # Keep the last ones for the ranks that have too few.
        short = np.maximum(t.fewest_of_rank - s.count_of_rank, 0).sum()
        most_of_rank = t.most_of_rank if missing > short else t.fewest_of_rank
        missing -= 1

        # Choose the rank where it adds least.
        best, least = EMPTY, np.inf
        for first in range(min(len(t.rack_of_node), _NODES_TRIED)):
            rank = _find_rank_among(t, s, first, expert, load, most_of_rank)
            if rank != EMPTY:
                change = _evaluate_addition(t, s, log, smooth_max, expert, rank)
                if change < least:
                    best, least = rank, change
        _add_replica(t, s, log, smooth_max, expert, best, load)


@compiled
def _add_replicas(t, s, log, smooth_max, in_rack, load):
    """Add to each node in turn the replica that lowers the sum of powers most, until none does.

    It tries the hottest expert that the node lacks, of its own tokens, its rack's or all.
    """
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

            # Add the best of them.
            best, best_rank, least = EMPTY, EMPTY, 0.0
            for expert in (own, of_rack, of_all):
                rank = EMPTY if expert == EMPTY else _find_open_rank(t, s, node, expert, load, t.most_of_rank)
                if rank != EMPTY:
                    change = _evaluate_addition(t, s, log, smooth_max, expert, rank)
                    if change < least:
                        best, best_rank, least = expert, rank, change
            if best == EMPTY:
                active[node] = False
                num_active -= 1
            else:
                _add_replica(t, s, log, smooth_max, best, best_rank, load)
