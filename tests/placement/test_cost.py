"""What a layout costs, against the definition: token by token, replica by replica, in plain loops."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import make_problem, problems, scatter

from hpcmoe.placement.cost import layer_seconds, make_nearest_shares, resource_seconds
from hpcmoe.placement.problem import OBJECTIVES
from hpcmoe.placement.resources import RESOURCES


def tier_of(problem, i, j):
    """Return the distance of node j from node i."""
    return 0 if i == j else 1 if problem.rack_of_node[i] == problem.rack_of_node[j] else 2


def follow_tokens(problem, slots):
    """Send every node's tokens to their replicas -> Counter of tokens by (from node, to node, rank)."""
    rank_of_slot = np.repeat(np.arange(problem.num_ranks), problem.slots_per_rank)
    tokens = Counter()
    for i in range(problem.num_nodes):
        home = sum(problem.tokens_of_rank[g] for g in range(problem.num_ranks) if problem.node_of_rank[g] == i)
        for expert in range(problem.num_experts):
            ranks = [rank_of_slot[slot] for slot in range(len(slots)) if slots[slot] == expert]
            tier = min(tier_of(problem, i, problem.node_of_rank[g]) for g in ranks)
            near = [g for g in ranks if tier_of(problem, i, problem.node_of_rank[g]) == tier]
            for g in near:
                tokens[i, problem.node_of_rank[g], g] += home * problem.probability[0, i, expert] / len(near)
    return tokens


def seconds_by_definition(problem, slots):
    """Find the seconds of each resource -> dict of Counters."""
    seconds, size, rack = {name: Counter() for name in RESOURCES}, problem.bytes_per_token, problem.rack_of_node
    for (i, j, g), number in follow_tokens(problem, slots).items():
        seconds["rank"][g] += number * problem.seconds_per_token
        if i != j:
            seconds["link"][i, j] += number * size / problem.bytes_per_second[i, j]
            seconds["egress"][i] += number * size / problem.egress_bytes_per_second[i]
            seconds["ingress"][j] += number * size / problem.ingress_bytes_per_second[j]
        if rack[i] != rack[j]:
            seconds["uplink_out"][rack[i]] += number * size / problem.uplink_bytes_per_second[rack[i]]
            seconds["uplink_in"][rack[j]] += number * size / problem.uplink_bytes_per_second[rack[j]]
    if problem.count_latency:
        seconds["link"] = {link: t + problem.latency_seconds[link] for link, t in seconds["link"].items() if t > 0}
    return seconds


@given(problems(), st.integers(0, 99))
def test_every_resource_is_as_busy_as_its_tokens_make_it(problem, seed):
    slots = scatter(problem, seed).ravel()
    expected, found = seconds_by_definition(problem, slots), resource_seconds(problem, 0, slots)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        by_key = [expected[name].get(key if len(key) > 1 else key[0], 0.0) for key in np.ndindex(array.shape)]
        np.testing.assert_allclose(array.ravel(), by_key, rtol=1e-9, atol=1e-15, err_msg=name)

    # A layer costs what its busiest resource costs, of those that count.
    of_objective = {"links": ["link"], "ports": ["link", "egress", "ingress", "uplink_out", "uplink_in"]}
    names = of_objective.get(problem.objective, list(expected))
    most = max((seconds for name in names for seconds in expected[name].values()), default=0.0)
    assert layer_seconds(problem, 0, slots) == pytest.approx(most, rel=1e-9, abs=1e-15)


@given(problems(), st.integers(0, 99))
def test_each_objective_counts_what_the_one_before_does_and_more(problem, seed):
    slots = scatter(problem, seed).ravel()
    costs = [layer_seconds(dataclasses.replace(problem, objective=name), 0, slots) for name in OBJECTIVES]
    assert costs == sorted(costs)


def test_shares_go_to_the_nearest_tier_evenly():
    # Nodes 0 and 1 are one rack, 2 and 3 the other; the replicas are on nodes 0 and 2, two on node 2.
    problem = make_problem([1, 1, 2, 1], 1, 1, num_racks=2)
    share = make_nearest_shares(problem, np.array([0, -1, 0, 0, -1]))
    expected = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5, 0]]  # own, rack's, own, rack's
    np.testing.assert_allclose(share, expected)
    far = make_nearest_shares(problem, np.array([-1, -1, 0, 0, -1]))[[0]]
    np.testing.assert_allclose(far, [[0, 0, 0.5, 0.5, 0]])  # none near: anywhere


def test_shares_given_by_hand_are_taken():
    problem = make_problem([1, 1], 1, 1, tokens_of_rank=np.array([10, 0]), bytes_per_second=np.full((2, 2), 128.0))
    slots = np.zeros(2, np.int64)
    assert layer_seconds(problem, 0, slots) == 0  # each serves its own
    assert layer_seconds(problem, 0, slots, np.array([[0.3, 0.7], [0, 1]])) == pytest.approx(7)
