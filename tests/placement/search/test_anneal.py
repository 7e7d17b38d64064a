"""The search of one layer: never worse than its start, within all limits, repeatable, and over when it is told."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.families import make_family
from placement.problems import assert_layer_is_placed, has_place, layer_data_of, make_problem, problems

from hpcmoe.placement.cost import layer_seconds, make_nearest_shares, tokens_on_links
from hpcmoe.placement.rules import make_contiguous
from hpcmoe.placement.search.anneal import (
    FEW,
    MOST_ROUNDS,
    REPLICATED,
    ROUND,
    SINGLE,
    TIE_FACTOR,
    Budget,
    find_cooling,
    reduce_crossing,
    search_layout,
)
from hpcmoe.placement.search.seeds import PinnedCounts, make_packed


@settings(max_examples=60)
@given(problems(tight=True).filter(has_place), st.integers(0, 99), st.sampled_from([500, 3000]))
def test_a_search_ends_no_worse_than_it_began_and_within_limits(problem, seed, proposals):
    layer_data = layer_data_of(problem)
    start = make_packed(layer_data, PinnedCounts())
    found = search_layout(layer_data, start, seed, Budget(proposals=proposals, goal=-1.0))
    assert_layer_is_placed(layer_data, found.expert_at)
    assert (found.num_proposals, found.cut_short) == (proposals, False)
    assert cost(problem, found.expert_at) <= cost(problem, start) * (1 + 1e-9)

    # Clearing up makes no resource busier, and lets fewer tokens leave their nodes.
    cleared = reduce_crossing(layer_data, found.expert_at, seed, 500)
    assert_layer_is_placed(layer_data, cleared)
    seconds, crossing = evaluate(problem, cleared)
    seconds_before, crossing_before = evaluate(problem, found.expert_at)
    assert seconds <= seconds_before * (1 + 1e-8)
    assert crossing <= crossing_before * (1 + 1e-8)


def cost(problem, expert_at):
    """Find what the first layer costs with experts at [P, s]."""
    return evaluate(problem, expert_at)[0]


def evaluate(problem, expert_at):
    """Compute what the first layer costs with experts at [P, s'] -> seconds, tokens that leave their nodes."""
    spare = problem.slots_per_rank - expert_at.shape[1]
    slots = np.pad(expert_at, ((0, 0), (0, spare)), constant_values=-1).ravel()
    sent = tokens_on_links(problem, 0, slots, make_nearest_shares(problem, slots))
    return layer_seconds(problem, 0, slots), sent.sum() - np.trace(sent)


@pytest.mark.parametrize("name", ["uneven links", "E = 64 one spare slot a GPU"])
def test_the_same_seed_and_proposals_end_alike_and_other_seeds_elsewhere(name):
    layer_data = layer_data_of(make_family(name, "16 x 16", 0, "ports"))
    start = make_contiguous(layer_data)
    first, again, other = (
        search_layout(layer_data, start, seed, Budget(proposals=5000)).expert_at for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (reduce_crossing(layer_data, first, 3, 500) == reduce_crossing(layer_data, again, 3, 500)).all()


@pytest.mark.parametrize("name", ["E = 64 one spare slot a GPU", "all of it together, 32 experts"])
def test_more_proposals_find_more(name):
    problem = make_family(name, "16 x 16", 0, "links")
    layer_data = layer_data_of(problem)
    start = make_packed(layer_data, PinnedCounts())
    seconds = [cost(problem, search_layout(layer_data, start, 0, Budget(proposals=n)).expert_at) for n in (500, 20000)]
    assert seconds[1] < 0.95 * seconds[0] < 0.95 * cost(problem, start)


def test_it_ends_at_once_when_the_goal_is_met():
    problem = make_problem([2, 2], 8, 2, seed=3)
    layer_data = layer_data_of(problem)
    start = make_contiguous(layer_data)
    goal = layer_seconds(problem, 0, start.ravel())
    found = search_layout(layer_data, start, 0, Budget(proposals=10**9, goal=goal))
    assert (found.num_proposals, found.cut_short) == (0, False)
    np.testing.assert_array_equal(found.expert_at, start)

    # A goal on the way ends it on the way.
    best = cost(problem, search_layout(layer_data, start, 0, Budget(proposals=5000)).expert_at)
    assert best * TIE_FACTOR < goal
    found = search_layout(layer_data, start, 0, Budget(proposals=10**9, goal=best))
    assert 0 < found.num_proposals < 10**9 and not found.cut_short


@pytest.mark.parametrize(("proposals", "cut_short"), [(10**9, True), (0, False), (500, False)])
def test_the_clock_ends_it_and_it_says_so(proposals, cut_short):
    layer_data = layer_data_of(make_family("E = 64 one spare slot a GPU", "16 x 16", 0, "links"))
    start = make_contiguous(layer_data)
    begun = time.perf_counter()
    found = search_layout(layer_data, start, 0, Budget(seconds=0.2, proposals=proposals))
    assert time.perf_counter() - begun < 0.4
    assert found.cut_short == cut_short
    assert found.num_proposals == 500 if proposals == 500 else found.num_proposals > 500


def test_the_start_is_left_as_it_is():
    layer_data = layer_data_of(make_family("slow rack", "16 x 16", 0, "links"))
    start = make_contiguous(layer_data)
    before = start.copy()
    search_layout(layer_data, start, 0, Budget(proposals=1000))
    reduce_crossing(layer_data, start, 0, 500)
    np.testing.assert_array_equal(start, before)


def test_few_proposals_are_not_spent_on_annealing():
    single, copied = (layer_data_of(make_problem([2, 2], 8, 2, replicate=replicate)) for replicate in (False, True))
    assert (
        find_cooling(single, 0.0, 399) == find_cooling(copied, 0.0, 399) == (0, FEW[0], 0.0)
    )  # 50 for each of 8 slots
    assert (find_cooling(single, 0.0, 400)[1], find_cooling(copied, 0.0, 400)[1]) == (SINGLE[0], REPLICATED[0])
    assert find_cooling(copied, 0.0, 0)[1] is REPLICATED[0]  # by the clock, not begun


def test_a_long_search_goes_in_rounds_of_all_cycles():
    layer_data = layer_data_of(make_problem([2, 2], 8, 2))
    length = ROUND * 8 * 8  # proposals for its 8 slots and 8 experts
    turns = [find_cooling(layer_data, part, 2 * length) for part in (0.0, 0.449, 0.475, 0.5, 0.725, 0.975)]
    assert [(turn, cycle is SINGLE[1]) for turn, cycle, _ in turns] == [
        (0, False), (0, False), (0, True), (1, False), (1, False), (1, True),
    ]  # fmt: skip
    assert turns[4][2] == pytest.approx(0.5)  # half of what is cooled down in a round
    assert find_cooling(layer_data, 0.99, 1000 * length)[0] == int(0.99 * MOST_ROUNDS)
