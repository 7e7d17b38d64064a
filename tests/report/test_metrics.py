"""Figures mean what they say: sigma and its floor against simulation."""

from types import SimpleNamespace

import numpy as np
import pytest

from hpcmoe.report.metrics import (
    compute_balancedness,
    compute_link_balance,
    compute_sampling_floor,
    served_by_rank,
    sum_links_by_node,
    sum_own_links,
)


def test_the_spread_of_links_is_that_of_their_tokens():
    tokens = np.random.default_rng(0).integers(0, 100, (4, 4))
    sums = sum(sum_own_links(row, rank) for rank, row in enumerate(tokens))
    others = tokens[~np.eye(4, dtype=bool)]
    assert sums[2] == 12
    assert compute_link_balance(*sums) == pytest.approx((others.mean(), others.std() / others.mean()))


def test_there_may_be_no_links_no_tokens_or_no_spread():
    assert compute_link_balance(*sum_own_links(np.array([7]), 0)) == (0, 0)
    assert compute_link_balance(0.0, 0.0, 6) == (0, 0)
    assert compute_link_balance(3 * 0.1, 0.03, 3)[1] == 0  # the variance, -3e-18 by rounding, has no root


def test_balancedness_is_mean_over_max_layer_by_layer():
    of_layer, whole = compute_balancedness(np.array([[4.0, 2, 6, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert of_layer.tolist() == [0.5, 1, 1] and whole == pytest.approx((3 + 1) / (6 + 1))
    assert compute_balancedness(np.zeros((2, 3)))[1] == 1
    turns = np.array([[8.0, 0], [0, 8]])  # the ranks wait for each other by turns, though they serve as much in all
    assert compute_balancedness(turns)[1] == 0.5


def make_placement(experts_of_layers, num_ranks, num_nodes=1):
    """A placement by the experts of each slot, layer by layer; replicas of an expert share its tokens evenly."""
    expert_of_replica = np.array(experts_of_layers)
    num_replicas = (expert_of_replica[:, :, None] == expert_of_replica[:, None, :]).sum(axis=2)
    shares = (expert_of_replica >= 0) / num_replicas
    return SimpleNamespace(
        node_of_rank=np.arange(num_ranks) * num_nodes // num_ranks,
        expert_of_replica=expert_of_replica,
        shares_of_node=lambda layer, node: shares[layer],
        slots_per_rank=expert_of_replica.shape[1] // num_ranks,
    )


def simulate_sigma(placement, tokens_of_rank, top_k, num_experts, random):
    """Route tokens fairly and count the assignments between ranks -> sigma."""
    num_ranks = len(tokens_of_rank)
    links = np.zeros((num_ranks, num_ranks))
    for layer, experts_of_slot in enumerate(placement.expert_of_replica):
        shares = placement.shares_of_node(layer, 0)
        served = np.zeros((num_experts, num_ranks))
        held = np.flatnonzero(experts_of_slot >= 0)
        served[experts_of_slot[held], held // placement.slots_per_rank] = shares[held]
        for source, num_tokens in enumerate(tokens_of_rank):
            chosen = random.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
            links[source] += np.bincount(chosen.ravel(), minlength=num_experts) @ served
    others = links[~np.eye(num_ranks, dtype=bool)]
    return others.std() / others.mean()


@pytest.mark.parametrize(
    ("experts_of_layers", "tokens_of_rank", "top_k"),
    [
        ([[0, 1, 2, 3]], [40] * 4, 1),
        ([[0, 1, 2, 3]] * 2, [40] * 4, 2),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], [60] * 4, 2),
        ([range(16)] * 2, [16] * 16, 2),
        ([[0, 1, 2, 3, 4, -1]], [100] * 3, 3),
        ([[0, 1, -1, 2]], [50] * 4, 1),
        ([[3, 1, 0, 2], [2, 1, 3, 0]], [20, 60, 40, 0], 2),
        ([[0, 1, 1, 2, 2, 3, 3, 0]], [200] * 4, 2),
        ([[0, 1, 2, 0, 1, -1]], [90] * 3, 1),
    ],
)  # fmt: skip
def test_the_sampling_floor_is_a_fair_routers_sigma(experts_of_layers, tokens_of_rank, top_k):
    placement = make_placement([list(experts) for experts in experts_of_layers], len(tokens_of_rank))
    num_experts = max(max(experts) for experts in experts_of_layers) + 1
    random = np.random.default_rng(0)
    drawn = [simulate_sigma(placement, tokens_of_rank, top_k, num_experts, random) for _ in range(200)]
    layers = range(len(experts_of_layers))
    floor = compute_sampling_floor(placement, np.array(tokens_of_rank), top_k, num_experts, layers)
    assert floor == pytest.approx(np.sqrt(np.square(drawn).mean()), rel=0.06)


def test_a_layer_has_a_floor_of_its_own():
    both, tokens = make_placement([[0, 1, 2, 3], [3, 3, 3, 0]], 4), np.array([40] * 4)
    for layer in (0, 1):
        alone = make_placement([both.expert_of_replica[layer]], 4)
        expected = compute_sampling_floor(alone, tokens, 2, 4, [0])
        assert compute_sampling_floor(both, tokens, 2, 4, [layer]) == expected > 0
    assert compute_sampling_floor(make_placement([[0, 1, 2, 3]] * 4, 4), tokens, 2, 4, range(4)) == pytest.approx(
        compute_sampling_floor(both, tokens, 2, 4, [0]) / 2  # four layers alike: half of one's
    )


def test_without_choice_or_links_the_floor_is_zero():
    assert compute_sampling_floor(make_placement([[0, 1]], 2), np.array([9, 9]), 2, 2, [0]) == pytest.approx(0)
    assert compute_sampling_floor(make_placement([[0, 1]], 1), np.array([9]), 1, 2, [0]) == 0
    assert compute_sampling_floor(make_placement([[0, 1]], 2), np.array([0, 0]), 1, 2, [0]) == 0


def test_each_nodes_tokens_are_shared_out_whole():
    placement = make_placement([[0, 1, 2, -1]], 2, num_nodes=2)
    served, squares = served_by_rank(placement, 0)
    assert served.tolist() == squares.tolist() == [[2, 1]] * 2


def test_a_matrix_over_ranks_is_added_up_by_node():
    of_ranks = np.arange(16.0).reshape(4, 4) ** 2
    of_nodes = sum_links_by_node(of_ranks, np.array([0, 1, 1, 0]))
    assert of_nodes.tolist() == [
        [sum(of_ranks[i, j] for i in (0, 3) for j in (0, 3)), sum(of_ranks[i, j] for i in (0, 3) for j in (1, 2))],
        [sum(of_ranks[i, j] for i in (1, 2) for j in (0, 3)), sum(of_ranks[i, j] for i in (1, 2) for j in (1, 2))],
    ]
