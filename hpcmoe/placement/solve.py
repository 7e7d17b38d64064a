"""From the problem to the placement: seeds, search, memory traded between layers, ties, bounds, in numbered steps.

Pure: arrays in, arrays out, run on rank 0. With a count of proposals, one problem and seed give one answer unless the
clock ends the search first; with a time alone, what the clock allows.
"""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.placement.bounds.bounds import bound_layer
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.layouts import fits, match_memory, pad_slots, trim_slots
from hpcmoe.placement.problem import PlacementProblem, check_problem
from hpcmoe.placement.quotas import (
    divide_memory,
    has_ample_memory,
    has_even_ranks,
    max_replicas_of_node,
    relax_evenness,
)
from hpcmoe.placement.result import Placement, SearchStats, evaluate
from hpcmoe.placement.rules import make_contiguous, make_data, make_eplb, place_by_rule
from hpcmoe.placement.search.anneal import TIE_FACTOR, Budget, SearchResult, reduce_crossing, search_layout
from hpcmoe.placement.search.balance_node import balance_nodes
from hpcmoe.placement.search.layer_data import EMPTY, LayerData, SmoothMax, make_state
from hpcmoe.placement.search.memory_trades import MOST_TRADING_NODES, trade_memory
from hpcmoe.placement.search.moves import max_seconds, rebuild
from hpcmoe.placement.search.seeds import PinnedCounts, make_packed
from hpcmoe.placement.search.warm import compile_search

LEAST_SECONDS = 1e-3  # of a layer's search, however late
PROPOSALS_TO_TIDY = 10_000  # to break ties in a layer
_LARGE = 2**20  # nodes x nodes x experts: from here on a seed takes tens of milliseconds
_PART_FOR_TRADES = 0.3  # of the time, where the layers compete for memory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """The length of a search, its start, and the seed of its random numbers."""

    seconds: float = 1.0  # for all layers
    iterations: int = 0  # proposals a layer; 0: as many as the seconds allow
    seed: int = 0
    start: np.ndarray | None = None  # [L, S], a placement that the answer must not be worse than, if it is as even


def make_placement(problem: PlacementProblem, method: str = "packed", **fields: Any) -> Placement:
    """Place all layers' experts on the ranks; PlacementError when they do not fit.

    method: "packed" searches, by SearchOptions(**fields), and may then take half as long again to prove how good the
    answer is; "contiguous" and "eplb" place by their rules, and raise where that breaks a limit of memory.
    """
    # 1 Check that there is a placement. 2 Divide the memory among the layers.
    check_problem(problem)
    options, most_of_node = SearchOptions(**fields), divide_memory(problem)
    if options.start is not None and not has_even_ranks(problem, options.start):
        options = dataclasses.replace(options, start=None)
    search_stats, lower, seconds = SearchStats(), None, 0.0
    match method:
        case "packed" if (plain := place_without_search(problem, most_of_node, options)) is not None:
            layouts = plain
        case "packed":
            compile_search()
            if options.start is not None:
                match_memory(problem, most_of_node, options.start)
            layouts, search_stats, counted = search_layers(problem, most_of_node, options)
            lower = counted if has_ample_memory(problem) else None  # else trades gave layers more than was counted
            seconds = options.seconds / 2
        case "contiguous" | "eplb":
            layouts = place_by_rule(problem, most_of_node, method)
        case _:
            raise ValueError(method)

    # 7 Bound every layer from below. 8 Evaluate it all.
    expert_of_replica = np.stack([pad_slots(problem, expert_at) for expert_at in layouts])
    used = np.bincount(problem.node_of_slot, (expert_of_replica != EMPTY).sum(axis=0), problem.num_nodes)
    assert (used <= problem.memory_replicas).all(), "a node holds more than its memory"
    bounds = bound_layers(problem, expert_of_replica, seconds, lower)
    return evaluate(problem, expert_of_replica, bounds, method, search_stats)


def place_without_search(
    problem: PlacementProblem, most_of_node: np.ndarray, options: SearchOptions
) -> list[np.ndarray] | None:
    """Place contiguously where no search can gain: on one node, at the bound in every layer -> layouts, else None.

    Within a node nothing travels that another layout would spare. A placement to start from is searched on from.
    """
    if problem.num_nodes > 1 or options.start is not None:
        return None

    # Give up at the first layer that breaks a limit or its bound.
    layouts = []
    for layer in range(problem.num_layers):
        data = make_data(problem, layer, most_of_node)
        expert_at, bound = make_contiguous(data), bound_layer(problem, layer, most_of_node[layer])
        if not fits(data, expert_at):
            return None
        if layer_seconds(problem, layer, pad_slots(problem, expert_at)) > bound * TIE_FACTOR:
            return None
        layouts.append(expert_at if data.rank_cost > 0 else balance_nodes(data, expert_at))
    return layouts


