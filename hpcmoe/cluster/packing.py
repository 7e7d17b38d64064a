"""How the experts of one layer are laid on the ranks: as many as each node can hold, where the links like it best."""

import numpy as np

MOST_SWAPS = 200  # for one layer: counted, not timed, so that every run of one problem ends alike
EQUAL = 1 + 1e-9  # figures closer than this are ties


def node_levels(problem):
    """Find the fewest and the most experts of a layer on each node -> two [nodes] int64.

    All ranks get the same number, the last experts one more on any: distinct ranks where there are enough of them.
    Where memory is short on a node, the others hold more.
    """
    ranks, room = problem.ranks_of_node, problem.room_of_node
    level = next(
        level
        for level in range(1, problem.slots_per_rank + 1)
        if np.minimum(level * ranks, room).sum() >= problem.num_experts
    )
    return np.minimum((level - 1) * ranks, room), np.minimum(level * ranks, room)


def contiguous_ranks(problem, fewest, most):
    """Lay the experts in order along the ranks, spread evenly over the nodes -> rank_of_expert [E]."""
    count, ranks_of_node = fewest.copy(), np.maximum(problem.ranks_of_node, 1)
    for _ in range(problem.num_experts - count.sum()):
        count[np.argmin(np.where(count < most, count / ranks_of_node, np.inf))] += 1

    num_of_rank = np.zeros(len(problem.node_of_rank), np.int64)
    for node, (base, extras) in enumerate(zip(*np.divmod(count, ranks_of_node), strict=True)):
        ranks = np.flatnonzero(problem.node_of_rank == node)
        num_of_rank[ranks] = base + (np.arange(len(ranks)) < extras)
    return np.repeat(np.arange(len(num_of_rank)), num_of_rank)


def packed_ranks(problem, demand, fewest, most):
    """Lay the experts where they keep the busiest link least busy -> rank_of_expert [E]; demand is [nodes, E]."""
    node_of_expert = pack_on_nodes(problem, demand, fewest, most)
    if len(most) > 1:
        node_of_expert = improve_by_swaps(problem, demand, fewest, most, node_of_expert)
    return seat_on_ranks(problem, demand.sum(axis=0), node_of_expert)


def pack_on_nodes(problem, demand, fewest, most):
    """Give each expert, hottest first, the node that keeps the links least busy, ties by load -> node_of_expert [E]."""
    cost, ranks = problem.seconds_per_token, np.maximum(problem.ranks_of_node, 1)
    sent = np.zeros_like(cost)  # [nodes, nodes] tokens
    count, free = np.zeros_like(fewest), problem.num_experts - fewest.sum()
    node_of_expert = np.empty(problem.num_experts, np.int64)
    for expert in hottest_first(demand.sum(axis=0)):
        asked = demand[:, expert, None]
        busiest = np.maximum(((sent + asked) * cost).max(axis=0), (sent * cost).max())  # [nodes], the expert there
        busiest[(count >= fewest) & ((count >= most) | (free == 0))] = np.inf

        # Among equals take the node whose ranks have least to do.
        load = np.where(busiest <= busiest.min() * EQUAL, (sent.sum(axis=0) + asked.sum()) / ranks, np.inf)
        node = np.argmin(load)
        free -= count[node] >= fewest[node]
        count[node] += 1
        sent[:, node] += asked[:, 0]
        node_of_expert[expert] = node
    return node_of_expert


def improve_by_swaps(problem, demand, fewest, most, node_of_expert):
    """Swap experts off the busiest node while that makes the busiest link less busy -> node_of_expert [E].

    Free places are experts that nobody asks for, so that a move is a swap as well. An expert on node n loads the
    links into n alone: a swap between two nodes changes two columns of the tokens sent.
    """
    num_experts, cost = problem.num_experts, problem.seconds_per_token
    holes = np.repeat(np.arange(len(most)), most - np.bincount(node_of_expert, minlength=len(most)))
    node_of_item = np.concatenate([node_of_expert, holes])
    demand = np.pad(demand, ((0, 0), (0, len(holes))))  # [nodes, items]
    sent = demand @ (node_of_item[:, None] == np.arange(len(most)))  # [nodes, nodes]

    for _ in range(MOST_SWAPS):
        busiest = (sent * cost).max(axis=0)
        hot = np.argmax(busiest)
        inside = np.flatnonzero(node_of_item[:num_experts] == hot)
        outside = np.flatnonzero(node_of_item != hot)
        if len(inside) == fewest[hot]:  # it may not give an expert for a hole
            outside = outside[outside < num_experts]
        if len(inside) == 0 or len(outside) == 0:
            break

        # Weigh all swaps of one expert on the hot node with one item elsewhere.
        there = node_of_item[outside]
        change = demand[:, None, outside] - demand[:, inside, None]  # [nodes, inside, outside]
        here_after = ((sent[:, hot, None, None] + change) * cost[:, hot, None, None]).max(axis=0)
        there_after = ((sent[:, None, there] - change) * cost[:, None, there]).max(axis=0)
        after = np.maximum(here_after, there_after)
        a, b = np.unravel_index(np.argmin(after), after.shape)
        if after[a, b] * EQUAL >= busiest[hot]:
            break
        sent[:, hot] += change[:, a, b]
        sent[:, there[b]] -= change[:, a, b]
        node_of_item[inside[a]], node_of_item[outside[b]] = there[b], hot
    return node_of_item[:num_experts]


