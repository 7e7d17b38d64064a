"""Seconds below which no placement of a layer can come: counting arguments in milliseconds, then a linear program.

A layout is optimal where it costs no more than its bound. Where that is simpler, a bound lets a node's tokens split
freely among the replicas of the nearest tier: an even split is one such split.
"""

import time

import numpy as np

from hpcmoe.placement.bounds.choices import make_choices
from hpcmoe.placement.bounds.linear import Program, make_program
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import fewest_of_node, most_of_rank
from hpcmoe.placement.resources import list_resources, port_rates, token_rates

_INCUMBENT_GAP = 1e-6  # nearer to the incumbent than this no bound is sought
_ROUNDING = 1e-9
_MOST_HOT = 256  # experts, of which one decides
_MOST_COLUMNS = 6000  # of a program in whole numbers that HiGHS should be asked to solve


def bound_layer(
    problem: PlacementProblem,
    layer: int,
    capacity: np.ndarray,
    seconds: float = 0.0,
    incumbent: float = np.inf,
    lower: float | None = None,
) -> float:
    """Return seconds below which no placement of one layer can come, in about as many seconds as given.

    capacity [nodes]: the most replicas of the layer's experts that each node can hold. incumbent: the cost of the best
    layout known, which ends the search when it is met. Without seconds, and on clusters too large for a linear
    program, counting must do; lower: what it gave before, if it was asked.
    """
    deadline = time.perf_counter() + seconds
    demand, capacity = problem.demand(layer), np.minimum(capacity, problem.num_experts * problem.ranks_of_node)
    if not demand.any():
        return 0.0

    # Begin with what counting proves. Spare capacity is of use for replicas alone.
    spare = count_spare(problem, capacity) if problem.replicate else 0
    lower = count_layer(problem, demand, capacity, spare) if lower is None else lower
    if lower >= incumbent * (1 - _INCUMBENT_GAP) or seconds <= 0:
        return lower

    # Go on with the linear program, where it is small enough.
    choices = make_choices(problem, capacity, spare)
    if choices is None:
        return lower
    floor = bound_beside_coldest(problem, demand, capacity, slice(None)) if choices.is_single else None
    program = make_program(problem, demand, np.append(capacity, problem.num_experts + spare), choices, floor)
    return search_bound(program, lower, incumbent, deadline)


def count_spare(problem: PlacementProblem, capacity: np.ndarray) -> int:
    """Count the replicas that a layer may have beyond one of each expert while the other layers keep that many too."""
    held = problem.capacity_of_node.sum()
    return int(min(capacity.sum() - problem.num_experts, held - problem.num_layers * problem.num_experts))


def search_bound(program: Program, lower: float, incumbent: float, deadline: float) -> float:
    """Raise a lower bound towards the incumbent until the deadline -> seconds.

    A layout cheaper than t has no expert where that expert alone costs t. The program without those choices is
    stronger, and where it finds t or more, there is no such layout (Lenstra, Shmoys and Tardos 1990).
    """
    if program.scale == 0:  # nothing here costs time
        return lower
    goal = high = incumbent * (1 - _INCUMBENT_GAP)
    lower = max(lower, program.bound(np.inf, deadline))

    # Try to end it at the incumbent first; else close in on the time at which the program no longer objects.
    guess = high if np.isfinite(high) else 2 * lower
    while lower < high * (1 - 1e-3) and time.perf_counter() < deadline:
        found = program.bound(guess, deadline)
        if found >= guess:
            lower = guess
        else:
            lower, high = max(lower, found), guess
        guess = (lower + high) / 2 if np.isfinite(high) else 2 * lower

    # Settle what is left in whole numbers, where every expert has one replica and there are few.
    if program.choices.is_single and lower < goal and program.demand.size <= _MOST_COLUMNS:
        lower = max(lower, program.bound_whole(goal, deadline - time.perf_counter()))
    return float(min(lower, goal))


