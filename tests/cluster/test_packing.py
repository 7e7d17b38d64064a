"""The steps that lay one layer's experts on the ranks."""

import itertools

import numpy as np
import pytest

from hpcmoe.cluster import packing
from hpcmoe.cluster.placement import PlacementProblem


def problem_of(ranks_of_node, num_experts, slots_per_rank, room_of_node=None, cost=None):
    """Make a problem of one layer: room by memory, cost [nodes, nodes] in seconds a token."""
    nodes = len(ranks_of_node)
    node_of_rank = np.repeat(np.arange(nodes), ranks_of_node)
    return PlacementProblem(
        num_layers=1,
        num_experts=num_experts,
        slots_per_rank=slots_per_rank,
        replicate=False,
        node_of_rank=node_of_rank,
        rack_of_node=np.zeros(nodes, np.int64),
        bytes_per_second=1 / (np.ones((nodes, nodes)) if cost is None else np.asarray(cost, float)),
        latency_seconds=np.zeros((nodes, nodes)),
        memory_bytes=np.full(nodes, 1000) if room_of_node is None else np.array(room_of_node),
        expert_bytes=1,
        bytes_per_token=1,
        tokens_of_rank=np.ones(len(node_of_rank)),  # the steps take the demand as it is
        probability=np.full((1, nodes, num_experts), 1 / num_experts),
    )


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "room", "fewest", "most"),
    [
        ([2, 2], 4, 1, None, [0, 0], [2, 2]),
        ([2, 2], 2, 1, None, [0, 0], [2, 2]),  # fewer experts than ranks: any ranks, one each
        ([2, 2], 2, 3, None, [0, 0], [2, 2]),  # spare slots do not put two on a rank
        ([2, 2], 8, 2, None, [2, 2], [4, 4]),
        ([2, 2], 7, 2, None, [2, 2], [4, 4]),
        ([3, 1], 6, 2, None, [3, 1], [6, 2]),
        ([2, 2], 4, 2, [1, 9], [1, 2], [1, 4]),  # what memory keeps off one node goes to the other
        ([2, 0], 2, 1, None, [0, 0], [2, 0]),
    ],
)
def test_levels(ranks, experts, slots, room, fewest, most):
    got = packing.node_levels(problem_of(ranks, experts, slots, room))
    assert [level.tolist() for level in got] == [fewest, most]


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "room", "expected"),
    [
        ([2, 2], 4, 1, None, [0, 1, 2, 3]),
        ([2, 2], 8, 2, None, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([2, 2], 2, 1, None, [0, 2]),  # one on each node
        ([2, 2], 5, 2, None, [0, 0, 1, 2, 3]),
        ([2, 2], 4, 2, [1, 9], [0, 2, 2, 3]),
        ([2, 0, 2], 4, 1, None, [0, 1, 2, 3]),
    ],
)
def test_contiguous_experts_follow_the_ranks(ranks, experts, slots, room, expected):
    problem = problem_of(ranks, experts, slots, room)
    assert packing.contiguous_ranks(problem, *packing.node_levels(problem)).tolist() == expected


def test_packing_starts_with_the_hottest_where_the_link_is_fast():
    # Everybody reaches node 1 ten times faster: the hot expert 2 must go there.
    demand = np.array([[1, 1, 50]] * 3)
    cost = np.array([[1, 0.1, 1], [1, 1, 1], [1, 0.1, 1]])
    problem = problem_of([1, 1, 1], 3, 1, cost=cost)
    assert packing.pack_on_nodes(problem, demand.astype(float), *packing.node_levels(problem))[2] == 1


def test_swaps_reach_the_best_of_all_assignments():
    rng = np.random.default_rng(5)
    reached = []
    for _ in range(20):
        demand, cost = rng.exponential(1, (4, 6)), rng.uniform(0.2, 2, (4, 4))
        problem = problem_of([2, 1, 2, 1], 6, 1, cost=cost)
        levels = packing.node_levels(problem)
        found = packing.improve_by_swaps(problem, demand, *levels, packing.pack_on_nodes(problem, demand, *levels))
        assert np.bincount(found, minlength=4).tolist() == [2, 1, 2, 1]
        best = min(busiest(problem, demand, nodes) for nodes in set(itertools.permutations([0, 0, 1, 2, 2, 3])))
        reached.append(busiest(problem, demand, found) / best)
    assert min(reached) > 1 - 1e-9
    assert np.mean(reached) < 1.05 and max(reached) < 1.4