def compare_methods(problem: PlacementProblem, methods: Iterable[str]) -> dict[str, float | None]:
    """Compute what placements by these methods would cost -> seconds by method, None where it does not fit."""
    seconds_of_method: dict[str, float | None] = {}
    for method in methods:
        try:
            layouts = place_by_rule(problem, divide_memory(problem), method)
        except PlacementError:
            seconds_of_method[method] = None
        else:
            experts = [pad_slots(problem, expert_at) for expert_at in layouts]
            seconds_of_method[method] = sum(layer_seconds(problem, k, of_layer) for k, of_layer in enumerate(experts))
    return seconds_of_method


def search_layers(
    problem: PlacementProblem, most_of_node: np.ndarray, options: SearchOptions
) -> tuple[list[np.ndarray], SearchStats, list[float]]:
    """Search every layer -> (layouts [P, s] of the layers, SearchStats, a bound of each from counting: seconds [L]).

    most_of_node [L, nodes] is what each layer may hold; it may change.
    """
    begun, first_equal = time.perf_counter(), find_equal_layers(problem, most_of_node)
    competing = not has_ample_memory(problem) and problem.num_layers > 1 and problem.num_nodes <= MOST_TRADING_NODES
    until = begun + options.seconds * (1 - _PART_FOR_TRADES * competing)
    found, lower = search_each(problem, most_of_node, options, sorted(set(first_equal)), until)
    layouts, cut_short = [found[layer].expert_at for layer in first_equal], any(f.cut_short for f in found.values())

    # 5 Trade memory between the layers, where they compete for it.
    if competing:
        layouts = trade_memory(problem, most_of_node, layouts, begun + options.seconds, options.seed)
        cut_short |= time.perf_counter() >= begun + options.seconds
        layouts = search_on(problem, most_of_node, layouts, options, begun + options.seconds)
    num_proposals = sum(of_layer.num_proposals for of_layer in found.values())
    search_stats = SearchStats(seconds=time.perf_counter() - begun, num_proposals=num_proposals, cut_short=cut_short)
    return layouts, search_stats, [lower[layer] for layer in first_equal]


def search_each(
    problem: PlacementProblem, most_of_node: np.ndarray, options: SearchOptions, layers: list[int], until: float
) -> tuple[dict[int, SearchResult], dict[int, float]]:
    """Search some layers one after the other until a time -> (SearchResult by layer, bound by layer)."""
    found, lower, pinned = {}, {}, None
    for done, layer in enumerate(layers):
        begun = time.perf_counter()
        share = max(until - begun, 0.0) / (len(layers) - done)

        # 3 Make seeds, and take the best. 4 Search on from it. 6 Break ties.
        data, seed = make_data(problem, layer, most_of_node), (options.seed, layer)
        start = None if options.start is None else trim_slots(problem, data, options.start[layer])
        expert_at, pinned = find_best_seed(data, start, pinned)
        lower[layer] = count_bound(problem, layer, most_of_node)
        left = max(begun + share - time.perf_counter(), LEAST_SECONDS)
        budget = Budget(seconds=left, proposals=options.iterations, goal=lower[layer])
        best = search_layout(data, expert_at, seed, budget)
        found[layer] = dataclasses.replace(best, expert_at=break_ties(data, best.expert_at, seed))
    return found, lower


def search_on(
    problem: PlacementProblem, most_of_node: np.ndarray, layouts: list[np.ndarray], options: SearchOptions, until: float
) -> list[np.ndarray]:
    """Search every layer again in the time that trades have left, where time is what counts, and break ties."""
    searched = []
    for layer, expert_at in enumerate(layouts):
        data, seed = make_data(problem, layer, most_of_node), (options.seed, layer, 1)
        share = (until - time.perf_counter()) / (len(layouts) - layer)
        if share > LEAST_SECONDS and not options.iterations:
            budget = Budget(seconds=share, goal=count_bound(problem, layer, most_of_node))
            expert_at = search_layout(data, expert_at, seed, budget).expert_at
        searched.append(break_ties(data, expert_at, seed))
    return searched


