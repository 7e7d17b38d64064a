"""The sampling floor of sigma is the root mean square of an even router's sigma, as drawn."""

import numpy as np
import pytest
from placement.problems import make_problem

from hpcmoe.placement.result import SearchStats, evaluate
from hpcmoe.report.metrics import compute_link_balance, compute_sampling_floor, sum_own_links

NUM_DRAWS = 3000


def make_placement(layouts, num_ranks, num_nodes=1):
    """A placement with experts as listed for each layer, nearest replicas first."""
    layouts = np.array([list(row) for row in layouts])
    ranks_of_node = np.bincount(np.arange(num_ranks) * num_nodes // num_ranks)
    slots = layouts.shape[1] // num_ranks
    problem = make_problem(ranks_of_node, int(layouts.max()) + 1, slots, num_layers=len(layouts), replicate=True)
    return evaluate(problem, layouts, [0.0] * len(layouts), "packed", SearchStats())


def draw_links(placement, tokens_of_rank, top_k, layers, shards=1):
    """Route an even router's tokens NUM_DRAWS times -> assignments between ranks [draws, P, P], of all layers."""
    random, num_experts = np.random.default_rng(1), placement.replica_count.shape[1]
    num_ranks = len(tokens_of_rank)
    links = np.zeros((NUM_DRAWS, num_ranks, num_ranks))
    for layer in layers:
        for source, num_tokens in enumerate(tokens_of_rank):
            node = placement.node_of_rank[source // shards]
            served = np.zeros((num_experts, placement.num_ranks))
            for slot, share in enumerate(placement.shares_of_node(layer, node)):
                served[placement.expert_of_replica[layer, slot], slot // placement.slots_per_rank] += share
            drawn = random.random((NUM_DRAWS, num_tokens, num_experts)).argpartition(top_k - 1, axis=2)[..., :top_k]
            count = np.zeros((NUM_DRAWS, num_experts))
            np.add.at(count, (np.arange(NUM_DRAWS)[:, None], drawn.reshape(NUM_DRAWS, -1)), 1)
            links[:, source] += np.repeat(count @ served, shards, axis=1)
    return links


def measure_sigma(links):
    """Measure each draw's sigma as a run does -> [draws]."""
    of_rank = [[sum_own_links(row, rank) for rank, row in enumerate(of_draw)] for of_draw in links]
    return np.array([compute_link_balance(*np.sum(sums, axis=0))[1] for sums in of_rank])


CASES = {
    "2 ranks": ([range(4)], [40, 40], 2),
    "2 ranks, uneven tokens": ([range(4)], [20, 60], 1),
    "2 ranks, all tokens on one": ([range(4)], [0, 60], 2),
    "2 ranks, uneven experts": ([[0, 1, 2, -1]], [60, 60], 1),
    "3 ranks": ([range(6)], [30] * 3, 2),
    "3 ranks, uneven both": ([[0, 1, 2, 3, 4, -1, 5, -1, -1]], [20, 50, 35], 2),
    "4 ranks, some without": ([[0, 1, -1, 2]], [40] * 4, 1),
    "4 ranks, replicas": ([[0, 1, 1, 2, 2, 3, 3, 0]], [50, 50, 50, 30], 2),
    "4 ranks, replicas on two nodes": ([[0, 1, 2, 3, 0, 2, 1, 3]], [40] * 4, 2),
    "8 ranks": ([range(8)], [20] * 8, 2),
    "8 ranks, uneven": ([[*range(12), *[-1] * 4]], [20, 5, 20, 0, 20, 20, 10, 20], 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_floor_is_the_root_mean_square_of_an_even_routers_sigma(name):
    layouts, tokens, top_k = CASES[name]
    placement = make_placement([*layouts] * 2, len(tokens), 2 if "two nodes" in name else 1)
    num_experts = placement.replica_count.shape[1]
    for layers in ([0], [0, 1]):
        sigma = measure_sigma(draw_links(placement, tokens, top_k, layers))
        floor = compute_sampling_floor(placement, np.array(tokens), top_k, num_experts, layers)
        assert floor == pytest.approx(np.sqrt(np.square(sigma).mean()), rel=0.03), layers


def test_it_is_so_where_ranks_share_experts_matrices():
    placement = make_placement([range(4)], 2)
    sigma = measure_sigma(draw_links(placement, [30] * 4, 2, [0], shards=2))
    floor = compute_sampling_floor(placement, np.array([30] * 4), 2, 4, [0])
    assert floor == pytest.approx(np.sqrt(np.square(sigma).mean()), rel=0.03)


def test_steps_of_an_even_router_lie_on_both_sides_of_it():
    placement = make_placement([range(4)], 2)
    sigma = measure_sigma(draw_links(placement, [40, 40], 2, [0]))
    below = (sigma < compute_sampling_floor(placement, np.array([40, 40]), 2, 4, [0])).mean()
    assert 0.6 < below < 0.75  # as of a normal variable, of which two thirds lie within its deviation


def test_one_rank_or_no_tokens_have_none():
    assert compute_sampling_floor(make_placement([range(2)], 1), np.array([9]), 1, 2, [0]) == 0
    assert compute_sampling_floor(make_placement([range(2)], 2), np.array([0, 0]), 1, 2, [0]) == 0