def count_layer(problem: PlacementProblem, demand: np.ndarray, capacity: np.ndarray, spare: int) -> float:
    """Return the best of the counting arguments, for demand [nodes, E] and spare replicas in all -> seconds."""
    bounds = [bound_leaving(problem, demand, capacity, spare), bound_scarcity(problem, demand, spare)]
    if spare == 0:
        bounds.append(bound_single(problem, demand, capacity))
    if "rank" in list_resources(problem.objective):
        bounds.append(bound_ranks(problem, demand, spare))
    return float(max(bounds)) * (1 - _ROUNDING)


def bound_leaving(problem: PlacementProblem, demand: np.ndarray, capacity: np.ndarray, spare: int) -> float:
    """Compute a bound from the tokens that must leave nodes and racks, which keep their hottest experts -> seconds."""
    rates = token_rates(problem)
    bounds = [bound_senders(demand, capacity, spare, rates["link"].sum(axis=1))]
    if "egress" in list_resources(problem.objective):
        bounds.append(bound_senders(demand, capacity, spare, rates["egress"]))
        ingress = port_rates(problem)["ingress"].sum()
        bounds.append(find_leaving(demand, capacity, spare)[1] * problem.bytes_per_token / ingress)

        # Let a rack send as if it were a node.
        racks = (np.arange(len(rates["uplink_out"]))[:, None] == problem.rack_of_node).astype(np.float64)
        bounds.append(bound_senders(racks @ demand, (racks @ capacity).astype(np.int64), spare, rates["uplink_out"]))
    return max(bounds)


def bound_senders(demand: np.ndarray, capacity: np.ndarray, spare: int, rate: np.ndarray) -> float:
    """Compute a bound from nodes that send at their rates [nodes]: each, all as one, and their mean -> seconds."""
    seconds = np.divide(1.0, rate, out=np.zeros(len(rate)), where=rate > 0)  # of a token; 0 where rates do not count
    if not seconds.any():
        return 0.0
    leaving, crossing = find_leaving(demand, capacity, spare)
    together = find_leaving(demand * seconds[:, None], capacity, spare)[1] / np.count_nonzero(seconds)
    return max((leaving * seconds).max(), crossing / rate.sum(), together)


def find_leaving(demand: np.ndarray, capacity: np.ndarray, spare: int) -> tuple[np.ndarray, float]:
    """Count what must leave its node at least, for demand [nodes, E] -> [nodes] from each alone, and from all.

    Each node keeps at most its own hottest experts. In all, every expert keeps one home in its best place, and the
    spare replicas go where they keep most.
    """
    hottest = np.pad(np.cumsum(-np.sort(-demand, axis=1), axis=1), ((0, 0), (1, 0)))
    leaving = demand.sum(axis=1) - hottest[np.arange(len(demand)), np.minimum(capacity, demand.shape[1])]

    # Keep every expert's best place, and the next best ones for the spare replicas.
    order = np.sort(demand, axis=0)
    others = order[:-1].ravel()
    spare = min(spare, len(others))
    kept = order[-1].sum() + (np.partition(others, len(others) - spare)[len(others) - spare :].sum() if spare else 0.0)
    crossing = max(demand.sum() - kept, leaving.sum())
    noise = _ROUNDING * demand.sum()  # sums of tokens that stay are off by less
    return np.maximum(leaving - noise, 0), max(crossing - noise, 0)


def bound_scarcity(problem: PlacementProblem, demand: np.ndarray, spare: int) -> float:
    """Compute a bound from the replicas that the hottest experts, each as if alone, need and cannot have -> seconds."""
    most = min(problem.num_ranks if "rank" in list_resources(problem.objective) else problem.num_nodes, spare + 1)
    steps = np.unique(np.round(1.4 ** np.arange(np.log(most) / np.log(1.4) + 1)).clip(1, most).astype(np.int64))
    times = np.minimum.accumulate([bound_alone(problem, demand, count) for count in steps])  # [steps, E]

    # Take counts between two steps for as good as the next step: from k replicas on no entry exceeds times[k].
    times = np.repeat(times, np.diff(steps, prepend=0), axis=0).ravel()
    return -np.partition(-times, spare)[spare] if spare < len(times) else 0.0


