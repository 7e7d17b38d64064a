"""Refinement: from a placement to a better one nearby, by the same search, with few experts moved."""

import time

import numpy as np

from hpcmoe.placement.bounds.bounds import bound_layer
from hpcmoe.placement.cost import layer_seconds
from hpcmoe.placement.layouts import fits, match_memory, pad_slots, trim_slots
from hpcmoe.placement.migrate import keep_slots
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import divide_memory, relax_evenness, widen_limits
from hpcmoe.placement.search.anneal import TIE_FACTOR, Budget, reduce_crossing, search_layout
from hpcmoe.placement.search.layer_data import EMPTY, LayerData, make_layer_data
from hpcmoe.placement.search.warm import compile_search
from hpcmoe.placement.solve import LEAST_SECONDS, PROPOSALS_TO_TIDY, SearchOptions

_LEAST_GAIN = 0.005  # of a layer's cost; for less nothing moves


def refine(problem: PlacementProblem, present: np.ndarray, most_moves: int, options: SearchOptions) -> np.ndarray:
    """Search on from layouts [L, S] -> layouts [L, S] that cost no more, with what stays in its slot.

    In each layer at most most_moves replicas come to ranks that lack them; those that do not help stay. Where present
    is less even than it must be, no rank's count moves further from its limits.
    """
    compile_search()
    begun, most_of_node = time.perf_counter(), divide_memory(problem)
    match_memory(problem, most_of_node, present)
    refined, bounded = present.copy(), relax_evenness(problem, present)
    for layer in range(problem.num_layers):
        # Widen the limits to where the layer is; leave it if it does not fit even these.
        data = make_layer_data(problem, layer, widen_limits(problem, most_of_node[layer], present[layer]))
        start = trim_slots(problem, data, present[layer])
        if start is None or not fits(data, start):
            continue
        held = list_held(start, problem.num_experts)
        data = data._replace(already_held=held, most_moves=most_moves)

        # Search on from there.
        left = (begun + options.seconds - time.perf_counter()) / (problem.num_layers - layer)
        budget = Budget(
            seconds=max(left, LEAST_SECONDS),
            proposals=options.iterations,
            goal=bound_layer(bounded, layer, most_of_node[layer]),
        )
        found = search_layout(data, start, (options.seed, layer), budget).expert_at
        found = reduce_crossing(data, found, (options.seed, layer), PROPOSALS_TO_TIDY)

        # Undo the moves that do not help, and keep the layer if the others help too little.
        new = keep_slots(present[layer], pad_slots(problem, found), problem.slots_per_rank)
        new = undo_needless(problem, layer, present[layer], new, data)
        new = keep_slots(present[layer], new, problem.slots_per_rank)
        before, after = (layer_seconds(problem, layer, experts) for experts in (present[layer], new))
        if after < before * (1 - _LEAST_GAIN):
            refined[layer] = new
    return refined


def list_held(expert_at: np.ndarray, num_experts: int) -> np.ndarray:
    """List the experts that each rank holds: [P, s] -> bool [P, E]."""
    held = np.zeros((len(expert_at), num_experts), bool)
    rank, slot = np.nonzero(expert_at != EMPTY)
    held[rank, expert_at[rank, slot]] = True
    return held


def undo_needless(
    problem: PlacementProblem, layer: int, old: np.ndarray, new: np.ndarray, data: LayerData
) -> np.ndarray:
    """Restore what moved without need, slot by slot, while the layer costs no more; old, new [S] -> [S]."""
    limit = layer_seconds(problem, layer, new) * TIE_FACTOR
    for slot in np.flatnonzero(old != new).tolist():
        back = undo_slot(old, new, slot)
        at = trim_slots(problem, data, back)
        if at is not None and fits(data, at) and layer_seconds(problem, layer, back) <= limit:
            new = back
    return new


def undo_slot(old: np.ndarray, new: np.ndarray, slot: int) -> np.ndarray:
    """Return to a slot what it held, and what it holds to where that went or where it came from: [S] -> [S]."""
    had, has, back = old[slot], new[slot], new.copy()
    went = (new == had) & (old != had) if had != EMPTY else (new == EMPTY) & (old == has)
    back[slot] = had
    back[np.flatnonzero(went & (new != has))[:1]] = has
    return back
