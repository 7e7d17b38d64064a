"""Every kept assignment takes one way and is entered once at home, and replicas are chosen by their shares."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpcmoe.dispatch.plan import (
    SlotChooser,
    count_earlier_equals,
    cumulative_share,
    find_slots_of_shards,
    make_plan,
    num_trailing_rows,
    ranges,
)
from hpcmoe.dispatch.routes import make_routes

ROW_BYTES = 24


@st.composite
def choices(draw):
    """Routes of a rank; slots [T, K], a token's all different; which assignments are kept; tokens of a message."""
    num_nodes, num_slots = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    more = draw(st.lists(st.integers(0, num_nodes - 1), max_size=3))
    node_of_rank = np.array(draw(st.permutations([*range(num_nodes), *more])))
    once = np.full((num_nodes, num_nodes), draw(st.booleans()))
    routes = make_routes(node_of_rank, draw(st.integers(0, len(node_of_rank) - 1)), num_slots, once)
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    num_tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, min(3, len(routes.place_of_slot))))
    all_slots = np.tile(np.arange(len(routes.place_of_slot)), (num_tokens, 1))
    slots = random.permuted(all_slots, axis=1)[:, :top_k]
    kept = random.random(slots.shape) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return routes, slots, kept, draw(st.integers(1, 5))


def plan_of(choice):
    routes, slots, kept, max_tokens = choice
    return make_plan(slots, kept, routes, max_tokens, ROW_BYTES)


@given(choices())
def test_every_kept_copy_takes_exactly_one_way_and_that_of_its_slot(choice):
    (routes, slots, kept, _), plan = choice, plan_of(choice)
    everyone = np.concatenate([plan.assignments, *(message.assignments for message in plan.messages)])
    assert sorted(everyone) == np.flatnonzero(kept).tolist()
    places = routes.place_of_slot[slots.ravel()]

    # The window's assignments lie by local peer and slot, and within it by token.
    slowly = sorted((c for c in np.flatnonzero(kept) if places[c] < routes.num_places), key=lambda c: (places[c], c))
    assert plan.assignments.tolist() == slowly
    assert plan.counts.ravel().tolist() == np.bincount(places[slowly], minlength=routes.num_places).tolist()
    for message in plan.messages:
        begin, end = routes.edges[message.receiver], routes.edges[message.receiver + 1]
        assert ((begin <= places[message.assignments]) & (places[message.assignments] < end)).all()
        assert message.assignments.tolist() == sorted(message.assignments, key=lambda c: (places[c], c))
        of_slot = np.bincount(places[message.assignments] - begin, minlength=end - begin)
        assert message.counts.ravel().tolist() == of_slot.tolist() and message.counts.shape[1] == routes.num_slots


