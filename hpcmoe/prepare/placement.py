"""Where a run's experts go: the placement problem of config, topology, loads and memory, and its solution."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import Device
from hpcmoe.config import ModelConfig, NetworkSpec, PlacementConfig
from hpcmoe.errors import ConfigError, PlacementError
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.experts.timing import time_row
from hpcmoe.paths import WORDS_OR_PATH
from hpcmoe.placement.demand import Loads, make_probability
from hpcmoe.placement.files.checks import find_overflow
from hpcmoe.placement.files.maps import read_map
from hpcmoe.placement.groups import fold_groups, fold_memory, fold_probability, list_groups
from hpcmoe.placement.problem import PlacementProblem, count_slots_per_rank
from hpcmoe.placement.quotas import describe_unevenness
from hpcmoe.placement.result import Placement, SearchStats, evaluate
from hpcmoe.prepare.budget import MemoryBudget
from hpcmoe.wait import barrier, gather_to_all

log = logging.getLogger(__name__)

_NAMES = {  # what the parts of a problem are called in a run
    "B": "bytes_per_second", "L": "latency_seconds", "nic_out": "egress_bytes_per_second",
    "nic_in": "ingress_bytes_per_second", "uplink": "uplink_bytes_per_second",
    "seconds_per_token": "[placement] seconds_per_token", "tokens": "a step", "layers": "[model] num_layers",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunPlacement:
    """The placement that a run has, and what other methods would have given it."""

    placement: Placement
    seconds_of_method: dict[str, float | None]  # objective by method; None where it finds no layout that fits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a step asks of the experts."""

    loads: Loads | None  # on rank 0 alone
    batch_sequences: int
    seconds_per_token: float  # that an expert takes for an assignment, forward
    expert_bytes: int  # of one layer's, with all its state


def make_run_problem(
    model: ModelConfig, settings: PlacementConfig, demand: Demand, topology: Topology, mesh: Mesh, budget: MemoryBudget
) -> PlacementProblem:
    """Build the placement problem that all expert-parallel groups share."""
    assert demand.loads is not None  # rank 0 states the problem

    # Share a step's assignments evenly among the ranks where tokens begin; those of a tensor-parallel group are one.
    homes = mesh.data_parallel * mesh.expert_parallel
    return make_folded_problem(
        topology,
        mesh,
        demand.loads,
        budget.bytes_for_experts / budget.num_ranks,
        settings.spare_slots_per_rank,
        tokens_of_rank=np.full(
            mesh.expert_parallel, demand.batch_sequences * model.sequence_length * model.top_k / homes
        ),
        replicate=settings.replicate,
        expert_bytes=demand.expert_bytes,
        bytes_per_token=model.hidden * getattr(torch, model.dtype).itemsize,
        seconds_per_token=demand.seconds_per_token,
        objective=settings.objective,
        count_latency=settings.count_latency,
    )


def make_folded_problem(
    topology: Topology, mesh: Mesh, loads: Loads, rank_bytes: np.ndarray, spare_slots_per_rank: int, **fields: Any
) -> PlacementProblem:
    """Build a problem whose ranks are all expert-parallel groups folded into one, from loads and its other fields.

    rank_bytes [nodes]: what a rank of each node has for experts; of the ranks in one place the least counts.
    """
    groups = list_groups(mesh)
    nodes, network = fold_groups(topology, groups)
    num_layers, _, num_experts = loads.tokens.shape
    return PlacementProblem(
        num_layers=num_layers,
        num_experts=num_experts,
        slots_per_rank=count_slots_per_rank(num_experts, mesh.expert_parallel, spare_slots_per_rank),
        memory_bytes=fold_memory(
            rank_bytes[topology.node_of_rank], groups, network["node_of_rank"], mesh.tensor_parallel
        ),
        probability=fold_probability(make_probability(loads, topology.node_names), nodes),
        **network,
        **fields,
    )


def time_expert(spec: NetworkSpec, mesh: Mesh, rows: int, device: Device) -> float:
    """Measure an expert's forward pass on one assignment, on all ranks at once -> seconds, their median.

    Collective over mesh.world.
    """
    barrier(mesh.world)
    shape = make_expert_shape(spec)
    taken = time_row(shape, mesh.tensor_parallel, rows, device.torch_device, packed=not spec.trains)
    return statistics.median(gather_to_all(mesh.world, taken))