def seat_on_ranks(problem, tokens, node_of_expert):
    """Give each expert, hottest first, the least loaded rank of its node that may still take one -> rank_of_expert [E].

    A node's ranks hold the same number of experts, some one more. tokens [E] is each expert's load.
    """
    num_of_node = np.bincount(node_of_expert, minlength=len(problem.rack_of_node))
    base, extras = np.divmod(num_of_node, np.maximum(problem.ranks_of_node, 1))
    count, load = np.zeros(len(problem.node_of_rank), np.int64), np.zeros(len(problem.node_of_rank))
    rank_of_expert = np.empty(problem.num_experts, np.int64)
    for expert in hottest_first(tokens):
        node = node_of_expert[expert]
        open_ranks = (problem.node_of_rank == node) & (count < base[node] + (extras[node] > 0))
        rank = np.argmin(np.where(open_ranks, load, np.inf))
        extras[node] -= count[rank] == base[node]
        count[rank] += 1
        load[rank] += tokens[expert]
        rank_of_expert[expert] = rank
    return rank_of_expert


def add_replicas(problem, demand, holds):
    """Put copies of the hottest experts into spare slots, marking them in holds [P, E], as long as no link suffers.

    Hottest is who has most tokens a copy. Its next copy goes to the node that leaves the links least busy, ties by
    less cross-node traffic, then to that node's least loaded rank that does not hold it yet.
    """
    cost, node_of_rank = problem.seconds_per_token, problem.node_of_rank
    tokens = demand.sum(axis=0)
    copies = np.stack([holds[node_of_rank == node].sum(axis=0) for node in range(len(cost))])  # [nodes, E]
    sent = sum(send(problem, demand[:, e], copies[:, [e]])[0] for e in range(len(tokens)))
    load = holds @ (tokens / holds.sum(axis=0))
    wants = tokens > 0
    while wants.any():
        expert = np.argmax(np.where(wants, tokens / copies.sum(axis=0), -1))
        ranks = open_ranks(problem, holds, copies, expert, load)
        if len(ranks) == 0:
            wants[expert] = False
            continue

        # Weigh one more copy on each of these ranks.
        nodes = node_of_rank[ranks]
        trials = np.repeat(copies[:, [expert]], len(nodes), axis=1)
        trials[nodes, np.arange(len(nodes))] += 1
        others = sent - send(problem, demand[:, expert], copies[:, [expert]])[0]
        after = others + send(problem, demand[:, expert], trials)  # [trials, nodes, nodes]
        busiest = (after * cost).max(axis=(1, 2))
        crossing = np.where(busiest <= busiest.min() * EQUAL, -np.trace(after, axis1=1, axis2=2), np.inf)
        best = np.lexsort((load[ranks], np.round(crossing, 6)))[0]
        if busiest[best] > (sent * cost).max() * EQUAL:
            wants[expert] = False
            continue

        # Take it; for the load, take its tokens as even over its copies.
        load -= holds[:, expert] * tokens[expert] / copies[:, expert].sum()
        holds[ranks[best], expert] = True
        copies[nodes[best], expert] += 1
        load += holds[:, expert] * tokens[expert] / copies[:, expert].sum()
        sent = after[best]


def open_ranks(problem, holds, copies, expert, load):
    """List each node's least loaded rank with a free slot, memory, and no copy of the expert yet -> [ranks]."""
    is_open = ~holds[:, expert] & (holds.sum(axis=1) < problem.slots_per_rank)
    is_open &= (copies.sum(axis=1) < problem.room_of_node)[problem.node_of_rank]
    ranks = np.flatnonzero(is_open)
    ranks = ranks[np.argsort(load[ranks], kind="stable")]
    return ranks[np.unique(problem.node_of_rank[ranks], return_index=True)[1]]


def send(problem, asked, copies):
    """Send one expert's tokens, asked [nodes], for trials of its copies [nodes, trials] -> [trials, nodes, nodes]."""
    tier, count = problem.nearest(copies)
    share = (problem.distance[:, :, None] <= tier[:, None, :]) * copies / count[:, None, :]  # [from, to, trials]
    return np.moveaxis(asked[:, None, None] * share, 2, 0)


def hottest_first(tokens):
    """Order experts by falling tokens, equals by number -> [E]."""
    return np.argsort(-tokens, kind="stable")
