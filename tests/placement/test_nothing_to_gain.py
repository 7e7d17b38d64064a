"""Where no placement can be better than the contiguous one, nothing is searched and numba compiles nothing."""

import logging

import numpy as np
import pytest
from numba.core.event import install_listener, trigger_event
from placement.problems import make_problem

from hpcmoe.placement import solve
from hpcmoe.placement.search.warm import CompilationLogger
from hpcmoe.placement.solve import make_placement


class Compiled(Exception):
    """The search has been asked for."""


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Raise where the search would be compiled."""

    def refuse():
        raise Compiled

    monkeypatch.setattr(solve, "compile_search", refuse)


def make_even(ranks_of_node, num_experts, slots, **changes):
    """Make a problem in which all experts are equally likely."""
    probability = np.full((1, len(ranks_of_node), num_experts), 1 / num_experts)
    return make_problem(ranks_of_node, num_experts, slots, probability=probability, **changes)


@pytest.mark.parametrize(("ranks", "experts", "slots"), [(4, 4, 1), (4, 8, 2), (4, 3, 1), (1, 5, 5)])
@pytest.mark.parametrize("objective", ["links", "step"])
def test_one_node_that_is_evenly_loaded_is_placed_without_a_search(ranks, experts, slots, objective):
    problem = make_even([ranks], experts, slots, objective=objective)
    placement = make_placement(problem, seconds=0.1)
    assert placement.is_optimal and placement.method == "packed" and placement.search_stats.num_proposals == 0
    assert set(placement.expert_of_replica[placement.expert_of_replica >= 0]) == set(range(experts))


def test_what_could_be_better_is_searched_for():
    for problem in (
        make_even([2, 2], 4, 1),  # experts could be with those who ask for them
        make_problem([4], 8, 2, objective="step", seconds_per_token=1e-6, probability=skewed(8)),
    ):
        with pytest.raises(Compiled):
            make_placement(problem, seconds=0.1)


def skewed(num_experts):
    """Make experts of which the first are the likelier, one layer on one node: [1, 1, E]."""
    weight = np.arange(num_experts, 0, -1.0)
    return (weight / weight.sum())[None, None]


def test_a_compilation_is_logged_once(caplog):
    with caplog.at_level(logging.INFO), install_listener("numba:compile", CompilationLogger()):
        for _ in range(2):
            with trigger_event("numba:compile"):
                pass
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "compiling the placement's search with numba"
    ]
