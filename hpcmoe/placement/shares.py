"""How much of each node's tokens every replica of an expert takes: where "nearest first" leaves one part too busy.

The shares that make a layer's busiest resource least busy, for replicas that stay where they are, are a linear program;
HiGHS solves it (Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5).
"""

import time

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, hstack

from hpcmoe.placement.cost import layer_seconds, list_resources, make_nearest_shares, resource_seconds

MOST_VARIABLES = 20000  # of one layer's program; a larger one takes seconds
_LEAST_GAIN = 0.005  # of the objective; less is not worth leaving the nearest replica for
HOME_WEIGHT = 1e-4  # among shares that are as good, those with fewer tokens between nodes
LEAST_SHARE = 1e-6


def tune_shares(problem, expert_of_replica, seconds):
    """Share out the tokens of replicas [L, S] anew within the seconds -> split [L, nodes, S], or None without gain.

    A split sums to 1 over the replicas of each expert, and is "nearest first" in layers that gain nothing.
    """
    deadline, split, costs = time.perf_counter() + seconds, [], np.zeros((2, problem.num_layers))
    for layer, experts in enumerate(expert_of_replica):
        nearest = make_nearest_shares(problem, experts)
        if layer > 0 and same_layer(problem, layer, expert_of_replica):
            best = split[-1]
        else:
            best = improve_shares(problem, layer, experts, nearest, deadline - time.perf_counter())
        split.append(best)
        costs[:, layer] = [layer_seconds(problem, layer, experts, share) for share in (nearest, best)]
    before, after = costs.sum(axis=1)
    return np.stack(split) if after < before * (1 - _LEAST_GAIN) else None


def same_layer(problem, layer, expert_of_replica):
    """Whether a layer asks for the same and lies the same as the one before it."""
    of_layers = (problem.probability, expert_of_replica)
    return all(np.array_equal(array[layer], array[layer - 1]) for array in of_layers)


def improve_shares(problem, layer, experts, nearest, seconds):
    """Find better shares [nodes, S] of a layer than the nearest ones, or hand these back."""
    used = experts >= 0
    replicas = np.bincount(experts[used], minlength=problem.num_experts)
    open_slots = np.flatnonzero(used & (replicas[experts] > 1))
    asked = problem.demand(layer)[:, experts[open_slots]]  # [nodes, open slots] tokens
    sender, column = np.nonzero(asked)
    if not 0 < len(sender) <= MOST_VARIABLES or seconds <= 0:
        return nearest

    found = solve_shares(problem, layer, experts, nearest, (sender, open_slots[column], asked[sender, column]), seconds)
    if found is None:
        return nearest
    return min(nearest, found, key=lambda share: layer_seconds(problem, layer, experts, share))


def solve_shares(problem, layer, experts, nearest, choices, seconds):
    """Solve a layer's linear program -> shares [nodes, S], or None when it ends without an answer.

    choices: sending node, slot, and that node's tokens for the slot's expert, [n] each. A variable a choice, its share;
    the last variable is the time of the busiest resource, in units of what the nearest shares cost.
    """
    sender, slot, tokens = choices
    unit = layer_seconds(problem, layer, experts, nearest)
    if unit == 0:
        return None

    # Each resource is busy with what has no choice and with what is chosen, at most as long as the last variable says.
    fixed = nearest.copy()
    fixed[sender, slot] = 0.0
    busy = resource_seconds(problem, layer, experts, fixed)
    base = np.concatenate([busy[name].ravel() for name in list_resources(problem.objective)])
    cost = cost_of_choices(problem, sender, slot, len(base)) * tokens
    within = hstack([cost / unit, coo_array(-np.ones((len(base), 1)))])

    # All of a node's tokens for an expert go somewhere; of equal answers take the one with fewest between nodes.
    pair = np.unique(sender * problem.num_experts + experts[slot], return_inverse=True)[1]
    whole = coo_array((np.ones(len(pair)), (pair, np.arange(len(pair)))), shape=(pair.max() + 1, len(pair) + 1))
    away = sender != problem.node_of_rank[slot // problem.slots_per_rank]
    answer = linprog(
        np.append(HOME_WEIGHT * away * tokens / tokens.sum(), 1.0),
        A_ub=within.tocsr(),
        b_ub=-base / unit,
        A_eq=whole.tocsr(),
        b_eq=np.ones(whole.shape[0]),
        method="highs",
        options={"time_limit": seconds},
    )
    if answer.status != 0:
        return None

    # Drop what no rank would ever send, and make the rest whole again.
    share = np.where(answer.x[:-1] < LEAST_SHARE, 0.0, answer.x[:-1])
    fixed[sender, slot] = share / np.bincount(pair, share)[pair]
    return fixed


def cost_of_choices(problem, sender, slot, num_resources):
    """Find the seconds that one token of each choice costs each counted resource -> sparse [resources, choices]."""
    rank = slot // problem.slots_per_rank
    receiver, racks = problem.node_of_rank[rank], problem.rack_of_node
    crosses, leaves_rack = sender != receiver, racks[sender] != racks[receiver]
    num_nodes, num_racks = problem.num_nodes, len(problem.uplink_bytes_per_second)
    sent, between = crosses * problem.bytes_per_token, leaves_rack * problem.bytes_per_token
    cost_of = {  # name: place among the resources of that name, how many there are, seconds a token
        "link": (sender * num_nodes + receiver, num_nodes**2, problem.link_cost[sender, receiver]),
        "egress": (sender, num_nodes, sent / problem.egress_bytes_per_second[sender]),
        "ingress": (receiver, num_nodes, sent / problem.ingress_bytes_per_second[receiver]),
        "uplink_out": (racks[sender], num_racks, between / problem.uplink_bytes_per_second[racks[sender]]),
        "uplink_in": (racks[receiver], num_racks, between / problem.uplink_bytes_per_second[racks[receiver]]),
        "rank": (rank, problem.num_ranks, np.full(len(slot), problem.seconds_per_token)),
    }
    places, sizes, costs = zip(*(cost_of[name] for name in list_resources(problem.objective)), strict=True)
    rows = np.concatenate([place + start for place, start in zip(places, np.cumsum((0, *sizes[:-1])), strict=True)])
    columns = np.tile(np.arange(len(slot)), len(sizes))
    costs = np.concatenate(costs)
    used = costs > 0
    return coo_array((costs[used], (rows[used], columns[used])), shape=(num_resources, len(slot))).tocsr()
