"""What a placement asks of each resource, against a count of single tokens' ways."""

from types import SimpleNamespace

import numpy as np
import pytest
from cases import make_case, make_domains, write_case

from hpcmoe.placement.files.case import read_case
from hpcmoe.placement.result import compute_usage


@pytest.fixture
def problem(tmp_path):
    """Four nodes of two ranks in two racks, two slots a rank, and probabilities by node."""
    case = make_domains(make_case(slots=2, layers=2, replicate=True))
    return read_case(write_case(tmp_path / "case.json", case), "step")[0]


def spread(problem, seed=0):
    """Place experts with replicas and empty slots: every expert once, then some again."""
    rng = np.random.default_rng(seed)
    slots = problem.num_ranks * problem.slots_per_rank
    layers = [[*rng.permutation(problem.num_experts), *rng.permutation(problem.num_experts)[:5], -1, -1, -1][:slots]
              for _ in range(problem.num_layers)]  # fmt: skip
    return SimpleNamespace(expert_of_replica=np.array(layers), split=None)


def test_tokens_are_counted_as_they_go_to_the_nearest_replicas(problem):
    placement = spread(problem)
    usage = compute_usage(problem, placement)
    node_of_slot = np.repeat(problem.node_of_rank, 2)
    tokens, of_expert = np.zeros((2, 4, 4)), np.zeros((2, 4, 8))
    for layer, source, expert in np.ndindex(2, 4, 8):
        slots = np.flatnonzero(placement.expert_of_replica[layer] == expert)
        distance = problem.distance[source, node_of_slot[slots]]
        nearest = slots[distance == distance.min()]
        for slot in nearest:
            part = problem.demand(layer)[source, expert] / len(nearest)
            tokens[layer, source, node_of_slot[slot]] += part
            of_expert[layer, node_of_slot[slot], expert] += part
    np.testing.assert_allclose(usage.tokens, tokens)
    np.testing.assert_allclose(usage.tokens_of_expert, of_expert)
    np.testing.assert_allclose(usage.served.sum(axis=1), tokens.sum(axis=(1, 2)))
    assert usage.replicas.sum(axis=1).tolist() == [
        np.bincount(row[row >= 0]).tolist() for row in placement.expert_of_replica
    ]


def test_what_binds_is_as_busy_as_the_layer(problem):
    usage = compute_usage(problem, spread(problem))
    for layer in range(2):
        found = usage.list_binding(layer)
        assert found
        for name, index in found:
            assert usage.seconds[name][layer][index] == pytest.approx(usage.layer_seconds[layer], rel=1e-9)
        busiest = max(array[layer].max() for array in usage.seconds.values())
        assert usage.layer_seconds[layer] == busiest


def test_a_layer_without_tokens_binds_nowhere(problem):
    problem.tokens_of_rank[:] = 0
    usage = compute_usage(problem, spread(problem))
    assert usage.layer_seconds.tolist() == [0, 0] and usage.list_binding(0) == []
