"""Who is measured at the same time: every pair once, nobody twice in a round, uplinks alone while time allows."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.measure import rounds
from hpcmoe.cluster.measure.rounds import SHARE_SECONDS

racks_of = st.lists(st.integers(0, 3), min_size=1, max_size=14).map(
    lambda racks: np.unique(racks, return_inverse=True)[1]
)


def crossings(pairs, rack_of_node):
    """Count how many pairs cross each rack's uplink."""
    racks = rack_of_node[pairs]
    return np.bincount(racks[racks[:, 0] != racks[:, 1]].ravel(), minlength=max(rack_of_node) + 1)


@given(racks_of, st.floats(0.0, 20.0))
def test_rounds_have_every_pair_once_and_are_disjoint(rack_of_node, seconds):
    made = rounds.make_pair_rounds(rack_of_node, seconds)
    pairs = sorted(tuple(sorted(pair)) for of_round in made for pair in of_round.tolist())
    assert pairs == list(itertools.combinations(range(len(rack_of_node)), 2))
    for of_round in made:
        assert len(of_round) and len(np.unique(of_round)) == of_round.size


@pytest.mark.parametrize("num_nodes", range(1, 12))
def test_the_circle_pairs_all_nodes_in_as_few_rounds_as_there_can_be(num_nodes):
    made = rounds.make_circle(num_nodes)
    assert len(made) == (num_nodes - 1 + num_nodes % 2) * (num_nodes > 1)
    assert {len(pairs) for pairs in made} <= {num_nodes // 2}


def test_pairs_are_measured_alone_while_time_allows():
    one_rack = np.zeros(8, np.int64)
    assert {len(pairs) for pairs in rounds.make_pair_rounds(one_rack, 28 * SHARE_SECONDS)} == {1}
    assert {len(pairs) for pairs in rounds.make_pair_rounds(one_rack, 14 * SHARE_SECONDS)} == {2}
    assert len(rounds.make_pair_rounds(one_rack, 0.01)) == 7
    assert len(rounds.make_pair_rounds(np.zeros(7, np.int64), 0.01)) == 7  # odd: one node rests in each


@pytest.mark.parametrize(("seconds", "most"), [(1000.0, 1), (24 * SHARE_SECONDS, 1), (15 * SHARE_SECONDS, 2)])
def test_as_few_pairs_cross_an_uplink_at_once_as_time_allows(seconds, most):
    rack_of_node = np.arange(8) // 4
    made = rounds.make_pair_rounds(rack_of_node, seconds)
    assert max(crossings(pairs, rack_of_node).max() for pairs in made) == most
    assert len(made) * SHARE_SECONDS <= seconds


def test_pairs_within_racks_share_no_uplink():
    made = rounds.make_pair_rounds(np.array([0, 0, 1, 1]), 5 * SHARE_SECONDS)
    assert sorted(len(pairs) for pairs in made) == [1, 1, 1, 1, 2]


def test_a_thousand_nodes_are_paired_in_no_time():
    begin = time.process_time()
    assert len(rounds.make_pair_rounds(np.arange(1000) // 32, 1.0)) == 999
    assert len(rounds.make_port_rounds(np.arange(1000) // 32, 0.4)) == 10
    assert len(rounds.make_uplink_rounds(np.arange(1000) // 32, 0.31)) == 6
    assert time.process_time() - begin < 5.0


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=30), st.integers(1, 4))
def test_no_part_of_a_split_has_more_than_it_may(shared, width):
    pairs = np.arange(2 * len(shared)).reshape(-1, 2)
    parts = rounds.split_greedily(pairs, np.array(shared), width)
    assert sorted(pair for part in parts for pair in part.tolist()) == pairs.tolist()
    for part in parts:
        things = [thing for first, _ in part.tolist() for thing in {*shared[first // 2]} if thing >= 0]
        assert max(Counter(things).values(), default=0) <= width
    if len(parts) > 1:
        assert width < len(shared)


@given(racks_of, st.sampled_from([0.0, 1.0, 100.0]))
def test_each_node_sends_to_several_at_once_and_receives_from_them(rack_of_node, seconds):
    made = rounds.make_port_rounds(rack_of_node, seconds)
    if len(rack_of_node) < 3:
        assert made == []
        return
    sent, received = (
        np.array([np.bincount(flows[:, end], minlength=len(rack_of_node)).tolist() for flows in made]) for end in (0, 1)
    )
    assert sent.max(axis=0).min() >= 2 and received.max(axis=0).min() >= 2
    assert sent.max() <= rounds._MAX_PEERS and received.max() <= rounds._MAX_PEERS
    assert not ((sent > 0) & (received > 0)).any()  # one way at a time
    assert not ((sent > 1).any(axis=1) & (received > 1).any(axis=1)).any()
    if seconds == 100.0:
        assert ((sent > 1).sum(axis=1) + (received > 1).sum(axis=1) == 1).all()  # one port at a time


def test_blocks_keep_to_their_rack():
    rack_of_node = np.arange(20) % 4
    for flows in rounds.make_port_rounds(rack_of_node, 0.0):
        assert (rack_of_node[flows[:, 0]] == rack_of_node[flows[:, 1]]).all()


@given(racks_of)
def test_each_rack_sends_to_all_others_at_once_and_receives_from_them(rack_of_node):
    made = rounds.make_uplink_rounds(rack_of_node, 100.0)
    num_racks = int(max(rack_of_node)) + 1
    assert len(made) == {1: 0, 2: 2}.get(num_racks, 2 * num_racks)
    for turn, flows in enumerate(made):
        rack, end = turn // 2, turn % 2
        if num_racks > 2:
            assert (rack_of_node[flows[:, end]] == rack).all() and (rack_of_node[flows[:, 1 - end]] != rack).all()
            assert set(flows[:, end].tolist()) == set(np.flatnonzero(rack_of_node == rack).tolist())
            assert len(set(rack_of_node[flows[:, 1 - end]].tolist())) >= 2  # not held back by one other uplink


@given(racks_of)
def test_all_nodes_of_a_rack_send_to_another_rack_at_once_when_time_is_short(rack_of_node):
    num_racks = int(max(rack_of_node)) + 1
    made = rounds.make_uplink_rounds(rack_of_node, 1.9 * num_racks * SHARE_SECONDS)
    met = set()
    for flows in made:
        racks = rack_of_node[flows]
        pairs = set(map(tuple, racks.tolist()))
        assert len({rack for pair in pairs for rack in pair}) == 2 * len(pairs)  # each rack meets one, one way
        for a, _ in pairs:
            assert set(flows[racks[:, 0] == a, 0].tolist()) == set(np.flatnonzero(rack_of_node == a).tolist())
        met |= pairs
    everyone = set(range(num_racks)) if num_racks > 1 else set()
    assert {a for a, _ in met} == {b for _, b in met} == everyone


def test_little_time_lets_each_rack_meet_two_others_at_most():
    assert len(rounds.make_uplink_rounds(np.arange(32) // 4, 0.0)) == 4
    assert rounds.make_uplink_rounds(np.zeros(5, np.int64), 1.0) == []
