"""Tuned shares: whole, never worse than the nearest replicas, and as good as the best that a grid of shares finds."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.families import make_family

from hpcmoe.placement.cost import layer_seconds, make_nearest_shares
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.shares import tune_shares


def make_problem(num_nodes=2, num_experts=2, slots=2, **changes):
    """One rank a node, everything a second a token: links, ports and ranks."""
    fields = {
        "num_layers": 1, "num_experts": num_experts, "slots_per_rank": slots, "replicate": True,
        "node_of_rank": np.arange(num_nodes), "rack_of_node": np.zeros(num_nodes, np.int64),
        "bytes_per_second": np.ones((num_nodes, num_nodes)), "latency_seconds": np.zeros((num_nodes, num_nodes)),
        "egress_bytes_per_second": np.ones(num_nodes), "ingress_bytes_per_second": np.ones(num_nodes),
        "uplink_bytes_per_second": np.array([np.inf]), "memory_bytes": np.full(num_nodes, 100), "expert_bytes": 1,
        "bytes_per_token": 1, "seconds_per_token": 1.0, "tokens_of_rank": np.full(num_nodes, 12.0),
        "probability": np.full((1, num_nodes, num_experts), 1 / num_experts), "objective": "step",
    }  # fmt: skip
    return PlacementProblem(**(fields | changes))


def check_whole(problem, experts, split):
    """Every node's tokens for every expert go somewhere, and nothing goes to an empty slot."""
    for layer, of_layer in enumerate(experts):
        whole = np.zeros((problem.num_nodes, problem.num_experts))
        for slot in np.flatnonzero(of_layer >= 0):
            whole[:, of_layer[slot]] += split[layer][:, slot]
        assert np.allclose(whole, 1) and (split >= 0).all()
        assert (split[layer][:, of_layer < 0] == 0).all()


def test_a_busy_rank_gives_to_the_other_replica_by_hand():
    """Node 0 has most tokens and replicas of both experts are on both nodes: it sends away until both are as busy."""
    problem = make_problem(tokens_of_rank=np.array([12.0, 2.0]))
    experts = np.array([[0, 1, 0, 1]])
    assert layer_seconds(problem, 0, experts[0]) == 12
    split = tune_shares(problem, experts, 5.0)
    check_whole(problem, experts, split)
    assert layer_seconds(problem, 0, experts[0], split[0]) == pytest.approx(7)  # of 14 tokens, seven a rank
    sent = 6 * split[0][0, 2:].sum()
    assert sent == pytest.approx(5, rel=1e-4) and split[0][1, :2].sum() == pytest.approx(0, abs=1e-4)


def test_without_replicas_or_gain_the_nearest_stay():
    problem = make_problem()
    assert tune_shares(problem, np.array([[0, -1, 1, -1]]), 5.0) is None  # nothing to choose
    assert tune_shares(problem, np.array([[0, 1, 0, 1]]), 5.0) is None  # all at home already
    assert tune_shares(make_problem(tokens_of_rank=np.zeros(2)), np.array([[0, 1, 0, 1]]), 5.0) is None
    uneven = make_problem(tokens_of_rank=np.array([12.0, 2.0]))
    assert tune_shares(uneven, np.array([[0, 1, 0, 1]]), 0.0) is None  # no time


def test_a_gain_below_half_a_percent_is_not_taken():
    almost = make_problem(tokens_of_rank=np.array([12.05, 12.0]))
    assert tune_shares(almost, np.array([[0, 1, 0, 1]]), 5.0) is None


def test_layers_alike_are_solved_once_and_split_alike():
    problem = make_problem(
        num_layers=3, probability=np.full((3, 2, 2), 0.5), tokens_of_rank=np.array([12.0, 2.0])
    )  # fmt: skip
    split = tune_shares(problem, np.array([[0, 1, 0, 1]] * 2 + [[0, 1, 1, 0]]), 5.0)
    assert np.array_equal(split[0], split[1]) and split.shape == (3, 2, 4)
    check_whole(problem, np.array([[0, 1, 0, 1]] * 2 + [[0, 1, 1, 0]]), split)