def bound_alone(problem: PlacementProblem, demand: np.ndarray, count: int) -> np.ndarray:
    """Compute a bound of what each expert alone costs with `count` replicas in the best places -> seconds [E]."""
    order, names = -np.sort(-demand, axis=0), list_resources(problem.objective)
    bounds = [np.zeros(demand.shape[1])]

    # Have all nodes but `count` send theirs over at most so many links.
    if count < problem.num_nodes:
        fastest = -np.partition(-token_rates(problem)["link"], count - 1, axis=1)[:, :count].sum(axis=1)
        bounds.append(np.partition(demand / fastest[:, None], -count - 1, axis=0)[-count - 1])
        if "ingress" in names:
            ingress = -np.sort(-port_rates(problem)["ingress"])[:count].sum()
            bounds.append(order[count:].sum(axis=0) * problem.bytes_per_token / ingress)
    if "rank" in names:
        bounds.append(order.sum(axis=0) / min(count, problem.num_ranks) * problem.seconds_per_token)
    return np.max(bounds, axis=0)


def bound_single(problem: PlacementProblem, demand: np.ndarray, capacity: np.ndarray) -> float:
    """Compute a bound from where single replicas can be, beside those that other nodes cannot hold -> seconds."""
    coldest, forced = sum_coldest(demand), count_forced(demand, capacity)
    hot = np.argsort(-demand.sum(axis=0), kind="stable")[:_MOST_HOT]  # one of them decides
    of_node = bound_beside_coldest(problem, demand, capacity, hot)
    return max((coldest[:, forced] * problem.link_cost).max(), of_node[capacity > 0].min(axis=0).max())


def sum_coldest(demand: np.ndarray) -> np.ndarray:
    """Sum each node's tokens for as many of its coldest experts -> [nodes, 1 + E]."""
    return np.pad(np.cumsum(np.sort(demand, axis=1), axis=1), ((0, 0), (1, 0)))


def count_forced(demand: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Count the single replicas that each node must hold as the others have no capacity for them -> [nodes]."""
    return np.maximum(demand.shape[1] - (capacity.sum() - capacity), 0)


def bound_beside_coldest(
    problem: PlacementProblem, demand: np.ndarray, capacity: np.ndarray, experts: np.ndarray | slice
) -> np.ndarray:
    """Compute a bound of an expert's single replica on each node beside the coldest ones -> seconds [nodes, n]."""
    counts_ingress = "ingress" in list_resources(problem.objective)
    ingress = port_rates(problem)["ingress"] if counts_ingress else np.full(problem.num_nodes, np.inf)
    beside = sum_coldest(demand)[:, np.maximum(count_forced(demand, capacity) - 1, 0)]  # [from, to]
    asked = demand[:, experts]
    seconds = asked.sum(axis=0) - asked + (beside.sum(axis=0) - np.diag(beside))[:, None]  # [to, n] tokens
    seconds *= (problem.bytes_per_token / ingress)[:, None]
    for tokens, more, cost, latency in zip(asked, beside, problem.link_cost, problem.link_latency, strict=True):
        link = (tokens + more[:, None]) * cost[:, None]
        np.maximum(seconds, link + latency[:, None] * (tokens > 0), out=seconds)
    return seconds


def bound_ranks(problem: PlacementProblem, demand: np.ndarray, spare: int) -> float:
    """Compute a bound from the ranks' mean, and the hottest expert's only replica beside the coldest -> seconds."""
    tokens = np.sort(demand.sum(axis=0))
    mean = tokens.sum() / min(problem.num_ranks, problem.num_experts + spare)
    if spare > 0:
        return mean * problem.seconds_per_token

    # Have a rank hold what the others have no capacity for, and as many as it must.
    fewest = fewest_of_node(problem)[problem.node_of_rank].min()
    beside = max(problem.num_experts - (problem.num_ranks - 1) * most_of_rank(problem) - 1, fewest - 1, 0)
    return max(mean, tokens[-1] + tokens[:beside].sum()) * problem.seconds_per_token
