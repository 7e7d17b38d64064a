"""A placement's figures, against sums over tokens one by one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import make_problem, problems, scatter

from hpcmoe.placement.cost import layer_seconds, make_nearest_shares
from hpcmoe.placement.result import SearchStats, evaluate


@given(problems(), st.integers(0, 99))
def test_figures_follow_from_the_layout(problem, seed):
    slots = np.stack([scatter(problem, seed + layer).ravel() for layer in range(problem.num_layers)])
    made = evaluate(problem, slots, [0.0] * problem.num_layers, "packed", SearchStats())
    assert made.objective_seconds == pytest.approx(sum(layer_seconds(problem, k, row) for k, row in enumerate(slots)))
    assert made.replica_count.tolist() == [[np.sum(row == e) for e in range(problem.num_experts)] for row in slots]
    assert (made.num_ranks, made.slots_per_rank) == (problem.num_ranks, problem.slots_per_rank)

    # Tokens on links, one by one.
    tokens = np.zeros((problem.num_nodes, problem.num_nodes))
    for layer, node, slot in np.ndindex(len(slots), problem.num_nodes, slots.shape[1]):
        at = problem.node_of_rank[made.rank_of_replica[slot]]
        tokens[node, at] += made.shares_of_node(layer, node)[slot] * problem.demand(layer)[node, slots[layer, slot]]
    assert tokens.sum() == pytest.approx(problem.tokens_of_rank.sum() * problem.num_layers)
    between = tokens[~np.eye(len(tokens), dtype=bool)]
    if tokens.any():
        assert made.cross_node_share == pytest.approx(between.sum() / tokens.sum(), abs=1e-12)
    if between.sum() > 1e-9:
        assert made.link_sigma == pytest.approx(between.std() / between.mean())


@given(problems(), st.integers(0, 99))
def test_shares_of_a_node_are_those_that_cost_counts(problem, seed):
    slots = scatter(problem, seed).ravel()
    made = evaluate(problem, np.tile(slots, (problem.num_layers, 1)), [0.0], "packed", SearchStats())
    share = make_nearest_shares(problem, slots)
    for node in range(problem.num_nodes):
        np.testing.assert_allclose(made.shares_of_node(0, node), share[node], atol=1e-12)
    for rank in range(problem.num_ranks):
        held = slots[rank * problem.slots_per_rank : (rank + 1) * problem.slots_per_rank]
        assert made.experts_of_rank(0, rank).tolist() == held.tolist()


def test_a_split_given_is_kept_and_weighed():
    speed = np.full((2, 2), 128.0)
    problem = make_problem([1, 1], 1, 1, tokens_of_rank=np.array([10, 0]), bytes_per_second=speed, replicate=True)
    split = np.array([[[0.3, 0.7], [0, 1]]])
    made = evaluate(problem, np.zeros((1, 2), np.int64), [0.0], "packed", SearchStats(), split)
    assert made.objective_seconds == pytest.approx(7) and made.cross_node_share == pytest.approx(0.7)
    assert made.shares_of_node(0, 0).tolist() == [0.3, 0.7]


def test_optimal_is_said_where_the_bound_is_met():
    problem = make_problem([1, 1], 2, 1, seed=1)
    slots = np.array([[0, 1]])
    cost = layer_seconds(problem, 0, slots[0])
    met, missed = (evaluate(problem, slots, [bound], "packed", SearchStats()) for bound in (cost, 0.999 * cost))
    assert (met.is_optimal, missed.is_optimal) == (True, False)
    assert dataclasses.replace(missed, objective_seconds=0.999 * cost).is_optimal
