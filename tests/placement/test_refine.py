"""From a placement few replicas move, to a better one; none moves where nothing is gained."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from placement.problems import make_problem, problems

from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.refine import refine, undo_slot
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.placement.solve import SearchOptions, make_placement

ORDERS = SearchOptions(seconds=20.0, iterations=1000)


def cost(problem, layouts):
    return np.array([layer_seconds(problem, layer, experts) for layer, experts in enumerate(layouts)])


def drift(problem, seed, share=0.4):
    """The same problem with other loads: part of each row is drawn anew."""
    fresh = np.random.default_rng(seed).dirichlet(np.full(problem.num_experts, 0.5), problem.probability.shape[:2])
    return dataclasses.replace(problem, probability=(1 - share) * problem.probability + share * fresh)


def count_arrivals(problem, old, new):
    """Replicas on ranks that lacked them, of each layer."""
    shape = len(old), problem.num_ranks, -1
    return [
        sum(len(set(now) - set(before) - {EMPTY}) for before, now in zip(*pair, strict=True))
        for pair in zip(old.reshape(shape).tolist(), new.reshape(shape).tolist(), strict=True)
    ]


@settings(max_examples=10)
@given(problems())
def test_a_layout_nearby_is_valid_costs_no_more_and_moves_few(problem):
    present = make_placement(problem, seconds=5.0, iterations=200).expert_of_replica
    problem = drift(problem, seed=3)
    for most_moves in (1, 3):
        refined = refine(problem, present, most_moves, ORDERS)
        assert (cost(problem, refined) <= cost(problem, present) * (1 + 1e-9)).all()
        assert max(count_arrivals(problem, present, refined)) <= most_moves
        rows = refined.reshape(problem.num_layers, problem.num_ranks, -1)
        for before, now in zip(present.reshape(rows.shape), rows, strict=True):
            held = now[now != EMPTY]
            assert set(held) == set(range(problem.num_experts))
            assert all(len(set(r[r != EMPTY])) == (r != EMPTY).sum() for r in now)
            assert problem.replicate or len(held) == problem.num_experts
            for was, iss in zip(before, now, strict=True):  # what stays on a rank stays in its slot
                stays = np.isin(was, iss) & (was != EMPTY)
                assert (was[stays] == iss[stays]).all()
        used = np.bincount(problem.node_of_slot, (refined != EMPTY).sum(axis=0), problem.num_nodes)
        assert (used <= problem.memory_replicas).all()


def test_memory_that_is_short_is_kept_to():
    problem = make_problem([2, 2], 6, 2, num_layers=3, memory_bytes=np.array([11000, 9000]), replicate=True)
    present = make_placement(problem, seconds=5.0, iterations=200).expert_of_replica
    for seed in range(5):
        refined = refine(drift(problem, seed, share=1.0), present, 4, ORDERS)
        assert (np.bincount(problem.node_of_slot, (refined != EMPTY).sum(axis=0)) <= [11, 9]).all()


@pytest.mark.parametrize("replicate", [False, True])
def test_few_moves_win_back_most_of_what_a_drift_has_cost(replicate):
    """The cold solve moves many times more replicas and gains little beyond."""
    kept, cold_moves, moves = [], 0, 0
    for seed in range(3):
        problem = make_problem([2] * 8, 16, 2, seed, objective="ports", num_racks=2, replicate=replicate)
        present = make_placement(problem, seconds=20.0, iterations=20000).expert_of_replica
        problem = drift(problem, seed, share=0.2)
        cold = make_placement(problem, seconds=20.0, iterations=20000).expert_of_replica
        refined = refine(problem, present, 8, SearchOptions(seconds=20.0, iterations=20000))
        kept.append(cost(problem, refined)[0] / cost(problem, cold)[0])
        moves += count_arrivals(problem, present, refined)[0]
        cold_moves += count_arrivals(problem, present, cold)[0]
    assert np.mean(kept) < 1.08 and max(kept) < 1.2, kept
    assert moves < 0.5 * cold_moves


def test_nothing_moves_where_loads_stay():
    problem = make_problem([2, 2, 2], 12, 2, seed=1, objective="step")
    present = make_placement(problem, seconds=20.0, iterations=10000).expert_of_replica
    assert (refine(problem, present, 8, ORDERS) == present).all()


def test_the_same_iterations_give_the_same_layout():
    problem = make_problem([2] * 4, 8, 2, seed=4, num_layers=2, replicate=True)
    present = make_placement(problem, seconds=20.0, iterations=1000).expert_of_replica
    problem = drift(problem, 0)
    first, second = (refine(problem, present, 3, ORDERS) for _ in range(2))
    assert (first == second).all() and (first != present).any()


def test_a_slot_is_given_back_what_it_had():
    old = np.array([0, 1, 2, EMPTY])
    assert undo_slot(old, np.array([1, 2, 0, EMPTY]), 0).tolist() == [0, 2, 1, EMPTY]  # a cycle becomes shorter
    assert undo_slot(old, np.array([0, 1, EMPTY, 2]), 3).tolist() == [0, 1, 2, EMPTY]  # back to where it came from
    assert undo_slot(old, np.array([0, 1, EMPTY, 2]), 2).tolist() == [0, 1, 2, EMPTY]
    assert undo_slot(old, np.array([0, 0, 2, 1]), 1).tolist() == [0, 1, 2, 0]
    assert undo_slot(old, np.array([2, 1, 2, EMPTY]), 0).tolist() == [0, 1, 2, EMPTY]  # a second replica goes