def busiest(problem, demand, node_of_expert):
    """Find the busiest link's seconds, link by link."""
    sent = np.zeros(problem.bytes_per_second.shape)
    for expert, node in enumerate(node_of_expert):
        for sender in range(len(sent)):
            sent[sender, node] += demand[sender, expert]
    return max(sent[i, j] / problem.bytes_per_second[i, j] for i, j in itertools.permutations(range(len(sent)), 2))


def test_a_move_into_a_free_place_is_a_swap_too():
    # Two hot experts start on node 0, whose links are slow; node 1 has two free places.
    demand = np.array([[0.0, 0.0], [5.0, 5.0]])
    problem = problem_of([2, 2], 2, 1)
    found = packing.improve_by_swaps(problem, demand, *packing.node_levels(problem), np.array([0, 0]))
    assert found.tolist() == [1, 1]


def test_no_node_gives_more_than_its_fewest():
    # Three ranks hold four experts, so each has one at least: node 0 must keep one, though nobody wants it there.
    demand = np.array([[0.0] * 4, [5.0, 6.0, 7.0, 8.0]])
    problem = problem_of([1, 2], 4, 2)
    levels = packing.node_levels(problem)
    found = packing.improve_by_swaps(problem, demand, *levels, np.array([1, 1, 0, 0]))
    assert np.bincount(found).tolist() == [1, 3]
    assert found[0] == 0  # and it is the coldest


def test_seats_are_even_in_number_and_then_in_load():
    problem = problem_of([2, 1], 7, 3)
    node_of_expert = np.array([0, 0, 0, 0, 0, 1, 1])
    tokens = np.array([10.0, 6.0, 5.0, 4.0, 1.0, 1.0, 1.0])
    ranks = packing.seat_on_ranks(problem, tokens, node_of_expert)
    assert ranks[5:].tolist() == [2, 2]
    assert sorted(np.bincount(ranks[:5])) == [2, 3]
    assert sorted(np.bincount(ranks[:5], tokens[:5])) == [12, 14]


def test_copies_go_to_the_node_that_sends_most_over_the_slowest_link():
    # Expert 0 is on rank 0. Of the free ranks 2 and 3, on nodes 2 and 3, node 3 is worst off.
    demand = np.array([[9.0, 0.0], [0.0, 9.0], [4.0, 0.0], [5.0, 0.0]])
    holds = np.zeros((4, 2), bool)
    holds[0, 0] = holds[1, 1] = True
    packing.add_replicas(problem_of([1] * 4, 2, 1), demand, holds)
    assert holds[:, 0].tolist() == [True, False, True, True]
    assert holds[:, 1].tolist() == [False, True, False, False]

    one_place = problem_of([1] * 4, 2, 1, room_of_node=[1, 1, 0, 1])
    holds[:] = False
    holds[0, 0] = holds[1, 1] = True
    packing.add_replicas(one_place, demand, holds)
    assert holds[:, 0].tolist() == [True, False, False, True]


def test_no_copy_is_made_that_would_load_a_link_more():
    # A copy on node 1 would draw half of node 2's tokens, over a link a hundred times slower than that to node 0.
    demand = np.array([[9.0], [0.0], [8.0]])
    cost = np.array([[1, 1, 1], [1, 1, 1], [1, 100, 1]])
    problem = problem_of([1, 1, 1], 1, 1, room_of_node=[1, 1, 0], cost=cost)
    holds = np.array([[True], [False], [False]])
    packing.add_replicas(problem, demand, holds)
    assert holds[:, 0].tolist() == [True, False, False]


def test_no_rank_gets_two_copies_and_experts_without_tokens_get_none():
    demand = np.array([[4.0, 0.0], [4.0, 0.0]])
    problem = problem_of([1, 1], 2, 3)
    holds = np.array([[True, False], [False, True]])
    packing.add_replicas(problem, demand, holds)
    assert holds.tolist() == [[True, False], [True, True]]


def test_a_rank_that_holds_an_expert_takes_no_place_for_it_again():
    # Each node has room for two: for the hot expert of the other, and for its cold one.
    demand = np.array([[10.0, 1.0], [10.0, 1.0]])
    problem = problem_of([1, 1], 2, 2, room_of_node=[2, 2])
    holds = np.array([[True, False], [False, True]])
    packing.add_replicas(problem, demand, holds)
    assert holds.all()
