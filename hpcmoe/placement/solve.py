"""From the problem to the placement: seeds, search, memory traded between layers, ties, bounds, in numbered steps.

Pure: arrays in, arrays out, run on rank 0. With a count of proposals, one problem and seed give one answer unless the
clock ends the search first; with a time alone, what the clock allows.
"""

import dataclasses
import time

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.placement.bounds.bounds import bound_layer
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.problem import check_problem
from hpcmoe.placement.quotas import (
    divide_memory,
    has_even_ranks,
    make_limits,
    max_replicas_of_node,
    relax_evenness,
    usable_of_node,
)
from hpcmoe.placement.result import SearchStats, evaluate
from hpcmoe.placement.search.anneal import TIE_FACTOR, Budget, reduce_crossing, search_layout
from hpcmoe.placement.search.balance_node import balance_nodes
from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_layer_data, make_state
from hpcmoe.placement.search.memory_trades import MOST_TRADING_NODES, trade_memory
from hpcmoe.placement.search.moves import max_seconds, rebuild
from hpcmoe.placement.search.seeds import PinnedCounts, make_contiguous, make_eplb, make_packed
from hpcmoe.placement.search.warm import compile_search

_LARGE = 2**20  # nodes x nodes x experts: from here on a seed takes tens of milliseconds
LEAST_SECONDS = 1e-3  # of a layer's search, however late
_PART_FOR_TRADES = 0.3  # of the time, where the layers compete for memory
PROPOSALS_TO_TIDY = 10_000  # to break ties in a layer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search."""

    seconds: float = 1.0  # for all layers
    iterations: int = 0  # proposals a layer; 0: as many as the seconds allow
    seed: int = 0
    start: np.ndarray | None = None  # [L, S], a placement that the answer must not be worse than, if it is as even


def make_placement(problem, method="packed", **options):
    """Lay all layers' experts on the ranks -> Placement; PlacementError when they do not fit.

    method: "packed" searches, by SearchOptions, and may then take half as long again to prove how good the answer is;
    "contiguous" and "eplb" do as they do, and raise where that breaks a limit of memory.
    """
    # 1 Check that there is a placement. 2 Spread the memory over the layers.
    check_problem(problem)
    options, most_of_node = SearchOptions(**options), divide_memory(problem)
    if options.start is not None and not has_even_ranks(problem, options.start):
        options = dataclasses.replace(options, start=None)
    lower = [None] * problem.num_layers
    match method:
        case "packed" if (plain := place_without_search(problem, most_of_node, options)) is not None:
            layouts, search_stats, seconds = plain, SearchStats(), 0.0
        case "packed":
            compile_search()
            match_memory(problem, most_of_node, options.start)
            layouts, search_stats, counted = search_layers(problem, most_of_node, options)
            if has_ample_memory(problem):  # else a layer may get more memory than what was counted with
                lower = counted
            seconds = options.seconds / 2
        case "contiguous" | "eplb":
            layouts = [place_by_rule(problem, most_of_node, k, method) for k in layers_of(problem)]
            search_stats, seconds = SearchStats(), 0.0
        case _:
            raise ValueError(method)

    # 7 Bound every layer from below. 8 Weigh it all.
    expert_of_replica = np.stack([pad_slots(problem, expert_at) for expert_at in layouts])
    used = np.bincount(problem.node_of_slot, (expert_of_replica != EMPTY).sum(axis=0), problem.num_nodes)
    assert (used <= problem.memory_replicas).all(), "a node holds more than its memory"
    bounds = bound_layers(problem, expert_of_replica, lower, seconds)
    return evaluate(problem, expert_of_replica, bounds, method, search_stats)


def place_without_search(problem, most_of_node, options):
    """Lay contiguously where no search can gain: on one node, at the bound in every layer -> layouts, else None.

    Within a node nothing travels that another layout would spare; a placement to start from is searched on from.
    """
    if problem.num_nodes > 1 or options.start is not None:
        return None
    layouts = []
    for layer in layers_of(problem):
        layer_data = make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))
        expert_at, bound = make_contiguous(layer_data), bound_layer(problem, layer, most_of_node[layer])
        if (
            not fits(layer_data, expert_at)
            or layer_seconds(problem, layer, pad_slots(problem, expert_at)) > bound * TIE_FACTOR
        ):
            return None
        layouts.append(expert_at if layer_data.rank_cost > 0 else balance_nodes(layer_data, expert_at))
    return layouts