@given(choices())
def test_a_message_holds_each_of_its_tokens_once_and_says_whose_each_copy_is(choice):
    (_, slots, _, max_tokens), plan = choice, plan_of(choice)
    for message in plan.messages:
        assert 1 <= message.num_tokens <= max_tokens and (np.diff(message.tokens) > 0).all()
        assert message.tokens[message.token_of_assignment].tolist() == (message.assignments // slots.shape[1]).tolist()
        assert set(message.token_of_assignment) == set(range(message.num_tokens))
    for receiver in {message.receiver for message in plan.messages}:
        of_landing = [message for message in plan.messages if message.receiver == receiver]
        assert all(message.num_tokens == max_tokens for message in of_landing[:-1])  # no cut is needless
        tokens = np.concatenate([message.tokens for message in of_landing])
        assert (np.diff(tokens) > 0).all()


@given(choices())
def test_entries_cover_exactly_what_comes_home(choice):
    """A row for each of the window's assignments, and one for each token of a message, under one of its assignments."""
    (_, slots, kept, _), plan = choice, plan_of(choice)
    assert plan.row_of_assignment.shape == plan.is_sum.shape == slots.shape and plan.top_k == slots.shape[1]
    entered = plan.row_of_assignment[plan.row_of_assignment >= 0]
    rows = list(range(len(plan.assignments)))
    for message in plan.messages:
        rows += range(message.first, message.first + message.num_tokens)
    assert sorted(entered) == rows and kept[plan.row_of_assignment >= 0].all()
    assert plan.row_of_assignment.ravel()[plan.assignments].tolist() == list(range(len(plan.assignments)))
    assert not plan.is_sum.ravel()[plan.assignments].any()
    for message in plan.messages:
        for place, token in enumerate(message.tokens):
            (k,) = np.flatnonzero(plan.row_of_assignment[token] == message.first + place)
            assert plan.is_sum[token, k] and token * slots.shape[1] + k in message.assignments
    assert plan.is_sum.sum() == sum(message.num_tokens for message in plan.messages)


@given(choices())
def test_messages_lie_one_behind_the_other_behind_the_windows_assignments(choice):
    plan, row = plan_of(choice), len(plan_of(choice).assignments)
    for message in plan.messages:
        assert message.first == row
        assert message.num_rows(ROW_BYTES) == message.num_tokens + -(-8 * message.num_assignments // ROW_BYTES)
        row += message.num_rows(ROW_BYTES)
    assert plan.num_rows == row


@given(choices())
def test_assignments_are_counted_by_the_rank_that_they_are_for(choice):
    (routes, slots, kept, _), plan = choice, plan_of(choice)
    ranks = slots[kept] // routes.num_slots
    assert plan.assignments_to_rank.tolist() == np.bincount(ranks, minlength=len(routes.publishers)).tolist()


@pytest.mark.parametrize("num_slots", [200, 300, 70_000])
def test_any_number_of_slots_is_sorted_by(num_slots):
    """Keys of one, two and eight bytes."""
    routes = make_routes(np.zeros(1, int), 0, num_slots, np.zeros((1, 1), bool))
    slots = np.random.default_rng(0).integers(0, num_slots, (500, 2))
    plan = make_plan(slots, np.ones_like(slots, bool), routes, 9, ROW_BYTES)
    assert plan.assignments.tolist() == np.argsort(slots.ravel(), kind="stable").tolist()


def test_the_trailer_of_assignments_takes_whole_rows():
    assert [num_trailing_rows(assignments, 24) for assignments in (0, 1, 3, 4)] == [0, 1, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_ranges_are_joined(pairs):
    starts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    slowly = [place for start, length in pairs for place in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == slowly


@given(st.lists(st.integers(0, 4)))
def test_occurrences_are_numbered(values):
    slowly = [values[:index].count(value) for index, value in enumerate(values)]
    assert count_earlier_equals(np.array(values, np.int64)).tolist() == slowly


def test_shares_run_up_to_exactly_one_within_each_expert():
    edges = cumulative_share(np.array([0, 0, 0, 2, 5, 5]), np.array([0.1, 0.2, 0.7, 1.0, 0.5, 0.4999999]))
    assert edges.tolist() == pytest.approx([0.1, 0.3, 1.0, 1.0, 0.5, 1.0])
    assert edges[[2, 3, 5]].tolist() == [1, 1, 1]


@st.composite
def layouts(draw):
    """expert_of_replica [S] that has every expert at least once, and shares of the replicas."""
    num_experts = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(-1, num_experts - 1), max_size=6))
    experts = np.array(draw(st.permutations([*range(num_experts), *more])))
    weights = np.array(draw(st.lists(st.integers(0, 4), min_size=len(experts), max_size=len(experts))), float)
    totals = np.array([weights[experts == expert].sum() for expert in range(num_experts)])
    assume((totals > 0).all())
    return experts, np.where(experts >= 0, weights / totals[experts], 0.0), num_experts


@given(layouts(), st.integers(0, 20), st.integers(1, 600))
def test_assignments_go_to_their_experts_slots_by_their_shares(layout, rank, count):
    """Points at even steps meet any interval's share to within one assignment; random ones would miss by a dozen."""
    expert_of_replica, shares, num_experts = layout
    chooser = SlotChooser(expert_of_replica, shares, np.arange(len(shares))[:, None], num_experts, rank)
    experts = np.random.default_rng(count).permutation(np.repeat(np.arange(num_experts), count)).reshape(count, -1)
    slots = chooser.choose(experts)
    assert slots.shape == experts.shape
    assert np.array_equal(expert_of_replica[slots], experts)
    taken = np.bincount(slots.ravel(), minlength=len(shares))
    assert (taken[shares == 0] == 0).all()
    assert np.abs(taken - count * shares).max() < 1 + 1e-6


def test_ranks_start_at_different_replicas():
    """A single assignment of each of many ranks goes to each replica about equally often."""
    choosers = [SlotChooser(np.zeros(4, int), np.full(4, 0.25), np.arange(4)[:, None], 1, rank) for rank in range(64)]
    first = [chooser.choose(np.zeros((1, 1), int)).item() for chooser in choosers]
    assert np.abs(np.bincount(first) - 16).max() <= 1


def test_an_expert_with_one_replica_needs_no_choosing():
    chooser = SlotChooser(np.array([2, -1, 0, 1]), np.ones(4), np.arange(4)[:, None], 3, rank=5)
    assert chooser.choose(np.array([[0, 1], [2, 0]])).tolist() == [[2, 3], [0, 2]]


def test_each_copy_goes_to_all_shards_of_its_expert():
    """Two positions of two slots each, an expert's three shards on neighbouring ranks: slots 2 * rank + own."""
    slots = find_slots_of_shards(4, 2, 3)
    assert slots.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    chooser = SlotChooser(np.array([2, -1, 0, 1]), np.ones(4), slots, 3, rank=5)
    assert chooser.choose(np.array([[0, 1], [2, 0]])).tolist() == [[6, 8, 10, 7, 9, 11], [0, 2, 4, 6, 8, 10]]
    assert chooser.choose(np.zeros((0, 2), int)).shape == (0, 6)
    twice = SlotChooser(np.array([0, 0]), np.full(2, 0.5), find_slots_of_shards(2, 1, 2), 1, rank=0)
    chosen = twice.choose(np.zeros((8, 1), int))
    assert np.unique(chosen, axis=0).tolist() == [[0, 1], [2, 3]]  # whole replicas, never a shard of each