def place_experts(
    problem: PlacementProblem, settings: PlacementConfig, budget: MemoryBudget, seed: int, rebalances: bool = False
) -> RunPlacement:
    """Solve the placement problem by [placement], and evaluate other methods.

    Raises PlacementError, with what takes the memory, where experts do not fit; ConfigError where rates and seconds are
    such that no time can be computed from them.
    """
    # Check that every time can be computed, and that what was asked for has an effect.
    log.info("placing the experts, in about %g s of search", settings.search_seconds)
    for line in find_overflow(problem, _NAMES):
        raise ConfigError(line)
    if problem.replicate and problem.num_ranks * problem.slots_per_rank == problem.num_experts:
        log.warning(
            "no effect: [placement] replicate = true: all %d ranks x %d slots are taken by one replica of each of the "
            "%d experts; [placement] spare_slots_per_rank makes room",
            problem.num_ranks, problem.slots_per_rank, problem.num_experts,
        )  # fmt: skip
    if problem.count_latency and not problem.latency_seconds.any():
        log.warning("no effect: [placement] count_latency = true: no latency of any link is known")

    if rebalances:  # compile the search now, and not in the midst of a step
        from hpcmoe.placement.search.warm import compile_search  # imports numba and scipy: rank 0 alone pays for it

        compile_search()
    try:
        placement = find_placement(problem, settings, seed)
    except PlacementError as error:
        raise PlacementError(f"{error}; {budget}") from None
    return compare_with_methods(problem, settings, placement)


def compare_with_methods(problem: PlacementProblem, settings: PlacementConfig, placement: Placement) -> RunPlacement:
    """Evaluate what other methods would have given beside a placement."""
    from hpcmoe.placement.solve import compare_methods

    others = ["contiguous"] + ["eplb"] * settings.compare_eplb
    seconds = compare_methods(problem, [method for method in others if method != settings.method])
    return RunPlacement(placement=placement, seconds_of_method=seconds)


def find_placement(problem: PlacementProblem, settings: PlacementConfig, seed: int) -> Placement:
    """Place by [placement] method within its time; for the objective "step" tune the replicas' shares."""
    from hpcmoe.placement.solve import make_placement

    begun = time.perf_counter()
    if settings.method not in WORDS_OR_PATH["placement", "method"]:
        layouts = read_placement_file(problem, settings.method)
        return evaluate_layouts(problem, settings, layouts, "file", settings.search_seconds / 2)
    search = {"seconds": settings.search_seconds, "iterations": settings.search_iterations, "seed": seed}
    placement = make_placement(problem, settings.method, **search)
    if uneven := describe_unevenness(problem, placement.expert_of_replica):
        log.warning("placement %s: %s", placement.method, uneven)
    return tune_placement(problem, placement, settings.search_seconds, begun)


def read_placement_file(problem: PlacementProblem, path: str) -> np.ndarray:
    """Read the experts of slots from a file -> int64 [L, S]. Raises ConfigError in one line."""
    try:
        layouts, notes = read_map(path, problem)
    except ConfigError as error:
        raise ConfigError(f"[placement] method = {error}") from None
    for note in notes:
        log.warning("[placement] method = %s: %s", path, note)
    return layouts


def evaluate_layouts(
    problem: PlacementProblem, settings: PlacementConfig, layouts: np.ndarray, method: str, seconds: float
) -> Placement:
    """Evaluate given layouts [L, S], with lower bounds computed within so many seconds."""
    from hpcmoe.placement.solve import bound_layers

    begun, bounds = time.perf_counter(), bound_layers(problem, layouts, seconds)
    placement = evaluate(problem, layouts, bounds, method, SearchStats())
    return tune_placement(problem, placement, settings.search_seconds, begun)


def tune_placement(problem: PlacementProblem, placement: Placement, seconds: float, begun: float) -> Placement:
    """Balance tokens among replicas for the objective "step", where that gains; the search began at `begun`."""
    from hpcmoe.placement.shares import tune_shares

    if problem.objective != "step" or not problem.replicate:
        return placement
    split = tune_shares(problem, placement.expert_of_replica, seconds)
    if split is None:
        return placement

    # The search's bound is that of nearest replicas; whatever the shares, no layer ends before all ranks have worked.
    even = problem.num_layers * problem.tokens_of_rank.sum() * problem.seconds_per_token / problem.num_ranks
    search_stats = dataclasses.replace(placement.search_stats, seconds=time.perf_counter() - begun)
    bounds = [min(placement.lower_bound_seconds, even)]
    return evaluate(problem, placement.expert_of_replica, bounds, placement.method, search_stats, split)


def format_placement(run_placement: RunPlacement, settings: PlacementConfig) -> Iterator[str]:
    """Format what the search found, its bound, and what other methods would have given -> lines for the log."""
    placement, stats = run_placement.placement, run_placement.placement.search_stats
    others = [f"; {method} {format_milliseconds(s)}" for method, s in run_placement.seconds_of_method.items()]
    yield (
        f"placement {placement.method}: objective {placement.objective} {1e3 * placement.objective_seconds:.4g} ms a "
        f"step, lower bound {1e3 * placement.lower_bound_seconds:.4g} ms{', optimal' * placement.is_optimal}"
        + "".join(others)
    )
    if stats.cut_short:
        yield (
            f"the clock ended the search after {stats.seconds:.2f} s, before [placement] search_iterations = "
            f"{settings.search_iterations}: another run may place its experts otherwise; more [placement] "
            "search_seconds or fewer iterations make runs repeat"
        )


def format_milliseconds(seconds: float | None) -> str:
    """Format an objective in ms; None where a method finds no layout that fits."""
    return "finds no layout that fits" if seconds is None else f"{1e3 * seconds:.4g} ms"
