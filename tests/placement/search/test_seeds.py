"""Where a search begins: contiguous and EPLB's by hand, and what greed alone gives."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.families import make_family
from placement.problems import EXPERT_BYTES, assert_layer_is_placed, has_place, layer_data_of, make_problem, problems

from hpcmoe.placement.cost import count_replicas, layer_seconds
from hpcmoe.placement.rules import make_contiguous, make_eplb
from hpcmoe.placement.search.seeds import PinnedCounts, make_packed


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "room", "spread", "in_order"),
    [
        ([2, 2], 4, 1, None, True, [[0], [1], [2], [3]]),
        ([2, 2], 8, 2, None, True, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ([2, 2], 2, 1, None, True, [[0], [-1], [1], [-1]]),  # one on each node
        ([2, 2], 5, 2, None, True, [[0, 1], [2, -1], [3, -1], [4, -1]]),
        ([2, 2], 5, 2, None, False, [[0, 1], [2, 3], [4, -1], [-1, -1]]),
        ([2, 2], 4, 2, [1, 9], True, [[0, -1], [-1, -1], [1, 2], [3, -1]]),  # memory keeps them off node 0
        ([2, 0, 2], 4, 1, None, True, [[0], [1], [2], [3]]),
        ([1, 3], 4, 2, None, True, [[0], [1], [2], [3]]),
    ],
)
def test_contiguous_experts_follow_the_ranks(ranks, experts, slots, room, spread, in_order):
    problem = make_problem(ranks, experts, slots)
    if room:
        problem = dataclasses.replace(problem, memory_bytes=np.array(room) * EXPERT_BYTES)
    assert make_contiguous(layer_data_of(problem), spread).tolist() == in_order


@given(problems(tight=True).filter(has_place), st.booleans())
def test_contiguous_and_packed_keep_the_limits_wherever_there_is_a_placement(problem, spread):
    for layer in range(problem.num_layers):
        layer_data = layer_data_of(problem, layer)
        if layer_data.fewest_of_rank.max(initial=0) == 0 or spread:  # rank by rank leaves the last ones empty
            assert_layer_is_placed(layer_data, make_contiguous(layer_data, spread))
        assert_layer_is_placed(layer_data, make_packed(layer_data, PinnedCounts()))


@given(problems(tight=True).filter(has_place), st.integers(0, 6), st.integers(0, 6))
def test_packed_keeps_the_limits_whatever_is_kept_of_its_own(problem, of_node, of_rack):
    layer_data = layer_data_of(dataclasses.replace(problem, replicate=True))
    assert_layer_is_placed(layer_data, make_packed(layer_data, PinnedCounts(of_node=of_node, of_rack=of_rack)))


def test_eplb_replicates_what_has_most_tokens_a_replica_and_deals_the_heaviest_first():
    problem = make_problem(
        [1, 1, 1], 4, 2, replicate=True,
        tokens_of_rank=np.array([30, 0, 0]), probability=np.tile([0.5, 0.25, 0.15, 0.1], (1, 3, 1)),
    )  # fmt: skip
    # 15, 7.5, 4.5 and 3 tokens on six slots: expert 0 gets both spare ones; two of its replicas meet on rank 1.
    assert make_eplb(layer_data_of(problem)).tolist() == [[1, 3], [0, -1], [0, 2]]


def test_eplb_without_replicas_deals_the_heaviest_first():
    problem = make_problem(
        [1, 1], 4, 2, tokens_of_rank=np.array([10, 0]), probability=np.tile([0.1, 0.4, 0.2, 0.3], (1, 2, 1))
    )
    assert make_eplb(layer_data_of(problem)).tolist() == [[1, 0], [3, 2]]


def test_packing_starts_with_the_hottest_where_the_links_are_fast():
    # Everybody reaches node 1 ten times faster: the hot expert 2 must go there.
    speed = np.full((3, 3), 1e8)
    speed[:, 1] = 1e9
    probability = np.tile([0.1, 0.1, 0.8], (1, 3, 1))
    problem = make_problem([1, 1, 1], 3, 1, bytes_per_second=speed, probability=probability)
    assert make_packed(layer_data_of(problem), PinnedCounts())[1].tolist() == [2]


def test_packed_keeps_each_node_s_hottest_experts_with_it():
    problem = make_problem([2, 1, 1], 6, 3, seed=5, replicate=True)
    for num_own in (1, 2):
        replicas = count_replicas(problem, make_packed(layer_data_of(problem), PinnedCounts(of_node=num_own)).ravel())
        hottest = np.argsort(-problem.demand(0), axis=1)[:, :num_own]
        assert (np.take_along_axis(replicas, hottest, axis=1) == 1).all()


@pytest.mark.parametrize("objective", ["links", "ports", "step"])
def test_greedy_replicas_are_worth_having(objective):
    problem = make_family("E = 64 one spare slot a GPU", "16 x 16", 0, objective)
    alone = make_packed(layer_data_of(dataclasses.replace(problem, replicate=False, even=False)), PinnedCounts())
    copied = [make_packed(layer_data_of(problem), PinnedCounts(of_node=num_own)) for num_own in (1, 2)]
    assert all((expert_at != -1).sum() > problem.num_experts for expert_at in copied)
    seconds = [layer_seconds(problem, 0, expert_at.ravel()) for expert_at in (alone, *copied)]
    assert seconds[2] < seconds[1] < 0.95 * seconds[0]
