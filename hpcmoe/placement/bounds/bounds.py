"""Seconds below which no placement of a layer can come: counting arguments in milliseconds, then a linear program.

A layout is optimal where it costs no more than its bound. All bounds let a node's tokens split at will among the
replicas of the nearest tier where that is simpler: an even split is one such split.
"""

import time

import numpy as np

from hpcmoe.placement.bounds.choices import make_choices
from hpcmoe.placement.bounds.linear import make_program
from hpcmoe.placement.cost import list_resources
from hpcmoe.placement.quotas import fewest_of_node, most_of_rank

_INCUMBENT_GAP = 1e-6  # nearer to the incumbent than this no bound is sought
_ROUNDING = 1e-9
MOST_HOT = 256  # experts, of which one decides
MOST_COLUMNS = 6000  # of a program in whole numbers that HiGHS should be asked to solve


def bound_layer(problem, layer, room, seconds=0.0, incumbent=np.inf, lower=None):
    """Find seconds below which no placement of one layer can come, in about as many seconds as given.

    room [nodes]: the most replicas of the layer's experts that each node can hold. incumbent: the cost of the best
    layout known; the search for a bound ends when it is met, to within _INCUMBENT_GAP. Without seconds, and on clusters too
    large for a linear program, the counting arguments must do; lower: what these gave before, if they were asked.
    """
    deadline = time.perf_counter() + seconds
    demand, room = problem.demand(layer), np.minimum(room, problem.num_experts * problem.ranks_of_node)
    if not demand.any():
        return 0.0

    # Begin with what counting tells; spare room is of use for replicas alone.
    spare = count_spare(problem, room) if problem.replicate else 0
    goal = incumbent * (1 - _INCUMBENT_GAP)
    lower = count_layer(problem, demand, room, spare) if lower is None else lower
    if lower >= goal or seconds <= 0:
        return lower
    choices = make_choices(problem, room, spare)
    if choices is None:
        return lower
    floor = cost_in_company(problem, demand, room, slice(None)) if choices.is_single else None
    program = make_program(problem, demand, np.append(room, problem.num_experts + spare), choices, floor)
    return search_bound(program, lower, incumbent, deadline)


def count_spare(problem, room):
    """Count the replicas that a layer may have beyond one of each expert, as the other layers keep that many too."""
    held = np.minimum(problem.slots_of_node * problem.num_layers, problem.memory_replicas).sum()
    return int(min(room.sum() - problem.num_experts, held - problem.num_layers * problem.num_experts))


def search_bound(program, lower, incumbent, deadline):
    """Raise a lower bound towards the incumbent until the deadline -> seconds.

    A layout cheaper than t has no expert where that expert alone costs t: the program without those choices is
    stronger, and where it finds t or more, there is no such layout (Lenstra, Shmoys and Tardos 1990).
    """
    if program.scale == 0:  # nothing here costs time
        return lower
    goal = high = incumbent * (1 - _INCUMBENT_GAP)
    lower = max(lower, program.bound(np.inf, deadline))

    # First try to end it at the incumbent; else close in on the time at which the program no longer objects.
    guess = high if np.isfinite(high) else 2 * lower
    while lower < high * (1 - 1e-3) and time.perf_counter() < deadline:
        found = program.bound(guess, deadline)
        if found >= guess:
            lower = guess
        else:
            lower, high = max(lower, found), guess
        guess = (lower + high) / 2 if np.isfinite(high) else 2 * lower

    # Where every expert has one replica and there are few, whole numbers may settle what is left.
    if program.choices.is_single and lower < goal and program.demand.size <= MOST_COLUMNS:
        lower = max(lower, program.bound_whole(goal, deadline - time.perf_counter()))
    return float(min(lower, goal))


def count_layer(problem, demand, room, spare):
    """Find the best of the counting arguments, for demand [nodes, E] and spare replicas in all -> seconds."""
    bounds = [of_leaving(problem, demand, room, spare), of_replicas(problem, demand, room, spare)]
    if spare == 0:
        bounds.append(of_company(problem, demand, room))
    if "rank" in list_resources(problem.objective):
        bounds.append(of_ranks(problem, demand, spare))
    return float(max(bounds)) * (1 - _ROUNDING)


def of_leaving(problem, demand, room, spare):
    """Bound by the tokens that must leave their node or rack: each keeps at most its own hottest experts -> seconds."""
    speed = np.divide(1.0, problem.link_cost, out=np.zeros(problem.link_cost.shape), where=problem.link_cost > 0)
    bounds = [of_senders(demand, room, spare, speed.sum(axis=1))]
    if "egress" in list_resources(problem.objective):
        egress, ingress = problem.egress_bytes_per_second, problem.ingress_bytes_per_second
        bounds.append(of_senders(demand, room, spare, egress / problem.bytes_per_token))
        bounds.append(find_leaving(demand, room, spare)[1] * problem.bytes_per_token / ingress.sum())

        # A rack sends as if it were a node.
        racks = (np.arange(len(problem.uplink_bytes_per_second))[:, None] == problem.rack_of_node).astype(np.float64)
        uplink = problem.uplink_bytes_per_second / problem.bytes_per_token
        bounds.append(of_senders(racks @ demand, (racks @ room).astype(np.int64), spare, uplink))
    return max(bounds)


def of_senders(demand, room, spare, rate):
    """Bound by nodes that send at most at their rates [nodes]: each, all as one, and their mean time -> seconds."""
    seconds = np.divide(1.0, rate, out=np.zeros(len(rate)), where=rate > 0)  # of a token; 0 where rates do not count
    if not seconds.any():
        return 0.0
    leaving, crossing = find_leaving(demand, room, spare)
    together = find_leaving(demand * seconds[:, None], room, spare)[1] / np.count_nonzero(seconds)
    return max((leaving * seconds).max(), crossing / rate.sum(), together)