def compare_methods(problem, methods):
    """Find what placements by these methods would cost -> dict method: seconds, None where it does not fit."""
    seconds_of_method, most_of_node = {}, divide_memory(problem)
    for method in methods:
        try:
            layouts = [pad_slots(problem, place_by_rule(problem, most_of_node, k, method)) for k in layers_of(problem)]
        except PlacementError:
            seconds_of_method[method] = None
        else:
            seconds_of_method[method] = sum(layer_seconds(problem, k, experts) for k, experts in enumerate(layouts))
    return seconds_of_method


def has_ample_memory(problem):
    """Tell whether the experts of all slots that may be filled fit the memory, so that layers do not compete for it."""
    return bool((problem.memory_replicas >= usable_of_node(problem) * problem.num_layers).all())


def layers_of(problem):
    """Number the layers."""
    return range(problem.num_layers)


def place_by_rule(problem, most_of_node, layer, method):
    """Lay one layer by a method that does not search -> [P, s]; PlacementError where it does not fit the memory."""
    layer_data = make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))
    expert_at = make_contiguous(layer_data) if method == "contiguous" else make_eplb(layer_data)
    if not fits(layer_data, expert_at):
        raise PlacementError(f"{method} placement: layer {layer} does not fit the memory of every node")
    return expert_at


def fits(layer_data, expert_at):
    """Tell whether a layout [P, s] keeps to the limits and has every expert, on no rank twice."""
    held = expert_at != EMPTY
    count, ordered = held.sum(axis=1), np.sort(expert_at, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)
    of_node = np.bincount(layer_data.node_of_rank, count, len(layer_data.most_of_node))
    return (
        len(np.unique(expert_at[held])) == len(layer_data.tokens)
        and not twice.any()
        and (count <= layer_data.most_of_rank).all()
        and (count >= layer_data.fewest_of_rank).all()
        and (of_node <= layer_data.most_of_node).all()
    )


def search_layers(problem, most_of_node, options):
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


def search_each(problem, most_of_node, options, layers, until):
    """Search some layers one after the other until a time -> (SearchResult by layer, bound by layer)."""
    found, lower, kept = {}, {}, None
    for done, layer in enumerate(layers):
        begun = time.perf_counter()
        share = max(until - begun, 0.0) / (len(layers) - done)

        # 3 Lay seeds, and take the best. 4 Search on from it. 6 Break ties.
        layer_data = make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))
        start = None if options.start is None else trim_slots(problem, layer_data, options.start[layer])
        expert_at, kept = find_best_seed(layer_data, start, kept)
        lower[layer] = bound_layer(problem, layer, np.minimum(max_replicas_of_node(problem), most_of_node[layer]))
        left = max(begun + share - time.perf_counter(), LEAST_SECONDS)
        budget = Budget(seconds=left, proposals=options.iterations, goal=lower[layer])
        best = search_layout(layer_data, expert_at, (options.seed, layer), budget)
        tidied = break_ties(layer_data, best.expert_at, (options.seed, layer))
        found[layer] = dataclasses.replace(best, expert_at=tidied)
    return found, lower


def search_on(problem, most_of_node, layouts, options, until):
    """Spend what the trades have left on every layer again, where time is what counts, and break ties -> layouts."""
    searched = []
    for layer, expert_at in enumerate(layouts):
        layer_data, seed = (
            make_layer_data(problem, layer, make_limits(problem, most_of_node[layer])),
            (options.seed, layer, 1),
        )
        share = (until - time.perf_counter()) / (len(layouts) - layer)
        if share > LEAST_SECONDS and not options.iterations:
            goal = bound_layer(problem, layer, np.minimum(max_replicas_of_node(problem), most_of_node[layer]))
            expert_at = search_layout(layer_data, expert_at, seed, Budget(seconds=share, goal=goal)).expert_at
        searched.append(break_ties(layer_data, expert_at, seed))
    return searched


def find_equal_layers(problem, most_of_node):
    """Find the first layer that asks for the same and may hold the same as each layer -> list [L]."""
    first_of_content = {}
    return [
        first_of_content.setdefault((problem.probability[k].tobytes(), most_of_node[k].tobytes()), k)
        for k in layers_of(problem)
    ]


def find_best_seed(layer_data, start, kept):
    """Lay all seeds -> (the best [P, s], the PinnedCounts that those of its kind are best with).

    start [P, s] or None is one more seed. kept is what was best in an earlier layer; on a large cluster no other is
    tried again.
    """
    ways = choose_pinned(layer_data, kept)
    packed = [make_packed(layer_data, way) for way in ways]
    others = [make_contiguous(layer_data), make_contiguous(layer_data, spread=False), make_eplb(layer_data), start]
    layouts = packed + [expert_at for expert_at in others if expert_at is not None and fits(layer_data, expert_at)]
    costs = [evaluate_seconds(layer_data, expert_at) for expert_at in layouts]
    return layouts[np.argmin(costs)], ways[np.argmin(costs[: len(ways)])]


