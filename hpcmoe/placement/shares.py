"""The share of each node's tokens that every replica of an expert takes, where "nearest first" loads one part too much.

For replicas that stay where they are, the shares that make a layer's busiest resource least busy are a linear program.
HiGHS solves it (Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5).
"""

import time

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, hstack, vstack

from hpcmoe.placement.bounds.choices import make_price_matrix
from hpcmoe.placement.cost import layer_seconds, make_nearest_shares, resource_seconds
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import count_resources, list_resources, price_flows

_MOST_VARIABLES = 20000  # of one layer's program; a larger one takes seconds
_LEAST_GAIN = 0.005  # of the objective; less is not worth leaving the nearest replica for
_HOME_WEIGHT = 1e-4  # among shares that are as good, those with fewer tokens between nodes
_LEAST_SHARE = 1e-6


def tune_shares(problem: PlacementProblem, expert_of_replica: np.ndarray, seconds: float) -> np.ndarray | None:
    """Share the tokens of replicas [L, S] anew within the seconds -> split [L, nodes, S], or None without gain.

    A split sums to 1 over the replicas of each expert, and is "nearest first" in layers that gain nothing.
    """
    deadline, costs = time.perf_counter() + seconds, np.zeros((2, problem.num_layers))
    split: list[np.ndarray] = []
    for layer, experts in enumerate(expert_of_replica):
        # Take over what a layer that equals the one before it has.
        nearest = best = make_nearest_shares(problem, experts)
        if layer > 0 and all(
            np.array_equal(of[layer], of[layer - 1]) for of in (problem.probability, expert_of_replica)
        ):
            best = split[-1]
        elif (left := deadline - time.perf_counter()) > 0:
            best = improve_shares(problem, layer, experts, nearest, left)
        split.append(best)
        costs[:, layer] = [layer_seconds(problem, layer, experts, share) for share in (nearest, best)]
    before, after = costs.sum(axis=1)
    return np.stack(split) if after < before * (1 - _LEAST_GAIN) else None


def improve_shares(
    problem: PlacementProblem, layer: int, experts: np.ndarray, nearest: np.ndarray, seconds: float
) -> np.ndarray:
    """Solve a layer's linear program -> better shares [nodes, S] than the nearest, or these without gain or answer.

    A choice is a sending node with a slot that holds one of several replicas. A variable a choice, its share; the last
    variable is the time of the busiest resource, in units of what the nearest shares cost.
    """
    used = experts >= 0
    replicas = np.bincount(experts[used], minlength=problem.num_experts)
    open_slots = np.flatnonzero(used & (replicas[experts] > 1))
    asked = problem.demand(layer)[:, experts[open_slots]]  # [nodes, open slots] tokens
    sender, column = np.nonzero(asked)
    slot, tokens = open_slots[column], asked[sender, column]
    if not 0 < len(sender) <= _MOST_VARIABLES or (unit := layer_seconds(problem, layer, experts, nearest)) == 0:
        return nearest

    # Let each resource be busy with what has no choice and what is chosen, at most as long as the last variable.
    share = nearest.copy()
    share[sender, slot] = 0.0
    busy = resource_seconds(problem, layer, experts, share)
    base = np.concatenate([busy[name].ravel() for name in list_resources(problem.objective)])
    cost = price_choices(problem, sender, slot) * tokens
    within = hstack([cost / unit, coo_array(-np.ones((len(base), 1)))])

    # Send all of a node's tokens for an expert somewhere; of equal answers take that with fewest between nodes.
    pair = np.unique(sender * problem.num_experts + experts[slot], return_inverse=True)[1]
    whole = coo_array((np.ones(len(pair)), (pair, np.arange(len(pair)))), shape=(pair.max() + 1, len(pair) + 1))
    away = sender != problem.node_of_rank[slot // problem.slots_per_rank]
    answer = linprog(
        np.append(_HOME_WEIGHT * away * tokens / tokens.sum(), 1.0),
        A_ub=within.tocsr(),
        b_ub=-base / unit,
        A_eq=whole.tocsr(),
        b_eq=np.ones(whole.shape[0]),
        method="highs",
        options={"time_limit": seconds},
    )
    if answer.status != 0:
        return nearest

    # Drop what no rank would ever send, and make the rest whole again.
    chosen = np.where(answer.x[:-1] < _LEAST_SHARE, 0.0, answer.x[:-1])
    share[sender, slot] = chosen / np.bincount(pair, chosen)[pair]
    return min(nearest, share, key=lambda shares: layer_seconds(problem, layer, experts, shares))


def price_choices(problem: PlacementProblem, sender: np.ndarray, slot: np.ndarray) -> csr_array:
    """Return the seconds that a token of each choice [n] costs each counted resource -> sparse [resources, n]."""
    rank = slot // problem.slots_per_rank
    prices = price_flows(problem, sender, problem.node_of_rank[rank])
    prices["rank"] = rank, np.full(len(rank), problem.seconds_per_token)
    sizes, names = count_resources(problem), list_resources(problem.objective)
    return csr_array(vstack([make_price_matrix(*prices[name], sizes[name]) for name in names]))