def find_leaving(demand, room, spare):
    """Count what must leave its node at least, for demand [nodes, E] -> [nodes] from each alone, and from all.

    Each node keeps at most its own hottest experts; and in all every expert keeps one home, in its best place, and
    the spare replicas go where they keep most.
    """
    hottest = np.pad(np.cumsum(-np.sort(-demand, axis=1), axis=1), ((0, 0), (1, 0)))
    leaving = demand.sum(axis=1) - hottest[np.arange(len(demand)), np.minimum(room, demand.shape[1])]
    crossing = max(demand.sum() - keep_in_all(demand, spare), leaving.sum())
    noise = _ROUNDING * demand.sum()  # sums of tokens that stay are off by less
    return np.maximum(leaving - noise, 0), max(crossing - noise, 0)


def keep_in_all(demand, spare):
    """Bound the tokens that stay with every expert in its best place and the spare replicas in the next best ones."""
    order = np.sort(demand, axis=0)
    others = order[:-1].ravel()
    spare = min(spare, len(others))
    return order[-1].sum() + (np.partition(others, len(others) - spare)[len(others) - spare :].sum() if spare else 0.0)


def of_replicas(problem, demand, room, spare):
    """Bound by the replicas that the hottest experts would want, each as if alone, and have no room for -> seconds."""
    most = min(problem.num_ranks if "rank" in list_resources(problem.objective) else problem.num_nodes, spare + 1)
    steps = np.unique(np.round(1.4 ** np.arange(np.log(most) / np.log(1.4) + 1)).clip(1, most).astype(np.int64))
    times = np.minimum.accumulate([of_alone(problem, demand, count) for count in steps])  # [steps, E]

    # Counts between two steps are taken as good as the next step: from k replicas on no entry exceeds times[k].
    times = np.repeat(times, np.diff(steps, prepend=0), axis=0).ravel()
    return -np.partition(-times, spare)[spare] if spare < len(times) else 0.0


def of_alone(problem, demand, count):
    """Bound what each expert alone costs with `count` replicas in the best places -> seconds [E]."""
    inverse = np.where(problem.link_cost > 0, 1 / np.where(problem.link_cost > 0, problem.link_cost, 1), 0)
    order = -np.sort(-demand, axis=0)
    bounds = [np.zeros(demand.shape[1])]

    # All nodes but `count` must send theirs over at most so many links.
    if count < problem.num_nodes:
        fastest = -np.partition(-inverse, count - 1, axis=1)[:, :count].sum(axis=1)
        bounds.append(np.partition(demand / fastest[:, None], -count - 1, axis=0)[-count - 1])
        if "ingress" in list_resources(problem.objective):
            ingress = -np.sort(-problem.ingress_bytes_per_second)[:count].sum()
            bounds.append(order[count:].sum(axis=0) * problem.bytes_per_token / ingress)
    if "rank" in list_resources(problem.objective):
        bounds.append(order.sum(axis=0) / min(count, problem.num_ranks) * problem.seconds_per_token)
    return np.max(bounds, axis=0)


def of_company(problem, demand, room):
    """Bound by where each expert's only replica can be, beside those that the other nodes have no room for -> seconds."""
    coldest, forced = sum_coldest(demand), count_forced(demand, room)
    hot = np.argsort(-demand.sum(axis=0), kind="stable")[:MOST_HOT]  # one of them decides
    of_node = cost_in_company(problem, demand, room, hot)
    return max((coldest[:, forced] * problem.link_cost).max(), of_node[room > 0].min(axis=0).max())


def sum_coldest(demand):
    """Sum each node's tokens for as many of its coldest experts -> [nodes, 1 + E]."""
    return np.pad(np.cumsum(np.sort(demand, axis=1), axis=1), ((0, 0), (1, 0)))


def count_forced(demand, room):
    """Count the single replicas that each node must hold as the others have no room for them -> [nodes]."""
    return np.maximum(demand.shape[1] - (room.sum() - room), 0)


def cost_in_company(problem, demand, room, experts):
    """Find what single replicas of some experts cost on each node with the coldest beside them -> seconds [nodes, n]."""
    ingress = np.where("ingress" in list_resources(problem.objective), problem.ingress_bytes_per_second, np.inf)
    company = sum_coldest(demand)[:, np.maximum(count_forced(demand, room) - 1, 0)]  # [from, to]
    asked = demand[:, experts]
    seconds = asked.sum(axis=0) - asked + (company.sum(axis=0) - np.diag(company))[:, None]  # [to, n] tokens
    seconds *= (problem.bytes_per_token / ingress)[:, None]
    for tokens, beside, cost, latency in zip(asked, company, problem.link_cost, problem.link_latency, strict=True):
        link = (tokens + beside[:, None]) * cost[:, None]
        np.maximum(seconds, link + latency[:, None] * (tokens > 0), out=seconds)
    return seconds


def of_ranks(problem, demand, spare):
    """Bound by what the ranks compute: their mean; and the hottest expert's only replica beside the coldest -> seconds."""
    tokens = np.sort(demand.sum(axis=0))
    mean = tokens.sum() / min(problem.num_ranks, problem.num_experts + spare)
    if spare > 0:
        return mean * problem.seconds_per_token

    # A rank holds what the others have no room for, and as many as it must.
    fewest = fewest_of_node(problem)[problem.node_of_rank].min()
    company = max(problem.num_experts - (problem.num_ranks - 1) * most_of_rank(problem) - 1, fewest - 1, 0)
    return max(mean, tokens[-1] + tokens[:company].sum()) * problem.seconds_per_token
