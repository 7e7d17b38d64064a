"""A run's placement problem is that of its groups, their loads and memory; what the search found is told and kept."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from small import make_config, make_topology, open_small_job

from hpcmoe.description import describe_placement
from hpcmoe.errors import ConfigError, PlacementError
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.result import SearchStats
from hpcmoe.placement.solve import compare_methods
from hpcmoe.prepare.budget import MemoryBudget
from hpcmoe.prepare.placement import (
    Demand,
    format_placement,
    make_run_problem,
    place_experts,
    time_expert,
)

ONES = Loads(tokens=np.ones((2, 1, 4)), node_names=())


def make_mesh(expert_parallel, data_parallel=1, tensor_parallel=1):
    """The sizes of a mesh, without communicators."""
    return SimpleNamespace(
        expert_parallel=expert_parallel, data_parallel=data_parallel, tensor_parallel=tensor_parallel,
        num_token_shares=expert_parallel * data_parallel,
    )  # fmt: skip


def make_test_budget(topology, bytes_a_node=10**9, needs=0):
    num_ranks = np.bincount(topology.node_of_rank)
    node_bytes = np.broadcast_to(bytes_a_node, len(num_ranks))
    return MemoryBudget(what="memory", node_bytes=node_bytes, num_ranks=num_ranks, needs={"process": needs})


def state(config, topology, mesh, loads=ONES, seconds_per_token=1e-6, **budget):
    demand = Demand(
        loads=loads, batch_sequences=config.data.batch_sequences, seconds_per_token=seconds_per_token, expert_bytes=100
    )
    return make_run_problem(
        config.model, config.placement, demand, topology, mesh, make_test_budget(topology, **budget)
    )


def test_the_problem_is_that_of_config_and_topology():
    topology = dataclasses.replace(make_topology(4, 4), rack_of_node=np.array([0, 0, 1, 1]), rack_names=("a", "b"),
                                   uplink_bytes_per_second=np.array([1e8, 2e8]))  # fmt: skip
    config = make_config(placement__objective="ports", placement__count_latency=True, placement__spare_slots_per_rank=1)
    problem = state(config, topology, make_mesh(4))
    assert problem.tokens_of_rank.tolist() == [14 * 5 * 2 / 4] * 4
    assert (problem.objective, problem.count_latency, problem.slots_per_rank) == ("ports", True, 2)
    assert (problem.bytes_per_token, problem.expert_bytes, problem.seconds_per_token) == (8 * 4, 100, 1e-6)
    assert problem.node_names == ("n0", "n1", "n2", "n3") and problem.rack_of_node.tolist() == [0, 0, 1, 1]
    assert problem.uplink_bytes_per_second.tolist() == [1e8, 2e8]
    assert problem.probability.shape == (2, 4, 4) and np.allclose(problem.probability, 0.25)


def test_each_node_asks_as_its_own_loads_say():
    loads = Loads(tokens=np.array([[[3, 1, 0, 0], [0, 0, 1, 1]]] * 2), node_names=("n1", "n0"))
    problem = state(make_config(), make_topology(4, 2), make_mesh(4), loads)
    assert np.allclose(problem.probability, [[[0, 0, 0.5, 0.5], [0.75, 0.25, 0, 0]]] * 2)


def test_every_group_must_have_the_room():
    """Two data-parallel groups on nodes of their own: the second's nodes have less."""
    topology = make_topology(8, 4)
    problem = state(make_config(), topology, make_mesh(4, 2), bytes_a_node=np.array([900, 800, 700, 1000]), needs=50)
    assert problem.memory_bytes.tolist() == [700 - 100, 800 - 100]
    assert problem.node_names == ("n0+n2", "n1+n3")


def test_an_experts_memory_is_that_of_its_tensor_parallel_group():
    problem = state(make_config(), make_topology(4, 2), make_mesh(2, 1, 2), bytes_a_node=1000, needs=60)
    assert problem.memory_bytes.tolist() == [2 * (500 - 60)] * 2