def count_bound(problem: PlacementProblem, layer: int, most_of_node: np.ndarray) -> float:
    """Compute a layer's bound by counting, within the memory [L, nodes] -> seconds."""
    return bound_layer(problem, layer, np.minimum(max_replicas_of_node(problem), most_of_node[layer]))


def find_equal_layers(problem: PlacementProblem, most_of_node: np.ndarray) -> list[int]:
    """Find the first layer with the same probabilities and memory as each layer -> [L]."""
    first: dict[tuple[bytes, bytes], int] = {}
    contents = zip(problem.probability, most_of_node, strict=True)
    return [first.setdefault((of.tobytes(), most.tobytes()), layer) for layer, (of, most) in enumerate(contents)]


def find_best_seed(
    data: LayerData, start: np.ndarray | None, pinned: PinnedCounts | None
) -> tuple[np.ndarray, PinnedCounts]:
    """Make all seeds -> (the best [P, s], the PinnedCounts that those of its kind are best with).

    start [P, s] is one more seed. pinned is what was best in an earlier layer; on a large cluster no other is tried.
    """
    candidates = choose_pinned(data, pinned)
    packed = [make_packed(data, way) for way in candidates]
    others = [make_contiguous(data), make_contiguous(data, spread=False), make_eplb(data), start]
    layouts = packed + [expert_at for expert_at in others if expert_at is not None and fits(data, expert_at)]
    costs = [evaluate_seconds(data, expert_at) for expert_at in layouts]
    return layouts[np.argmin(costs)], candidates[np.argmin(costs[: len(candidates)])]


def choose_pinned(data: LayerData, pinned: PinnedCounts | None) -> list[PinnedCounts]:
    """List how many of their own hottest experts nodes and racks may keep, to try it."""
    if not data.replicate:
        return [PinnedCounts()]
    (num_nodes, num_experts), num_racks = data.demand.shape, len(data.uplink_cost)
    is_large = num_nodes**2 * num_experts > _LARGE
    if is_large and pinned is not None:
        return [pinned]

    def choose(most: float, count: int) -> list[int]:
        """List a few whole numbers from 0 to the most that is possible, ascending."""
        return np.unique(np.linspace(0, max(min(most, num_experts), 0), count).astype(int)).tolist()

    # Try numbers for nodes, for racks, and for racks with one a node.
    candidates = [PinnedCounts(of_node=n) for n in choose(data.most_of_node.max(), 4 if is_large else 8)]
    if num_racks > 1:
        of_rack = np.bincount(data.rack_of_node, data.most_of_node).max()
        candidates += [PinnedCounts(of_rack=n) for n in choose(of_rack, 4)[1:]]
        candidates += [PinnedCounts(of_node=1, of_rack=n) for n in choose(of_rack - num_nodes / num_racks, 3)[1:]]
    return candidates


def evaluate_seconds(data: LayerData, expert_at: np.ndarray) -> float:
    """Compute how long a layout's busiest resource is busy -> seconds."""
    state, log = make_state(data, expert_at)
    rebuild(data, state, log, SmoothMax(1.0, 0))
    return max_seconds(data, state, log, False)


def break_ties(data: LayerData, expert_at: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Reduce the tokens that leave their nodes, then balance the ranks of each node, at no cost -> [P, s]."""
    expert_at = reduce_crossing(data, expert_at, seed, PROPOSALS_TO_TIDY)
    return expert_at if data.rank_cost > 0 else balance_nodes(data, expert_at)


def bound_layers(
    problem: PlacementProblem, expert_of_replica: np.ndarray, seconds: float, lower: list[float] | None = None
) -> list[float]:
    """Compute every layer's bound in about as many seconds, given layouts [L, S] -> seconds [L].

    lower [L]: what counting gave before, if it was asked.
    """
    problem = relax_evenness(problem, expert_of_replica)
    capacity = max_replicas_of_node(problem)
    first_equal = find_equal_layers(problem, np.broadcast_to(capacity, (problem.num_layers, len(capacity))))

    # Share what is left of the time among the different layers that are left.
    deadline, left = time.perf_counter() + seconds, len(set(first_equal))
    bounds: list[float] = []
    for layer in range(problem.num_layers):
        if first_equal[layer] < layer:
            bounds.append(bounds[first_equal[layer]])
            continue
        share = max(deadline - time.perf_counter(), 0.0) / left
        incumbent = layer_seconds(problem, layer, expert_of_replica[layer])
        known = None if lower is None else lower[layer]
        bounds.append(min(bound_layer(problem, layer, capacity, share, incumbent, known), incumbent))
        left -= 1
    return bounds
