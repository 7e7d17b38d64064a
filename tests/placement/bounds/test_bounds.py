"""Bounds: no layout comes below them, tiny layers meet them, and the time they take is the time they were given."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from covering import table
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.exact import cheapest_by_counts, solve_single, try_all
from placement.families import FAMILIES, make_family

from hpcmoe.placement.bounds import choices
from hpcmoe.placement.bounds.bounds import bound_layer, count_layer, count_spare
from hpcmoe.placement.bounds.choices import count_combinations, list_combinations, make_choices
from hpcmoe.placement.cost import meets_bound
from hpcmoe.placement.problem import OBJECTIVES, PlacementProblem


def make_tiny(seed, ranks_of_node, num_experts, slots_per_rank, num_layers=1, **changes):
    """Make layers with few enough layouts to try them all."""
    rng = np.random.default_rng(seed)
    num_nodes, num_ranks = len(ranks_of_node), sum(ranks_of_node)
    num_racks = changes.pop("num_racks", 1)
    fields = {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "slots_per_rank": slots_per_rank,
        "replicate": True,
        "node_of_rank": np.repeat(np.arange(num_nodes), ranks_of_node),
        "rack_of_node": np.arange(num_nodes) * num_racks // num_nodes,
        "bytes_per_second": rng.uniform(1e8, 1e9, (num_nodes, num_nodes)),
        "latency_seconds": rng.uniform(1e-5, 1e-3, (num_nodes, num_nodes)),
        "egress_bytes_per_second": rng.uniform(1e8, 1e9, num_nodes),
        "ingress_bytes_per_second": rng.uniform(1e8, 1e9, num_nodes),
        "uplink_bytes_per_second": rng.uniform(1e8, 1e9, num_racks),
        "memory_bytes": np.full(num_nodes, 10**9),
        "expert_bytes": 1,
        "bytes_per_token": 128,
        "seconds_per_token": 10 ** rng.uniform(-8, -6),
        "tokens_of_rank": rng.integers(0, 1000, num_ranks),
        "probability": rng.dirichlet(np.full(num_experts, 0.5), (num_layers, num_nodes)),
    }
    return PlacementProblem(**(fields | changes))


@st.composite
def tiny_layers(draw):
    """Draw a tiny layer of any kind and the room on its nodes."""
    ranks_of_node, slots = draw(
        st.sampled_from([((1, 1), 2), ((2, 1), 2), ((2, 2), 1), ((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 0, 2), 1)])
    )
    problem = make_tiny(
        draw(st.integers(0, 999)),
        ranks_of_node,
        num_experts=draw(st.integers(1, min(4, sum(ranks_of_node) * slots))),
        slots_per_rank=slots,
        num_racks=draw(st.integers(1, 2)),
        replicate=draw(st.booleans()),
        objective=draw(st.sampled_from(OBJECTIVES)),
        count_latency=draw(st.booleans()),
    )
    room = problem.slots_of_node
    short = draw(st.integers(0, int(room.sum()) - problem.num_experts))
    for node in draw(st.permutations(range(len(room)))):  # memory may be short here and there
        room[node] -= (less := min(short, int(room[node])))
        short -= less
    return problem, room


@pytest.mark.parametrize("most_entries", [0, 80, choices._MOST_ENTRIES])  # counting alone; free splits; all ways
@settings(max_examples=15)
@given(tiny_layers(), st.floats(1, 2))
def test_no_layout_costs_less(most_entries, tiny, worse):
    problem, room = tiny
    optimum, slots = try_all(problem, 0, room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "_MOST_ENTRIES", most_entries)
        for incumbent in (np.inf, worse * optimum, optimum):
            assert 0 <= bound_layer(problem, 0, room, 0.2, incumbent) <= optimum * (1 + 1e-9), slots
        assert 0 <= bound_layer(problem, 0, room) <= optimum * (1 + 1e-9), slots


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(OBJECTIVES), st.integers(1, 2), st.booleans())
def test_single_replicas_are_proven_optimal(seed, objective, num_racks, tight):
    problem = make_tiny(seed, (2, 1, 1), 3, 1, objective=objective, num_racks=num_racks, replicate=False)
    room = problem.slots_of_node - [tight, 0, 0]
    optimum, _ = try_all(problem, 0, room)
    assert solve_single(problem, 0, room) == pytest.approx(optimum, rel=1e-5)
    assert meets_bound(optimum, bound_layer(problem, 0, room, 0.5, optimum))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bounds_of_replicas_are_near_on_average(objective):
    ratios = []
    for seed in range(12):
        problem = make_tiny(seed, (2, 2), 3, 1, objective=objective)
        optimum, _ = try_all(problem, 0, problem.slots_of_node)
        ratios.append(bound_layer(problem, 0, problem.slots_of_node, 0.2, optimum) / optimum)
    assert np.mean(ratios) > 0.8, ratios


@pytest.mark.parametrize(
    ("name", "objective"),
    table([name for name, family in FAMILIES.items() if family.num_experts[0] <= 16], ["links", "ports"]),
)
def test_families_of_single_replicas_at_16_are_within_a_tenth(name, objective):
    problem = dataclasses.replace(make_family(name, "16 x 16", 3, objective), replicate=False)
    room = np.minimum(problem.slots_of_node, problem.memory_replicas // problem.num_layers)
    optimum = solve_single(problem, 0, room)
    assert 0.9 * optimum <= bound_layer(problem, 0, room, 0.5) <= optimum * (1 + 1e-5)
    assert meets_bound(optimum, bound_layer(problem, 0, room, 10.0, optimum))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", FAMILIES)
def test_large_layers_are_counted_at_once(name, objective):
    problem = make_family(name, "256 x 1024", 2, objective)
    room = np.minimum(problem.slots_of_node, problem.memory_replicas // problem.num_layers)
    begin = time.perf_counter()
    assert bound_layer(problem, 0, room, 0.05) > 0
    assert time.perf_counter() - begin < 1  # 0.04 alone on a core


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(0, 3), st.sampled_from(OBJECTIVES))
def test_layers_that_share_memory_leave_each_other_room(seed, extra, objective):
    memory = np.array([4 + extra // 2, 2 + (extra + 1) // 2])  # of two layers of three experts
    problem = make_tiny(seed, (3, 3), 3, 1, num_layers=2, memory_bytes=memory, objective=objective)
    cheapest = min(
        one + other
        for (counts, one), (counts_of_other, other) in itertools.product(
            *(cheapest_by_counts(problem, layer).items() for layer in range(2))
        )
        if (np.add(counts, counts_of_other) <= memory).all()
    )
    room = np.minimum(problem.slots_of_node, problem.memory_replicas)
    assert sum(bound_layer(problem, layer, room, 0.1) for layer in range(2)) <= cheapest * (1 + 1e-9)


def test_a_layer_gets_no_replicas_that_leave_others_without_an_expert():
    memory = np.array([4, 2])
    problem = make_tiny(3, (3, 3), 3, 1, num_layers=2, memory_bytes=memory)
    alone = dataclasses.replace(problem, num_layers=1, probability=problem.probability[:1], memory_bytes=memory * 9)
    room = np.array([3, 2])
    assert bound_layer(problem, 0, room, 0.2) > bound_layer(alone, 0, room, 0.2) * 1.1


def test_free_splits_are_no_worse_than_two_replicas_on_the_faster_node(monkeypatch):
    bandwidth = np.full((3, 3), 1e8)
    bandwidth[:, 2] = 2e8
    tokens, room = np.array([900, 0, 0, 0]), np.array([0, 1, 2])  # the sender has no room
    problem = make_tiny(0, (1, 1, 2), 1, 1, bytes_per_second=bandwidth, tokens_of_rank=tokens)
    optimum, slots = try_all(problem, 0, room)
    assert slots.tolist() == [-1, 0, 0, 0]
    monkeypatch.setattr(choices, "_MOST_ENTRIES", 30)
    assert len(make_choices(problem, room, 2).free_sets) == 1
    assert bound_layer(problem, 0, room, 0.2) == pytest.approx(optimum, rel=1e-5)


def test_the_time_given_is_kept():
    problem = make_family("E = 64 one spare slot a GPU", "64 x 64", 1, "links")
    begin = time.perf_counter()
    bound_layer(problem, 0, problem.slots_of_node, 0.4)
    assert time.perf_counter() - begin < 0.8


def test_more_time_never_lowers_a_bound():
    problem = make_family("all of it together, 32 experts", "16 x 16", 1, "ports")
    room = np.minimum(problem.slots_of_node, problem.memory_replicas // problem.num_layers)
    counted = count_layer(problem, problem.demand(0), room, count_spare(problem, room))
    assert bound_layer(problem, 0, room) == counted
    assert bound_layer(problem, 0, room, 1.0) > counted * 1.01


def test_a_layer_without_tokens_costs_nothing():
    problem = make_tiny(0, (1, 1), 2, 1, tokens_of_rank=np.zeros(2, np.int64))
    assert bound_layer(problem, 0, problem.slots_of_node, 0.1) == 0


def test_one_node_costs_what_its_ranks_compute():
    problem = make_tiny(1, (2,), 2, 1, objective="step")
    optimum, _ = try_all(problem, 0, problem.slots_of_node)
    assert optimum > 0
    assert bound_layer(problem, 0, problem.slots_of_node, 0.1, optimum) == pytest.approx(optimum, rel=1e-5)
    assert bound_layer(dataclasses.replace(problem, objective="links"), 0, problem.slots_of_node, 0.1) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 6))
def test_all_ways_to_lay_replicas_are_listed_once(most, total):
    ways = list_combinations(np.array(most), total)
    assert len(ways) == count_combinations(most, total) == len({tuple(way) for way in ways.tolist()})
    assert ((ways <= most).all(axis=1) & (ways.sum(axis=1) >= 1) & (ways.sum(axis=1) <= total)).all()
    assert (np.diff(ways.sum(axis=1)) >= 0).all()


def test_shares_follow_the_nearest_tier():
    problem = make_tiny(0, (2, 2, 2, 2), 4, 1, num_racks=2)
    found = make_choices(problem, problem.slots_of_node, 4)
    [way] = np.flatnonzero((found.replicas == (0, 2, 1, 1)).all(axis=1))
    assert found.shares[way].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    [way] = np.flatnonzero((found.replicas == (0, 0, 2, 1)).all(axis=1))
    np.testing.assert_allclose(found.shares[way], [[0, 0, 2 / 3, 1 / 3]] * 2 + [[0, 0, 1, 0], [0, 0, 0, 1]])
