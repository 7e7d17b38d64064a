"""Where a run's experts go: the placement problem, stated from config, topology, loads and memory, and solved."""

import dataclasses
import logging
import statistics
import time

import numpy as np
import torch

from hpcmoe.errors import ConfigError, PlacementError
from hpcmoe.experts.timing import time_row
from hpcmoe.paths import WORDS_OR_PATH
from hpcmoe.placement.demand import Loads, make_probability
from hpcmoe.placement.files.checks import find_overflow
from hpcmoe.placement.files.maps import read_map
from hpcmoe.placement.groups import fold_groups, fold_memory, fold_probability, list_groups
from hpcmoe.placement.problem import PlacementProblem, count_slots_per_rank
from hpcmoe.placement.quotas import describe_unevenness
from hpcmoe.placement.result import Placement, SearchStats, evaluate
from hpcmoe.wait import barrier, gather_to_all

log = logging.getLogger(__name__)

_RATES = {"B": "bytes", "nic_out": "egress_bytes", "nic_in": "ingress_bytes", "uplink": "uplink_bytes"}
_KEYS = {part: f"{rate}_per_second" for part, rate in _RATES.items()} | {  # what the parts of a problem are in a run
    "seconds_per_token": "[placement] seconds_per_token", "L": "latency_seconds",
    "tokens": "a step", "layers": "[model] num_layers",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunPlacement:
    """The placement that a run has, and what other methods would have given it."""

    placement: Placement
    seconds_of_method: dict[str, float | None]  # objective by method; None where it finds no layout that fits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a step asks of the experts."""

    loads: Loads
    batch_sequences: int
    seconds_per_token: float  # that an expert takes for an assignment, forward
    expert_bytes: int  # of one layer's, with all its state


def make_run_problem(model, settings, demand, topology, mesh, budget):
    """State the placement problem that all expert-parallel groups share -> PlacementProblem.

    model is [model], settings [placement].
    """
    groups = list_groups(mesh)
    nodes, network = fold_groups(topology, groups)
    rank_bytes = (budget.bytes_for_experts / budget.num_ranks)[topology.node_of_rank]
    homes = mesh.data_parallel * mesh.expert_parallel  # a tensor-parallel group's ranks are one
    assignments = demand.batch_sequences * model.sequence_length * model.top_k / homes
    return PlacementProblem(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        slots_per_rank=count_slots_per_rank(model.num_experts, mesh.expert_parallel, settings.spare_slots_per_rank),
        replicate=settings.replicate,
        memory_bytes=fold_memory(rank_bytes, groups, network["node_of_rank"], mesh.tensor_parallel),
        expert_bytes=demand.expert_bytes,
        bytes_per_token=model.hidden * getattr(torch, model.dtype).itemsize,
        seconds_per_token=demand.seconds_per_token,
        tokens_of_rank=np.full(mesh.expert_parallel, assignments),
        probability=fold_probability(make_probability(demand.loads, topology.node_names), nodes),
        objective=settings.objective,
        count_latency=settings.count_latency,
        **network,
    )


def time_expert(spec, mesh, rows, device):
    """Time an assignment in an expert on all ranks at once -> seconds, their median.

    Forward alone, as the links' one way is. Collective over mesh.world.
    """
    barrier(mesh.world)
    taken = time_row(spec, mesh.tensor_parallel, rows, device.torch_device)
    return statistics.median(gather_to_all(mesh.world, taken))


def place_experts(problem, settings, budget, seed):
    """Solve the placement problem, and evaluate what else could have been -> RunPlacement; PlacementError tells the memory.

    Raises ConfigError where rates and seconds are such that no time can be computed from them.
    """
    for line in find_overflow(problem, _KEYS):
        raise ConfigError(line)
    if problem.replicate and problem.num_ranks * problem.slots_per_rank == problem.num_experts:
        log.warning(
            "no effect: [placement] replicate = true: all %d ranks x %d slots are taken by one replica of each of the %d "
            "experts; [placement] spare_slots_per_rank makes room",
            problem.num_ranks, problem.slots_per_rank, problem.num_experts,
        )  # fmt: skip
    if problem.count_latency and not problem.latency_seconds.any():
        log.warning("no effect: [placement] count_latency = true: no latency of any link is known")
    try:
        placement = find_placement(problem, settings, seed)
    except PlacementError as error:
        raise PlacementError(f"{error}; {budget}") from None
    return compare_with_methods(problem, settings, placement)


def compare_with_methods(problem, settings, placement):
    """Weigh what other methods would have given beside a placement -> RunPlacement."""
    from hpcmoe.placement.solve import compare_methods  # imports numba and scipy: rank 0 alone pays for it

    others = [method for method in ("contiguous", "eplb") if method == "contiguous" or settings.compare_eplb]
    return RunPlacement(
        placement=placement,
        seconds_of_method=compare_methods(problem, [method for method in others if method != settings.method]),
    )


def find_placement(problem, settings, seed):
    """Place by the config's method, within its time, and for the step tune the replicas' shares -> Placement."""
    from hpcmoe.placement.solve import make_placement

    begun = time.perf_counter()
    if settings.method not in WORDS_OR_PATH["placement", "method"]:
        layouts = read_placement_file(problem, settings.method)
        return evaluate_layouts(problem, settings, layouts, "file", settings.search_seconds / 2)
    placement = make_placement(
        problem,
        settings.method,
        seconds=settings.search_seconds,
        iterations=settings.search_iterations,
        seed=seed,
    )
    if uneven := describe_unevenness(problem, placement.expert_of_replica):
        log.warning("placement %s: %s", placement.method, uneven)
    return tune_placement(problem, settings, placement, begun)


def read_placement_file(problem, path):
    """Read where [placement] method has the experts -> [L, S], or ConfigError."""
    try:
        layouts, notes = read_map(path, problem)
    except ConfigError as error:
        raise ConfigError(f"[placement] method = {error}") from None
    for note in notes:
        log.warning("[placement] method = %s: %s", path, note)
    return layouts


def evaluate_layouts(problem, settings, layouts, method, seconds):
    """Weigh layouts [L, S] that are there already, bounding them in so many seconds -> Placement."""
    from hpcmoe.placement.solve import bound_layers

    begun, bounds = time.perf_counter(), bound_layers(problem, layouts, seconds)
    return tune_placement(problem, settings, evaluate(problem, layouts, bounds, method, SearchStats()), begun)


def tune_placement(problem, settings, placement, begun):
    """For the step, share the replicas' tokens out anew where that gains -> Placement, its search begun at that time."""
    from hpcmoe.placement.shares import tune_shares

    if settings.objective != "step" or not settings.replicate:
        return placement
    split = tune_shares(problem, placement.expert_of_replica, settings.search_seconds)
    if split is None:
        return placement

    # The search's bound is that of nearest replicas; whatever the shares, no layer is done before all ranks have worked.
    even = problem.num_layers * problem.tokens_of_rank.sum() * problem.seconds_per_token / problem.num_ranks
    search_stats = dataclasses.replace(placement.search_stats, seconds=time.perf_counter() - begun)
    bounds = [min(placement.lower_bound_seconds, even)]
    return evaluate(problem, placement.expert_of_replica, bounds, placement.method, search_stats, split)


def format_placement(layout, settings):
    """Say what the search found, within what, and what else could have been -> lines for the log."""
    placement = layout.placement
    yield (
        f"placement {placement.method}: objective {placement.objective} {1e3 * placement.objective_seconds:.4g} ms a "
        f"step, lower bound {1e3 * placement.lower_bound_seconds:.4g} ms{', optimal' * placement.is_optimal}"
        + "".join(f"; {method} {format_milliseconds(seconds)}" for method, seconds in layout.seconds_of_method.items())
    )
    if placement.search_stats.cut_short:
        yield (
            f"the clock ended the search after {placement.search_stats.seconds:.2f} s, before [placement] search_iterations = "
            f"{settings.search_iterations}: another run may place its experts otherwise; more [placement] search_seconds "
            "or fewer iterations make runs repeat"
        )


def format_milliseconds(seconds):
    """Show an objective, or that there is none."""
    return "finds no layout that fits" if seconds is None else f"{1e3 * seconds:.4g} ms"


def describe_placement(records, layout):
    """Keep the placement and the figures of its search."""
    placement = layout.placement
    for name in ("expert_of_replica", "rank_of_replica", "replica_count"):
        records.describe("cluster", name, getattr(placement, name))
    if placement.split is not None:
        records.describe("cluster", "split", placement.split, "share of a node's tokens for the slot's expert")
    records.describe("cluster", "placement", placement.method)
    records.describe("cluster", "optimal", placement.is_optimal)
    for name in ("objective", "cross_node_share", "link_sigma"):
        records.describe("cluster", name, getattr(placement, name))
    for name in ("objective_seconds", "lower_bound_seconds"):
        records.describe("cluster", name, getattr(placement, name), "s")
    records.describe("cluster", "search_seconds", placement.search_stats.seconds, "s")
    records.describe("cluster", "search_proposals", placement.search_stats.num_proposals)
    for method, seconds in layout.seconds_of_method.items():
        records.describe("cluster", f"{method}_seconds", np.nan if seconds is None else seconds, "s")