def test_a_placement_is_taken_from_a_file(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("[[2, 0, 3, 1], [3, 2, 1, 0]]")
    config = make_config(placement__method=str(path))
    problem = state(config, make_topology(4, 2), make_mesh(4))
    layout = place_experts(problem, config.placement, make_test_budget(make_topology(4, 2)), 0)
    assert layout.placement.expert_of_replica.tolist() == [[2, 0, 3, 1], [3, 2, 1, 0]]
    assert layout.placement.method == "file" and set(layout.seconds_of_method) == {"contiguous"}
    assert "placement file: objective step" in next(format_placement(layout, config.placement))
    path.write_text("[[2, 0, 3, 1], [2, 0, 3, 1], [2, 0, 3, 1]]")
    with pytest.raises(ConfigError) as refused:
        place_experts(problem, config.placement, make_test_budget(make_topology(4, 2)), 0)
    assert str(refused.value) == f"[placement] method = {path}: the list has 3 layers, layers = 2"


def test_replicas_without_a_slot_for_them_are_told(caplog):
    for spare, told in ((0, 1), (1, 0)):
        config = make_config(placement__replicate=True, placement__spare_slots_per_rank=spare, placement__method="eplb")
        problem, budget = state(config, make_topology(4, 2), make_mesh(4)), make_test_budget(make_topology(4, 2))
        place_experts(problem, config.placement, budget, 0)
        assert sum("no effect: [placement] replicate = true" in line for line in caplog.messages) == told
        caplog.clear()


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("bytes_per_second", np.full((2, 2), 1e-320), "bytes_per_second: at worst inf s"),
        ("seconds_per_token", 1e300, "[placement] seconds_per_token: at worst"),
        ("latency_seconds", np.full((2, 2), 1e200), "latency_seconds: at worst"),
    ],
)
def test_times_that_no_number_holds_are_one_line(part, value, said):
    problem = dataclasses.replace(state(make_config(), make_topology(4, 2), make_mesh(4)), **{part: value})
    with pytest.raises(ConfigError) as refused:
        place_experts(problem, make_config().placement, None, 0)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert f"[model] num_layers = {problem.num_layers}" in str(refused.value)


def test_what_does_not_fit_is_told_with_what_else_takes_the_memory():
    problem = state(make_config(), make_topology(4, 2), make_mesh(4), bytes_a_node=1000, needs=450)
    budget = make_test_budget(make_topology(4, 2), 1000, 450)
    with pytest.raises(PlacementError) as refused:
        place_experts(problem, make_config().placement, budget, 0)
    said = str(refused.value)
    assert "4 experts x 2 layers x 100 B = 800 B do not fit" in said and "\n" not in said
    assert "of its node's memory each rank needs 450 B besides: process 450 B" in said


def skewed(num_nodes=4):
    """Loads of nodes that each want another expert, and all of them the first."""
    tokens = np.ones((2, num_nodes, 4)) + 6 * np.roll(np.eye(num_nodes, 4), 2, axis=1)
    return Loads(tokens=tokens, node_names=tuple(f"n{node}" for node in range(num_nodes)))


def make_layout(**changes):
    config = make_config(placement__search_iterations=5000, placement__search_seconds=60.0, **changes)
    topology = make_topology(4, 4)
    problem = state(config, topology, make_mesh(4), skewed(), 1e-9)
    return problem, config, place_experts(problem, config.placement, make_test_budget(topology), 0)


def test_the_layout_beats_what_it_is_held_against():
    problem, config, layout = make_layout(placement__compare_eplb=True)
    assert set(layout.seconds_of_method) == {"contiguous", "eplb"}
    for method, seconds in layout.seconds_of_method.items():
        assert (
            seconds == compare_methods(problem, [method])[method] and layout.placement.objective_seconds < 0.7 * seconds
        )
    assert set(make_layout()[2].seconds_of_method) == {"contiguous"}
    plain = make_layout(placement__method="contiguous")[2]
    assert plain.placement.method == "contiguous" and plain.seconds_of_method == {}
    again = make_layout(placement__compare_eplb=True)[2]
    assert np.array_equal(again.placement.expert_of_replica, layout.placement.expert_of_replica)


