"""Memory spread over the layers, and how many experts a rank may and must hold."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from placement.problems import EXPERT_BYTES, has_place, make_problem, problems

from hpcmoe.placement.quotas import divide_memory, make_limits, usable_of_node


@given(problems(tight=True))
def test_all_memory_is_spread_evenly_and_each_layer_has_its_part(problem):
    most = divide_memory(problem)
    usable = np.minimum(problem.memory_bytes // problem.expert_bytes, usable_of_node(problem) * problem.num_layers)
    assert most.sum(axis=0).tolist() == usable.tolist()
    assert (np.ptp(most, axis=0) <= 1).all() and (most <= problem.slots_of_node).all()
    assert np.ptp(most.sum(axis=1)) <= 1
    if has_place(problem):
        assert most.sum(axis=1).min() >= problem.num_experts


def test_what_does_not_divide_goes_to_one_layer_after_the_other():
    problem = make_problem([2, 2, 2], 4, 2, num_layers=3, even=False)
    memory = np.array([7, 5, 4]) * EXPERT_BYTES
    most = divide_memory(dataclasses.replace(problem, memory_bytes=memory + 999))  # less than one more expert
    assert most.tolist() == [[3, 1, 2], [2, 2, 1], [2, 2, 1]]


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "room", "fewest", "most_of_rank", "most_of_node"),
    [
        ([2, 2], 4, 1, [2, 2], [0, 0, 0, 0], 1, [2, 2]),
        ([2, 2], 2, 3, [6, 6], [0, 0, 0, 0], 1, [2, 2]),  # spare slots do not put two on a rank
        ([2, 2], 8, 2, [4, 4], [1, 1, 1, 1], 2, [4, 4]),
        ([2, 2], 7, 2, [4, 4], [1, 1, 1, 1], 2, [4, 4]),
        ([3, 1], 6, 2, [6, 2], [1, 1, 1, 1], 2, [6, 2]),
        ([2, 2], 4, 2, [1, 4], [0, 0, 1, 1], 2, [1, 4]),  # what memory keeps off one node goes to the other
        ([2, 0], 2, 1, [2, 0], [0, 0], 1, [2, 0]),
    ],
)
def test_even_ranks(ranks, experts, slots, room, fewest, most_of_rank, most_of_node):
    problem = make_problem(ranks, experts, slots, memory_bytes=np.array(room) * EXPERT_BYTES)
    found = [limit.tolist() for limit in make_limits(problem, np.array(room))]
    assert found == [fewest, [most_of_rank] * sum(ranks), most_of_node]


@pytest.mark.parametrize("changes", [{"even": False}, {"even": True, "replicate": True}])
def test_ranks_that_need_not_be_even_are_free(changes):
    problem = make_problem([2, 2], 5, 2, **changes)
    found = [limit.tolist() for limit in make_limits(problem, np.array([1, 4]))]
    assert found == [[0] * 4, [2] * 4, [1, 4]]
