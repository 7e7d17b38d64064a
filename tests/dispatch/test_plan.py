"""Plans equal slow ones made row by row, and replicas are chosen by their shares."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpcmoe.dispatch.plan import (
    SlotChooser,
    cumulative_share,
    cut_into_batches,
    make_batch,
    make_plan,
    make_send_order,
    place_among_equals,
    ranges,
)

counts = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.integers(0, 6))  # [P, s]


@st.composite
def choices(draw):
    """Slots [T, K] of a few tokens, and which copies are kept."""
    shape = draw(st.tuples(st.integers(0, 12), st.integers(1, 3)))
    return draw(arrays(np.int64, shape, elements=st.integers(0, 7))), draw(arrays(bool, shape))


def plan_of_received(received):
    """A Plan of which only the received rows matter."""
    none = np.zeros(0, np.int64)
    return make_plan(np.zeros((0, 1), np.int64), none, np.zeros_like(received), received)


@given(choices())
def test_rows_leave_sorted_by_slot_and_then_by_token(choice):
    slots, kept = choice
    order = make_send_order(slots.ravel(), kept.ravel())
    slowly = [copy for slot in range(8) for copy in range(slots.size) if slots.flat[copy] == slot and kept.flat[copy]]
    assert order.tolist() == slowly


@given(choices())
def test_a_plan_finds_every_copys_row_and_every_rows_token(choice):
    slots, kept = choice
    order = make_send_order(slots.ravel(), kept.ravel())
    sent, received = np.arange(8).reshape(4, 2), np.arange(8, 0, -1).reshape(4, 2)
    plan = make_plan(slots, order, sent, received)
    assert plan.row_of_copy.shape == slots.shape
    for t, k in np.ndindex(slots.shape):
        row = plan.row_of_copy[t, k]
        if kept[t, k]:
            assert plan.copy_of_row[row] == t * slots.shape[1] + k and plan.token_of_row[row] == t
        else:
            assert row == 0
    assert plan.send_counts.tolist() == [1, 5, 9, 13] and plan.recv_counts.tolist() == [15, 11, 7, 3]
    assert plan.num_received == 36


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_ranges_are_joined(pairs):
    starts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    slowly = [place for start, length in pairs for place in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == slowly


@given(counts, st.data())
def test_a_batch_holds_its_peers_rows_grouped_by_slot_and_peer(received, data):
    peers = data.draw(st.lists(st.integers(0, len(received) - 1), unique=True, min_size=1))
    batch = make_batch(plan_of_received(received), peers)

    # Walk the receive buffer: peer after peer, each sorted by slot.
    owners = [(p, slot) for p, row in enumerate(received) for slot, count in enumerate(row) for _ in range(count)]
    slowly = [
        place for slot in range(received.shape[1]) for peer in peers
        for place, owner in enumerate(owners) if owner == (peer, slot)
    ]  # fmt: skip
    assert batch.order.tolist() == slowly
    assert batch.rows_of_slot.tolist() == received[peers].sum(axis=0).tolist()
    assert batch.peers == tuple(peers)


@given(counts, st.integers(1, 12), st.data())
def test_batches_take_every_peer_once_and_no_more_rows_than_they_may(received, max_rows, data):
    size = len(received)
    rank = data.draw(st.integers(0, size - 1))
    plan = plan_of_received(received)
    batches = cut_into_batches(plan, rank, max_rows)
    assert sum(batches, []) == [(rank - step) % size for step in range(size)]  # own first, then leftward
    rows = [plan.recv_counts[batch].sum() for batch in batches]
    assert all(count <= max_rows or len(batch) == 1 for batch, count in zip(batches, rows, strict=True))

    # No cut is needless: the next peer would not have fitted.
    for count, following in zip(rows, batches[1:], strict=False):
        assert count + plan.recv_counts[following[0]] > max_rows


@given(st.lists(st.integers(0, 4)))
def test_occurrences_are_numbered(values):
    slowly = [values[:index].count(value) for index, value in enumerate(values)]
    assert place_among_equals(np.array(values, np.int64)).tolist() == slowly


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
def test_copies_go_to_their_experts_slots_by_their_shares(layout, rank, count):
    """Points at even steps meet any interval's share to within one copy; random ones would miss by a dozen."""
    expert_of_replica, shares, num_experts = layout
    chooser = SlotChooser(expert_of_replica, shares, num_experts, rank)
    experts = np.random.default_rng(count).permutation(np.repeat(np.arange(num_experts), count)).reshape(count, -1)
    slots = chooser.choose(experts)
    assert slots.shape == experts.shape
    assert np.array_equal(expert_of_replica[slots], experts)
    taken = np.bincount(slots.ravel(), minlength=len(shares))
    assert (taken[shares == 0] == 0).all()
    assert np.abs(taken - count * shares).max() < 1 + 1e-6


def test_ranks_start_at_different_replicas():
    """A single copy of each of many ranks goes to each replica about equally often."""
    choosers = [SlotChooser(np.zeros(4, int), np.full(4, 0.25), 1, rank) for rank in range(64)]
    first = [chooser.choose(np.zeros((1, 1), int)).item() for chooser in choosers]
    assert np.abs(np.bincount(first) - 16).max() <= 1


def test_an_expert_with_one_replica_needs_no_choosing():
    chooser = SlotChooser(np.array([2, -1, 0, 1]), np.ones(4), 3, rank=5)
    assert chooser.choose(np.array([[0, 1], [2, 0]])).tolist() == [[2, 3], [0, 2]]
