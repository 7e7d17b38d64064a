"""The cheapest layout of a tiny layer, found by trying them all, or in whole numbers by HiGHS."""

import itertools

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hpcmoe.placement.cost import layer_seconds


def try_all(problem, layer, room):
    """Try every layout of a layer within room [nodes] -> (seconds, expert_of_replica [S]) of the cheapest."""
    cheapest, best = np.inf, None
    for slots, counts in every_layout(problem):
        if (np.array(counts) <= room).all() and (seconds := layer_seconds(problem, layer, slots)) < cheapest:
            cheapest, best = seconds, slots
    return cheapest, best


def cheapest_by_counts(problem, layer):
    """Try every layout of a layer -> dict of the replicas on each node -> seconds of the cheapest."""
    seconds_of_counts = {}
    for slots, counts in every_layout(problem):
        seconds = layer_seconds(problem, layer, slots)
        seconds_of_counts[counts] = min(seconds, seconds_of_counts.get(counts, np.inf))
    return seconds_of_counts


def every_layout(problem):
    """List every layout, ranks of a node in any one order -> iterator of [S] and the replicas on each node.

    The nodes' ranks must adjoin. Single replicas are shared evenly where the problem asks for it.
    """
    slots, experts = problem.slots_per_rank, range(problem.num_experts)
    sets = [some + (-1,) * (slots - num) for num in range(slots + 1) for some in itertools.combinations(experts, num)]
    of_node = [itertools.combinations_with_replacement(sets, int(num)) for num in problem.ranks_of_node]
    for nodes in itertools.product(*of_node):
        expert_of_slot = np.array([expert for ranks in nodes for some in ranks for expert in some], np.int64)
        replicas = np.bincount(expert_of_slot[expert_of_slot >= 0], minlength=problem.num_experts)
        on_rank = [sum(expert >= 0 for expert in some) for ranks in nodes for some in ranks]
        if problem.even and not problem.replicate and np.ptp(on_rank) > 1:
            continue
        if replicas.min() > 0 and (problem.replicate or replicas.max() == 1):
            yield expert_of_slot, tuple(sum(expert >= 0 for some in ranks for expert in some) for ranks in nodes)


def solve_single(problem, layer, room):
    """Solve a layer of single replicas in whole numbers -> seconds of the cheapest; latency does not count.

    Variables: x[n, e], expert e on node n, node after node, and the seconds of the busiest resource. Written from the
    definitions of links, ports, uplinks and ranks, apart from all that finds bounds.
    """
    demand = problem.demand(layer)
    num_nodes, num_experts = demand.shape
    rows = np.array(list(resource_rows(problem, demand))).reshape(-1, demand.size)
    scale = rows.sum(axis=1).max() or 1.0
    busiest = np.append(np.zeros(demand.size), 1.0)
    answer = milp(
        busiest,
        constraints=[
            LinearConstraint(np.column_stack([rows / scale, -np.ones(len(rows))]), ub=0),
            LinearConstraint(np.pad(np.tile(np.eye(num_experts), num_nodes), ((0, 0), (0, 1))), lb=1, ub=1),
            LinearConstraint(np.pad(np.repeat(np.eye(num_nodes), num_experts, axis=1), ((0, 0), (0, 1))), ub=room),
        ],
        bounds=Bounds(0, np.where(busiest, np.inf, 1.0)),
        integrality=1 - busiest,
        options={"mip_rel_gap": 1e-7},
    )
    assert answer.status == 0, answer.message
    return answer.fun * scale


def resource_rows(problem, demand):
    """List what each expert on each node adds to each resource -> iterator of [nodes, E] seconds."""
    num_nodes, num_experts = demand.shape
    for i, n in itertools.permutations(range(num_nodes), 2):
        yield only(n, demand[i] * problem.bytes_per_token / problem.bytes_per_second[i, n], demand.shape)
    if problem.objective == "links":
        return

    elsewhere = 1 - np.eye(num_nodes)
    for n in range(num_nodes):
        port = problem.bytes_per_token / problem.ingress_bytes_per_second[n]
        yield only(n, elsewhere[n] @ demand * port, demand.shape)
        yield np.outer(elsewhere[n], demand[n]) * problem.bytes_per_token / problem.egress_bytes_per_second[n]
    for number, uplink in enumerate(problem.uplink_bytes_per_second):
        inside = (problem.rack_of_node == number).astype(np.float64)
        yield np.outer(1 - inside, inside @ demand) * problem.bytes_per_token / uplink
        yield np.outer(inside, (1 - inside) @ demand) * problem.bytes_per_token / uplink
    if problem.objective == "step":
        assert problem.slots_per_rank == 1  # a rank then serves one expert
        for n, e in np.ndindex(num_nodes, num_experts):
            alone = np.zeros(demand.shape)
            alone[n, e] = demand[:, e].sum() * problem.seconds_per_token
            yield alone


def only(node, seconds, shape):
    """Put seconds [E] into a node's row of zeros -> [nodes, E]."""
    rows = np.zeros(shape)
    rows[node] = seconds
    return rows
