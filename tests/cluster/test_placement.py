"""Whole placements: that every result is one, what it costs, and what it cannot cost less than."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.cluster.placement import (
    PlacementProblem,
    link_tokens,
    make_placement,
    objective,
    share_out,
    slots_for,
    weigh,
)
from hpcmoe.errors import PlacementError


def make_problem(ranks_of_node, num_experts, seed=0, spare=0, num_layers=2, racks=1, **changes):
    """Make a problem with random tokens, links and probabilities, and memory for all."""
    rng = np.random.default_rng(seed)
    nodes, num_ranks = len(ranks_of_node), sum(ranks_of_node)
    fields = {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "slots_per_rank": slots_for(num_experts, num_ranks, spare),
        "replicate": False,
        "node_of_rank": np.repeat(np.arange(nodes), ranks_of_node),
        "rack_of_node": np.arange(nodes) * racks // nodes,
        "bytes_per_second": rng.uniform(1e8, 1e9, (nodes, nodes)),
        "latency_seconds": np.full((nodes, nodes), 1e-5),
        "memory_bytes": np.full(nodes, 10**12),
        "expert_bytes": 10**6,
        "bytes_per_token": 128,
        "tokens_of_rank": rng.integers(0, 1000, num_ranks),
        "probability": rng.dirichlet(np.full(num_experts, 0.5), (num_layers, nodes)),
    }
    return PlacementProblem(**(fields | changes))


@st.composite
def problems(draw):
    """Draw problems of every kind: any ranks on any nodes, E below and above P, spare slots, tight memory."""
    ranks_of_node = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    num_experts = draw(st.integers(1, 20))
    problem = make_problem(
        ranks_of_node,
        num_experts,
        seed=draw(st.integers(0, 99)),
        spare=draw(st.integers(0, 2)),
        racks=draw(st.integers(1, 3)),
        replicate=draw(st.booleans()),
    )
    room = [draw(st.integers(0, n * problem.slots_per_rank)) for n in ranks_of_node]
    tight = np.array(room) * problem.num_layers * problem.expert_bytes
    return dataclasses.replace(problem, memory_bytes=tight) if draw(st.booleans()) else problem


@given(problems(), st.sampled_from(["packed", "contiguous"]))
def test_every_result_is_a_placement_exactly_when_there_is_one(problem, method):
    if problem.num_experts > problem.room_of_node.sum():
        with pytest.raises(PlacementError, match="do not fit"):
            make_placement(problem, method)
        return
    placement = make_placement(problem, method)
    for layer in range(problem.num_layers):
        assert_layer_is_placed(problem, placement, layer)
    assert_figures_hold(problem, placement)
    if method == "packed":
        contiguous = make_placement(problem, "contiguous")
        assert placement.objective_seconds <= contiguous.objective_seconds * (1 + 1e-9)


def assert_layer_is_placed(problem, placement, layer):
    """Check one layer: all experts there, none twice on a rank, slots and memory respected, shares whole."""
    slots = placement.expert_of_replica[layer].reshape(-1, problem.slots_per_rank)
    held = [[e for e in rank if e >= 0] for rank in slots.tolist()]
    assert all(len(experts) == len(set(experts)) for experts in held)
    assert {e for experts in held for e in experts} == set(range(problem.num_experts))
    count = np.bincount([e for experts in held for e in experts], minlength=problem.num_experts)
    assert placement.replica_count[layer].tolist() == count.tolist()

    # Memory, and one copy each without replicas, as even as the memory lets it be.
    on_rank = np.array([len(experts) for experts in held])
    on_node = np.bincount(problem.node_of_rank, on_rank)
    assert (on_node * problem.num_layers * problem.expert_bytes <= problem.memory_bytes).all()
    if not problem.replicate:
        assert (count == 1).all()
        if problem.room_of_node.sum() == problem.slots_per_rank * len(on_rank):
            assert on_rank.max() - on_rank.min() <= 1

    # All tokens of a node for an expert go to its copies.
    for expert in range(problem.num_experts):
        of_expert = placement.share_of_replica[layer][:, placement.expert_of_replica[layer] == expert]
        np.testing.assert_allclose(of_expert.sum(axis=1), 1)
    assert (placement.share_of_replica[layer][:, placement.expert_of_replica[layer] < 0] == 0).all()


def assert_figures_hold(problem, placement):
    """Check the objective against a sum over links one by one, and the bound and share against it."""
    tokens = np.zeros((problem.num_layers, len(problem.rack_of_node), len(problem.rack_of_node)))
    for layer, sender, slot in np.ndindex(placement.share_of_replica.shape):
        if (expert := placement.expert_of_replica[layer, slot]) >= 0:
            at = problem.node_of_rank[placement.rank_of_replica[slot]]
            asked = problem.tokens_of_rank[problem.node_of_rank == sender].sum()
            asked = asked * problem.probability[layer, sender, expert]
            tokens[layer, sender, at] += asked * placement.share_of_replica[layer, sender, slot]
    np.testing.assert_allclose(link_tokens(problem, placement), tokens, atol=1e-9)
    np.testing.assert_allclose(tokens.sum(axis=(1, 2)), problem.tokens_of_rank.sum())

    seconds = tokens * problem.bytes_per_token / problem.bytes_per_second
    between = ~np.eye(len(problem.rack_of_node), dtype=bool)
    expected = seconds[:, between].max(axis=1).sum() if between.any() else 0.0
    assert placement.objective_seconds == pytest.approx(expected)
    assert 0 <= placement.lower_bound_seconds <= placement.objective_seconds * (1 + 1e-9)
    if tokens.any():
        assert placement.cross_node_share == pytest.approx(tokens[:, between].sum() / tokens.sum())


@settings(max_examples=25)
@given(st.integers(0, 500), st.booleans())
def test_no_placement_at_all_is_below_the_bound(seed, replicate):
    # Three ranks on three nodes, two slots each, and every way to fill them.
    problem = make_problem([1, 1, 1], 3, seed, spare=1, num_layers=1, racks=2, replicate=replicate)
    rows = [pair for pair in itertools.product(range(-1, 3), repeat=2) if pair[0] != pair[1] or pair[0] == -1]
    best = np.inf
    for filled in itertools.product(rows, repeat=3):
        slots = np.ravel(filled)
        copies = np.bincount(slots[slots >= 0], minlength=3)
        if (copies > 0).all() and (replicate or (copies == 1).all()):
            best = min(best, weigh(problem, slots[None], "packed").objective_seconds)
    made = make_placement(problem)
    assert made.lower_bound_seconds <= best * (1 + 1e-9)
    assert made.objective_seconds >= best * (1 - 1e-9)


def test_the_bound_puts_no_expert_on_a_full_node():
    # All tokens come from node 2, which has no memory: they cross one link of a token a second.
    problem = make_problem(
        [1, 1, 1],
        2,
        num_layers=1,
        slots_per_rank=2,
        bytes_per_second=np.full((3, 3), 128.0),
        memory_bytes=np.array([10**9, 10**9, 0]),
        tokens_of_rank=np.array([0, 0, 10]),
        probability=np.tile([1.0, 0.0], (1, 3, 1)),
    )
    made = make_placement(problem)
    assert (made.objective_seconds, made.lower_bound_seconds) == (10, 10)


@pytest.mark.parametrize(
    ("experts", "ranks", "spare", "slots"), [(3, 4, 0, 1), (4, 4, 0, 1), (5, 4, 0, 2), (9, 4, 2, 5)]
)
def test_slots(experts, ranks, spare, slots):
    assert slots_for(experts, ranks, spare) == slots


def test_too_many_experts_for_the_slots_are_refused():
    with pytest.raises(PlacementError) as refused:
        make_placement(make_problem([2, 2], 9, slots_per_rank=2))
    assert str(refused.value) == (
        "9 experts do not fit into 4 ranks x 2 slots = 8; [model] num_experts, [cluster] spare_slots_per_rank"
    )


def test_too_little_memory_is_refused_with_the_arithmetic():
    memory = np.array([5 * 10**9, 3 * 10**9])
    names = ("n0", "n1")
    big = make_problem([2, 2], 4, memory_bytes=memory, expert_bytes=10**9, num_layers=2, node_names=names)
    with pytest.raises(PlacementError) as refused:
        make_placement(big)
    assert str(refused.value) == (
        "4 experts x 2 layers x 1 GB = 8 GB do not fit: node n1 with 3 GB holds 1 experts a layer, all 2 nodes 3; "
        "[model] num_experts, [cluster] memory_bytes_per_node"
    )


def test_memory_that_is_enough_in_all_but_cut_by_slots_is_refused():
    # 8 GB in all would hold the 4 experts x 2 layers, but node 0 has one slot alone.
    problem = make_problem([1, 3], 4, memory_bytes=np.array([6 * 10**9, 4 * 10**9]), expert_bytes=10**9)
    with pytest.raises(PlacementError, match="node 1 with 4 GB holds 2 experts a layer, all 2 nodes 3"):
        make_placement(problem)


def test_an_unknown_method_is_a_bug():
    with pytest.raises(ValueError, match="spiral"):
        make_placement(make_problem([2], 2), "spiral")


def test_shares_go_to_the_nearest_tier_evenly():
    # Nodes 0, 1 are one rack, 2, 3 the other. Expert 0 has copies on nodes 0 and 2, two on node 2.
    problem = make_problem([1, 1, 2, 1], 1, racks=2)
    share = share_out(problem, np.array([0, -1, 0, 0, -1]))
    np.testing.assert_allclose(share[0], [1, 0, 0, 0, 0])  # its own
    np.testing.assert_allclose(share[1], [1, 0, 0, 0, 0])  # its rack's
    np.testing.assert_allclose(share[2], [0, 0, 0.5, 0.5, 0])
    np.testing.assert_allclose(share[3], [0, 0, 0.5, 0.5, 0])
    far = share_out(problem, np.array([-1, -1, 0, 0, -1]))
    np.testing.assert_allclose(far[0], [0, 0, 0.5, 0.5, 0])  # none near: anywhere


def test_experts_follow_the_nodes_that_prefer_them():
    # Node i asks for experts 2i and 2i + 1 alone, but they are numbered otherwise.
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    probability = np.zeros((1, 4, 8))
    for node in range(4):
        probability[0, node, order[2 * node : 2 * node + 2]] = 0.5
    problem = make_problem([2] * 4, 8, num_layers=1, probability=probability)
    assert make_placement(problem).objective_seconds == 0
    assert make_placement(problem).cross_node_share == 0
    assert make_placement(problem, "contiguous").cross_node_share > 0.5


def test_hot_experts_keep_off_the_slow_rack():
    # A published shape: Zipf over 16 experts, 4 nodes in 2 racks, links between racks ten times slower.
    slow = np.where(np.arange(4)[:, None] // 2 == np.arange(4) // 2, 1e9, 1e8)
    zipf = 1 / np.arange(1, 17)
    problem = make_problem(
        [4] * 4,
        16,
        racks=2,
        bytes_per_second=slow,
        tokens_of_rank=np.full(16, 1000),
        probability=np.tile(zipf / zipf.sum(), (2, 4, 1)),
    )
    packed, contiguous = make_placement(problem), make_placement(problem, "contiguous")
    assert packed.objective_seconds < 0.7 * contiguous.objective_seconds
    assert packed.objective_seconds == pytest.approx(packed.lower_bound_seconds)  # the hottest with the coldest three


def test_replicas_keep_tokens_at_home():
    problem = make_problem([4] * 4, 8, racks=2)
    alone, copied = make_placement(problem), make_placement(dataclasses.replace(problem, replicate=True))
    assert (copied.replica_count.sum(axis=1) > 8).all()
    assert copied.objective_seconds < 0.7 * alone.objective_seconds
    assert copied.cross_node_share < 0.7 * alone.cross_node_share


def test_one_node_costs_nothing_and_is_balanced():
    problem = make_problem(
        [4], 8, num_layers=1, probability=np.array([[[0.4, 0.3, 0.1, 0.06, 0.05, 0.04, 0.03, 0.02]]])
    )
    made = make_placement(problem)
    assert (made.objective_seconds, made.lower_bound_seconds, made.cross_node_share) == (0, 0, 0)
    load = problem.probability[0, 0][made.expert_of_replica[0]].reshape(4, 2).sum(axis=1)
    assert load.max() == pytest.approx(0.42)  # the hottest beside the coldest


def test_a_node_without_ranks_is_left_out():
    problem = make_problem([2, 2, 2], 4, node_of_rank=np.array([0, 0, 2, 2]), tokens_of_rank=np.ones(4), replicate=True)
    made = make_placement(problem)
    assert set(problem.node_of_rank[made.rank_of_replica]) == {0, 2}
    assert (link_tokens(problem, made)[:, 1] == 0).all()


def test_layers_of_equal_probabilities_are_placed_alike():
    one = make_problem([2, 2], 6, num_layers=1)
    three = dataclasses.replace(one, num_layers=3, probability=np.repeat(one.probability, 3, axis=0))
    alone, thrice = make_placement(one), make_placement(three)
    assert thrice.expert_of_replica.tolist() == alone.expert_of_replica.tolist() * 3
    assert thrice.objective_seconds == pytest.approx(3 * alone.objective_seconds)


def test_the_objective_sums_each_layer_s_busiest_link():
    problem = make_problem([1, 1], 2, bytes_per_second=np.array([[1.0, 64.0], [32.0, 1.0]]))
    tokens = np.array([[[99.0, 3.0], [1.0, 99.0]], [[99.0, 0.0], [5.0, 99.0]]])
    assert objective(problem, tokens) == 3 * 128 / 64 + 5 * 128 / 32


def test_the_same_problem_has_the_same_placement():
    problem = make_problem([4] * 4, 24, spare=1, racks=2, replicate=True)
    first, second = make_placement(problem), make_placement(problem)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


@pytest.mark.parametrize(
    ("nodes", "ranks", "experts", "layers", "replicate", "seconds"),
    [(4, 16, 16, 12, False, 1.0), (16, 16, 16, 12, True, 1.0), (64, 256, 256, 8, False, 10.0)],
)
def test_placing_takes_little_time(nodes, ranks, experts, layers, replicate, seconds):
    problem = make_problem([ranks // nodes] * nodes, experts, num_layers=layers, racks=2, replicate=replicate)
    begin = time.process_time()
    make_placement(problem)
    assert time.process_time() - begin < seconds