@pytest.mark.parametrize("objective", ["ports", "step"])
def test_shares_are_tuned_for_the_step_alone_and_its_objective_is_of_them(objective, monkeypatch):
    """One node has nearly all tokens: nearest first, it would serve them alone."""
    config = make_config(
        placement__objective=objective, placement__replicate=True, placement__search_seconds=60.0, model__num_experts=1
    )
    problem = state(config, make_topology(2, 2), make_mesh(2), Loads(tokens=np.ones((2, 1, 1)), node_names=()), 1e-3)
    problem = dataclasses.replace(problem, tokens_of_rank=np.array([100.0, 2.0]))
    if objective == "ports":
        monkeypatch.setattr("hpcmoe.placement.shares.tune_shares", None)  # whoever calls it fails
    placement = place_experts(problem, config.placement, make_test_budget(make_topology(2, 2)), 0).placement
    assert (placement.split is not None) == (objective == "step")
    if objective == "step":
        assert placement.objective_seconds == pytest.approx(2 * 51e-3, rel=1e-3)
        assert placement.lower_bound_seconds <= placement.objective_seconds * (1 + 1e-9)
        costs = [layer_seconds(problem, k, placement.expert_of_replica[k], placement.split[k]) for k in range(2)]
        assert placement.objective_seconds == pytest.approx(sum(costs))
        assert placement.shares_of_node(0, 0) == pytest.approx([0.51, 0.49])


def test_the_log_tells_what_was_found_and_whether_the_clock_ended_it():
    problem, config, layout = make_layout(placement__compare_eplb=True)
    [line] = format_placement(layout, config.placement)
    found, bound = (1e3 * getattr(layout.placement, f"{name}_seconds") for name in ("objective", "lower_bound"))
    assert line.startswith(f"placement packed: objective step {found:.4g} ms a step, lower bound {bound:.4g} ms")
    assert f"; contiguous {1e3 * layout.seconds_of_method['contiguous']:.4g} ms; eplb" in line
    assert ("optimal" in line) == layout.placement.is_optimal
    nothing = dataclasses.replace(layout, seconds_of_method={"eplb": None})
    assert next(format_placement(nothing, config.placement)).endswith("; eplb finds no layout that fits")

    late = dataclasses.replace(
        layout.placement, search_stats=SearchStats(seconds=61.0, num_proposals=9, cut_short=True)
    )
    _, warning = format_placement(dataclasses.replace(layout, placement=late), config.placement)
    assert "the clock ended the search after 61.00 s" in warning and "search_iterations = 5000" in warning


def test_the_record_keeps_placement_and_figures():
    kept = {}
    records = SimpleNamespace(describe=lambda chapter, name, value, unit="": kept.update({(chapter, name): value}))
    layout = make_layout(placement__compare_eplb=True)[2]
    describe_placement(records, dataclasses.replace(layout, seconds_of_method={"contiguous": 2.0, "eplb": None}))
    assert {chapter for chapter, _ in kept} == {"cluster"}
    assert np.array_equal(kept["cluster", "expert_of_replica"], layout.placement.expert_of_replica)
    assert (kept["cluster", "placement"], kept["cluster", "objective"]) == ("packed", "step")
    assert kept["cluster", "objective_seconds"] == layout.placement.objective_seconds
    assert kept["cluster", "contiguous_seconds"] == 2 and np.isnan(kept["cluster", "eplb_seconds"])


@pytest.mark.mpi
def test_an_expert_is_timed_once_for_all_ranks(comm):
    mesh, device = SimpleNamespace(world=comm, tensor_parallel=1), SimpleNamespace(torch_device="cpu")
    times = comm.allgather(time_expert(make_config().spec, mesh, 10, device))
    assert len(set(times)) == 1 and 0 < times[0] < 0.1


@pytest.mark.mpi
def test_a_job_counts_whose_tokens_ask_for_what(comm, shared):
    """The counts by node add up to the routing stats of all ranks."""
    with open_small_job(comm, shared, num_nodes=2, run__mode="infer") as (job, _, _):
        outcome = job.stepper.run(job.training, np.arange(14) * 7, np.ones((2, 4)), "infer")
        job.meter.read(outcome.stats)
        taken = job.meter.pop_tokens(job.topology.node_of_rank)
        assert (job.problem is None) == (comm.rank > 0)
    if comm.rank == 0:
        assert job.problem.seconds_per_token == 1e-6  # the config's
        assert taken.shape == (2, min(2, comm.size), 4)
        assert np.array_equal(taken.sum(axis=1), outcome.stats.tokens_of_expert)
