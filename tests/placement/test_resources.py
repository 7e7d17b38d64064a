"""The definition of resources: its forms agree with each other, and all that prices traffic agrees with it."""

import numpy as np
import pytest
from cases import make_case, make_domains, write_case
from hypothesis import given
from hypothesis import strategies as st
from placement.problems import layer_data_of, problems

from hpcmoe.placement.bounds.choices import make_rates
from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.resources import (
    RESOURCES,
    count_resources,
    list_resources,
    name_resource,
    price_flows,
    token_rates,
    token_seconds,
    traffic_seconds,
)
from hpcmoe.placement.search.anneal import make_generator
from hpcmoe.placement.search.layer_data import EMPTY
from hpcmoe.placement.search.proposals import _find_ends


def make_traffic(problem, seed):
    """Draw tokens from node to node and the number that each rank serves -> [nodes, nodes], [P]."""
    rng = np.random.default_rng(seed)
    sent = rng.integers(0, 3, (problem.num_nodes, problem.num_nodes)) * 50.0
    return sent, rng.uniform(0, 100, problem.num_ranks)


@given(problems(), st.integers(0, 99))
def test_single_flows_add_up_to_what_all_traffic_takes(problem, seed):
    sent, served = make_traffic(problem, seed)
    expected, sizes = traffic_seconds(problem, sent, served), count_resources(problem)
    assert tuple(expected) == tuple(sizes) == RESOURCES
    assert {name: array.size for name, array in expected.items()} == sizes
    sender, receiver = np.divmod(np.arange(sent.size), len(sent))
    for name, (number, seconds) in price_flows(problem, sender, receiver).items():
        total = np.bincount(number, seconds * sent.ravel(), sizes[name])
        if name == "link":
            total += np.where(sent > 0, problem.link_latency, 0.0).ravel()
        np.testing.assert_allclose(total, expected[name].ravel(), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(served * token_seconds(problem)["rank"], expected["rank"])


@given(problems(), st.integers(0, 99))
def test_the_linear_program_prices_a_layer_as_the_definition_does(problem, seed):
    sent, _ = make_traffic(problem, seed)
    of_node = np.maximum(problem.ranks_of_node, 1)
    served = (sent.sum(axis=0) / of_node)[problem.node_of_rank]
    expected, names = traffic_seconds(problem, sent, served), list_resources(problem.objective)
    found = make_rates(problem) @ sent.ravel()
    without_latency = (expected["link"] - np.where(sent > 0, problem.link_latency, 0.0)) * (1 - np.eye(len(sent)))
    most = max([without_latency.max(), *(expected[name].max(initial=0.0) for name in names[1:])])
    has_ranks = "rank" in names and sent.sum(axis=0)[problem.ranks_of_node > 0].sum() == sent.sum()
    if has_ranks or "rank" not in names:
        assert found.max(initial=0.0) == pytest.approx(most, rel=1e-9)


@given(problems())
def test_rates_are_the_inverse_of_seconds(problem):
    seconds = token_seconds(problem)
    for name, rate in token_rates(problem).items():
        np.testing.assert_allclose(rate * seconds[name], seconds[name] > 0, rtol=1e-9, err_msg=name)


@given(problems())
def test_the_search_looks_up_the_prices_and_the_order_of_the_definition(problem):
    data, seconds = layer_data_of(problem), token_seconds(problem)
    counted, sizes = list_resources(problem.objective), list(count_resources(problem).values())
    costs = (data.link_cost, data.egress_cost, data.ingress_cost, data.uplink_cost, data.uplink_cost, data.rank_cost)
    for name, cost in zip(RESOURCES, costs, strict=True):
        np.testing.assert_array_equal(cost, seconds[name] if name in counted else 0.0, err_msg=name)

    # A resource's number names its nodes or rank; of an uplink a node in its rack.
    for number in range(sum(sizes)):
        kind = int(np.searchsorted(np.cumsum(sizes), number, side="right"))
        at = number - sum(sizes[:kind])
        sender, receiver, rank = _find_ends(data, make_generator(number), number)
        match RESOURCES[kind]:
            case "link":
                assert (sender, receiver, rank) == (*divmod(at, problem.num_nodes), EMPTY)
            case "egress":
                assert (sender, receiver, rank) == (at, EMPTY, EMPTY)
            case "ingress":
                assert (sender, receiver, rank) == (EMPTY, at, EMPTY)
            case "rank":
                assert (sender, receiver, rank) == (EMPTY, EMPTY, at)
            case way:
                node = sender if way == "uplink_out" else receiver
                assert problem.rack_of_node[node] == at and {sender, receiver, rank} == {node, EMPTY}


def test_an_unknown_objective_is_a_bug():
    with pytest.raises(ValueError, match="speed"):
        list_resources("speed")


def test_resources_have_names_for_people(tmp_path):
    case = make_domains(make_case(slots=2, layers=2, replicate=True))
    problem, _ = read_case(write_case(tmp_path / "case.json", case), "step")
    names = [name_resource(problem, name, (3, 1)) for name in ("link", "egress", "ingress")]
    assert names == ["n3 -> n1", "n3 sends", "n3 receives"]
    names = [name_resource(problem, name, (1,)) for name in ("uplink_out", "uplink_in", "rank")]
    assert names == ["rack 1 sends", "rack 1 receives", "rank 1 on n0"]
    with pytest.raises(ValueError):
        name_resource(problem, "road", (1,))