def choose_pinned(layer_data, kept):
    """List what nodes and racks may keep of their own hottest experts, to try it -> list of PinnedCounts."""
    if not layer_data.replicate:
        return [PinnedCounts()]
    (num_nodes, num_experts), num_racks = layer_data.demand.shape, len(layer_data.uplink_cost)
    is_large = num_nodes**2 * num_experts > _LARGE
    if is_large and kept is not None:
        return [kept]
    ways = [
        PinnedCounts(of_node=n)
        for n in choose_numbers(layer_data.most_of_node.max(), num_experts, 4 if is_large else 8)
    ]
    if num_racks > 1:
        of_rack = np.bincount(layer_data.rack_of_node, layer_data.most_of_node).max()
        ways += [PinnedCounts(of_rack=n) for n in choose_numbers(of_rack, num_experts, 4)[1:]]
        ways += [
            PinnedCounts(of_node=1, of_rack=n)
            for n in choose_numbers(of_rack - num_nodes / num_racks, num_experts, 3)[1:]
        ]
    return ways


def choose_numbers(most, num_experts, count):
    """Spread a few whole numbers from 0 to the most that is possible -> ascending list."""
    return np.unique(np.linspace(0, max(min(most, num_experts), 0), count).astype(int)).tolist()


def evaluate_seconds(layer_data, expert_at):
    """Find how long a layout's busiest resource is busy -> seconds."""
    state, log = make_state(layer_data, expert_at)
    rebuild(layer_data, state, log, SmoothMax(1.0, 0))
    return max_seconds(layer_data, state, log, False)


def break_ties(layer_data, expert_at, seed):
    """Let fewer tokens leave their nodes, and the ranks of a node be as busy as each other: at no cost -> [P, s]."""
    expert_at = reduce_crossing(layer_data, expert_at, seed, PROPOSALS_TO_TIDY)
    return expert_at if layer_data.rank_cost > 0 else balance_nodes(layer_data, expert_at)


def match_memory(problem, most_of_node, start):
    """Spread the memory over the layers as a placement [L, S] to start from does, where it fits; in place."""
    if start is None:
        return
    nodes = problem.node_of_slot
    used = np.stack([np.bincount(nodes[row != EMPTY], minlength=problem.num_nodes) for row in start])
    if (used.sum(axis=0) <= np.minimum(problem.memory_replicas, problem.slots_of_node * problem.num_layers)).all():
        for node in np.flatnonzero((most_of_node < used).any(axis=0)):
            rest = max(most_of_node[:, node].sum() - used[:, node].sum(), 0)
            room = np.cumsum(np.maximum(usable_of_node(problem)[node] - used[:, node], 0))
            most_of_node[:, node] = used[:, node] + np.diff(np.minimum(room, rest), prepend=0)


def trim_slots(problem, layer_data, experts):
    """Lay a layer's slots [S] out by ranks, without the slots that no rank may use -> [P, s'], or None."""
    expert_at = -np.sort(-experts.reshape(problem.num_ranks, -1), axis=1)  # the empty slots last
    most = layer_data.most_of_rank.max()
    return expert_at[:, :most].copy() if (expert_at[:, most:] == EMPTY).all() else None


def pad_slots(problem, expert_at):
    """Give every rank all its slots, the unused ones empty: [P, s'] -> [S]."""
    missing = problem.slots_per_rank - expert_at.shape[1]
    return np.pad(expert_at, ((0, 0), (0, missing)), constant_values=EMPTY).ravel()


def bound_layers(problem, expert_of_replica, lower, seconds):
    """Bound every layer from below, given the layouts found [L, S] and the time for it -> seconds [L].

    lower [L]: what is known already; None where nothing is.
    """
    problem = relax_evenness(problem, expert_of_replica)
    room = max_replicas_of_node(problem)
    first_equal = find_equal_layers(problem, np.broadcast_to(room, (problem.num_layers, len(room))))
    deadline, left, bounds = time.perf_counter() + seconds, len(set(first_equal)), []
    for layer in layers_of(problem):
        if first_equal[layer] < layer:
            bounds.append(bounds[first_equal[layer]])
            continue
        share = max(deadline - time.perf_counter(), 0.0) / left
        incumbent = layer_seconds(problem, layer, expert_of_replica[layer])
        bounds.append(min(bound_layer(problem, layer, room, share, incumbent, lower[layer]), incumbent))
        left -= 1
    return bounds
