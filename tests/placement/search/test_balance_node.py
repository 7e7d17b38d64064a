"""Replicas seated on their node's ranks: the same replicas, as many on each rank, the heaviest apart."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import layer_data_of, make_problem, problems, scatter

from hpcmoe.placement.cost import count_replicas, layer_seconds, make_nearest_shares, tokens_on_ranks
from hpcmoe.placement.search.balance_node import balance_nodes, count_served, divide_experts


@given(problems(), st.integers(0, 99))
def test_every_node_keeps_its_replicas_and_no_rank_has_two_of_one(problem, seed):
    before = scatter(problem, seed)
    after = balance_nodes(layer_data_of(problem), before)
    slots = [expert_at.ravel() for expert_at in (before, after)]
    np.testing.assert_array_equal(*(count_replicas(problem, of_slots) for of_slots in slots))
    assert all(len(set(held)) == len(held) for held in ([e for e in rank if e >= 0] for rank in after.tolist()))
    if problem.objective != "step":
        assert layer_seconds(problem, 0, slots[0]) == pytest.approx(layer_seconds(problem, 0, slots[1]), rel=1e-12)


@given(problems(), st.integers(0, 99))
def test_single_replicas_are_as_many_on_each_rank_of_a_node(problem, seed):
    single = scatter(dataclasses.replace(problem, replicate=False), seed)
    count = (balance_nodes(layer_data_of(problem), single) != -1).sum(axis=1)
    for node in set(problem.node_of_rank.tolist()):
        assert np.ptp(count[problem.node_of_rank == node]) <= 1


@given(problems(), st.integers(0, 99))
def test_tokens_served_are_those_of_the_reference(problem, seed):
    expert_at = scatter(problem, seed)
    served, share = count_served(layer_data_of(problem), expert_at), make_nearest_shares(problem, expert_at.ravel())
    of_replicas = np.where(expert_at >= 0, served[problem.node_of_rank[:, None], expert_at], 0.0)
    expected = tokens_on_ranks(problem, 0, expert_at.ravel(), share)
    np.testing.assert_allclose(of_replicas.sum(axis=1), expected, rtol=1e-9, atol=1e-9)


def test_the_heaviest_go_first_to_the_rank_with_least_to_do():
    weight = np.array([1.0, 8, 3, 5, 4, 2])
    assert divide_experts(np.arange(6), weight, 2) == [[1, 2, 0], [3, 4, 5]]  # 12 tokens and 11
    assert divide_experts(np.array([0, 1, 2, 5]), weight, 2) == [
        [1, 0],
        [2, 5],
    ]  # eight are enough, but two seats are left


def test_what_has_most_replicas_goes_first():
    weight = np.array([1.0, 9, 8])
    assert divide_experts(np.array([0, 0, 0, 1, 2, 2]), weight, 3) == [[0, 2], [0, 2], [0, 1]]
    assert divide_experts(np.array([0, 0]), weight, 1) is None


def test_one_node_is_balanced():
    share = np.array([[[0.4, 0.3, 0.1, 0.06, 0.05, 0.04, 0.03, 0.02]]])
    problem = make_problem([4], 8, 2, probability=share, tokens_of_rank=np.full(4, 25))
    seated = balance_nodes(layer_data_of(problem), np.arange(8).reshape(4, 2))
    tokens = share[0, 0][seated].sum(axis=1)
    assert tokens.max() == tokens[seated.min(axis=1) == 0] == 0.4 + 0.02  # the hottest beside the coldest
