"""Which replicas move and from where, what a move costs, and the rule by which it is made."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from placement.problems import make_problem

from hpcmoe.errors import PlacementError
from hpcmoe.placement.cost import make_nearest_shares, resource_seconds
from hpcmoe.placement.migrate import (
    estimate_layer_seconds,
    estimate_move_seconds,
    keep_slots,
    list_moves,
    plan_moves,
    should_migrate,
    standard_error,
)
from hpcmoe.placement.result import SearchStats, evaluate


def make_plain(**changes):
    """Four ranks on two nodes of a rack each, with round numbers."""
    fields = {
        "bytes_per_second": np.array([[8.0, 2.0], [4.0, 8.0]]),
        "egress_bytes_per_second": np.full(2, np.inf),
        "ingress_bytes_per_second": np.full(2, np.inf),
        "uplink_bytes_per_second": np.full(2, np.inf),
        "replicate": True,
    }
    return make_problem([2, 2], 4, 1, num_racks=2, **fields | changes)


@given(st.lists(st.permutations(range(-1, 5)), min_size=2, max_size=2))
def test_what_stays_on_a_rank_stays_in_its_slot(layouts):
    old, new = map(np.array, layouts)
    kept = keep_slots(old, new, 3)
    for rank in range(2):
        before, wanted, now = (layout[3 * rank : 3 * rank + 3] for layout in (old, new, kept))
        assert sorted(now) == sorted(wanted)
        assert all(was == iss for was, iss in zip(before, now, strict=True) if was in wanted and was >= 0)


def test_an_arrival_takes_the_slot_of_who_leaves_before_an_empty_one():
    assert keep_slots(np.array([0, -1, 1]), np.array([2, 1, -1]), 3).tolist() == [2, -1, 1]


def test_each_replica_comes_from_the_nearest_holder_that_has_least_to_send():
    problem = make_plain()
    old, new = np.array([[0, 0, 1, 2]]), np.array([[0, 2, 0, 1]])
    moves = list_moves(problem, old, new)
    assert len(moves) == 3 and moves.expert.tolist() == [2, 0, 1] and moves.target.tolist() == [1, 2, 3]
    assert moves.source.tolist() == [3, 0, 2]  # 0 is as far from both of its holders: the first
    assert (moves.layer == 0).all() and (moves.source_slot == 0).all() and (moves.target_slot == 0).all()
    spread = list_moves(problem, np.array([[0, 0, 1, 2]]), np.array([[0, 2, 0, 0]]))
    assert sorted(spread.source.tolist()) == [0, 1, 3]
    assert len(list_moves(problem, old, old)) == 0


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 100.0),  # two experts of 100 bytes over the link of 2 bytes/s
        ({"egress_bytes_per_second": np.array([1.0, np.inf])}, 200.0),
        ({"ingress_bytes_per_second": np.array([1.0, np.inf])}, 100.0),
        ({"ingress_bytes_per_second": np.array([0.5, np.inf])}, 200.0),
        ({"uplink_bytes_per_second": np.array([0.5, np.inf])}, 400.0),
        ({"bytes_per_second": np.array([[0.1, 2.0], [4.0, 8.0]])}, 2000.0),  # two within a node, by its memory
    ],
)
def test_a_move_takes_as_long_as_whatever_has_most_to_carry(changes, seconds):
    problem = make_plain(**changes)
    moves = list_moves(problem, np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.array([[2, 1, 0, 3], [1, 0, 2, 0]]))
    assert moves.source.tolist() == [2, 0, 1, 0, 0]
    assert estimate_move_seconds(problem, moves, 100) == pytest.approx(seconds)


def test_a_layer_costs_its_busiest_resource_as_often_as_it_is_used():
    problem = make_problem([2, 2], 4, 1, num_layers=2, objective="step", seconds_per_token=1e-4)
    layouts = np.array([[0, 1, 2, 3], [3, 1, 2, 0]])
    taken = estimate_layer_seconds(problem, layouts, None, (4, 3))
    for layer, experts in enumerate(layouts):
        seconds = resource_seconds(problem, layer, experts)
        most = {name: array.max() * (3 if name == "rank" else 4) for name, array in seconds.items()}
        assert taken[layer] == max(most.values())
    split = np.stack([make_nearest_shares(problem, experts) for experts in layouts])
    assert (estimate_layer_seconds(problem, layouts, split, (4, 3)) == taken).all()
    ports = dataclasses.replace(problem, objective="links")
    assert (estimate_layer_seconds(ports, layouts, None, (4, 3)) < taken).any()


@pytest.mark.parametrize(
    ("gain", "noise", "cost", "horizon", "adopted"),
    [
        (0.1, 0.0, 7.0, 100, True),  # 10 > 1.3 x 7
        (0.1, 0.0, 7.7, 100, False),  # 10 < 1.3 x 7.7
        (0.1, 0.01, 7.0, 100, False),  # 10 < 9.1 + 1
        (0.1, 0.0, 7.0, 90, False),
        (0.0, 0.0, 0.0, 100, False),  # nothing gained
        (-0.1, 0.0, 0.0, 100, False),
        (0.1, 0.0, 0.0, 0, False),  # no step left
    ],
)
def test_the_rule(gain, noise, cost, horizon, adopted):
    assert should_migrate(gain, noise, cost, horizon, 0.3) == adopted


def test_the_noise_of_a_gain_is_that_of_its_mean_over_parts():
    assert standard_error([1.0, 3.0], 2) == pytest.approx(1.0)
    assert standard_error([1.0, 3.0, 1.0, 3.0], 1) == pytest.approx((4 / 3) ** 0.5)
    assert standard_error([2.0, 2.0, 2.0], 1) == 0.0


def evaluate_slots(problem, experts, split=None):
    return evaluate(problem, np.array(experts), [0.0] * len(experts), "given", SearchStats(), split)


@given(st.permutations([0, 1, 2, 3, 0, 2, -1, -1]), st.permutations([0, 1, 2, 3, 1, 3, -1, -1]), st.integers(0, 99))
def test_a_planned_placement_is_the_same_with_what_stays_in_its_slot(old, new, seed):
    problem = make_problem([2, 2], 4, 2, replicate=True)
    new = np.array([new])
    assume(all(a != b or a < 0 for a, b in [*np.reshape(old, (4, 2)), *new.reshape(4, 2)]))  # no expert twice on a rank
    split = np.random.default_rng(seed).random((1, 2, 8)) * (new >= 0)
    before, after = evaluate_slots(problem, [old]), evaluate_slots(problem, new, split)
    planned, moves = plan_moves(before, after)

    # Each rank has the same experts and shares, those that stay in their slots; what is new comes from who has it.
    kept = planned.expert_of_replica
    for rank in range(4):
        here = slice(2 * rank, 2 * rank + 2)
        shares = [dict(zip(p.expert_of_replica[0, here], p.split[0, :, here].T.tolist(), strict=True))
                  for p in (after, planned)]  # fmt: skip
        assert {e: s for e, s in shares[0].items() if e >= 0} == {e: s for e, s in shares[1].items() if e >= 0}
        assert all(kept[0, slot] == e for slot, e in enumerate(old)
                   if e >= 0 and slot // 2 == rank and e in kept[0, here])  # fmt: skip
    assert sorted(zip(moves.target * 2 + moves.target_slot, moves.expert, strict=True)) == [
        (slot, e) for slot, e in enumerate(kept[0]) if e >= 0 and e != old[slot]
    ]
    assert all(old[2 * source + slot] == e
               for source, slot, e in zip(moves.source, moves.source_slot, moves.expert, strict=True))  # fmt: skip


def test_placements_of_other_sizes_are_refused():
    small = evaluate_slots(make_problem([2, 2], 4, 1), [[0, 1, 2, 3]])
    large = evaluate_slots(make_problem([2, 2], 4, 2), [[0, -1, 1, -1, 2, -1, 3, -1]])
    with pytest.raises(PlacementError, match="of 1 layers x 4 ranks x 1 slots and of 1 x 4 x 2: must be alike"):
        plan_moves(small, large)