def grid_best(problem, experts, steps):
    """Try every share of a coarse grid -> the least cost."""
    used = [np.flatnonzero(experts == expert) for expert in range(problem.num_experts)]
    mixes = {
        count: [mix for mix in itertools.product(range(steps + 1), repeat=count) if sum(mix) == steps]
        for count in {len(slots) for slots in used}
    }
    places = [(node, slots) for node in range(problem.num_nodes) for slots in used]
    best = np.inf
    for choice in itertools.product(*(mixes[len(slots)] for _, slots in places)):
        share = np.zeros((problem.num_nodes, len(experts)))
        for (node, slots), mix in zip(places, choice, strict=True):
            share[node, slots] = np.array(mix) / steps
        best = min(best, layer_seconds(problem, 0, experts, share))
    return best


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["links", "ports", "step"]), st.booleans())
def test_no_share_of_a_grid_is_better(seed, objective, racks):
    random = np.random.default_rng(seed)
    problem = make_problem(
        objective=objective,
        tokens_of_rank=random.integers(1, 20, 2).astype(float),
        probability=random.dirichlet(np.ones(2), (1, 2)),
        bytes_per_second=random.uniform(0.5, 2, (2, 2)),
        egress_bytes_per_second=random.uniform(0.5, 2, 2),
        ingress_bytes_per_second=random.uniform(0.5, 2, 2),
        rack_of_node=np.arange(2) * racks,
        uplink_bytes_per_second=random.uniform(0.3, 2, 1 + racks),
        seconds_per_token=random.uniform(0.2, 2),
    )
    experts = np.array([0, 1, 0, random.integers(-1, 2)])
    nearest = layer_seconds(problem, 0, experts)
    split = tune_shares(problem, experts[None], 5.0)
    made = nearest if split is None else layer_seconds(problem, 0, experts, split[0])
    if split is not None:
        check_whole(problem, experts[None], split)
    slack = 1.001 if split is not None else 1 / 0.995 + 1e-6  # too small a gain was not taken
    assert made <= nearest and made <= grid_best(problem, experts, 5) * slack


@pytest.mark.parametrize("name", ["E = 64 one spare slot a GPU", "all of it together, 32 experts"])
def test_real_sizes_gain_and_stay_whole(name):
    problem = make_family(name, "64 x 64", 1, "step")
    random = np.random.default_rng(0)
    spare = problem.num_ranks * problem.slots_per_rank - problem.num_experts
    asked = [problem.demand(layer).sum(axis=0) for layer in range(problem.num_layers)]
    experts = np.stack([  # the hottest have the most replicas
        random.permutation([*range(problem.num_experts), *random.choice(problem.num_experts, spare, p=of / of.sum())])
        for of in asked
    ])  # fmt: skip
    split = tune_shares(problem, experts, 10.0)
    check_whole(problem, experts, split)
    layers = range(problem.num_layers)
    before = sum(layer_seconds(problem, layer, experts[layer]) for layer in layers)
    assert sum(layer_seconds(problem, layer, experts[layer], split[layer]) for layer in layers) < 0.97 * before


def test_latency_is_weighed_when_it_counts():
    """Where a link in use costs as much as all tokens together, no share leaves its node."""
    problem = make_problem(
        tokens_of_rank=np.array([12.0, 2.0]), latency_seconds=np.full((2, 2), 50.0), count_latency=True
    )  # fmt: skip
    experts = np.array([[0, 1, 0, 1]])
    assert tune_shares(problem, experts, 5.0) is None
    free = dataclasses.replace(problem, count_latency=False)
    assert not np.array_equal(tune_shares(free, experts, 5.0)[0], make_nearest_shares(free, experts[0]))
