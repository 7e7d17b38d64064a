"""Proposals of moves: three in four where they can relieve the busiest resource, the others anywhere."""

import numpy as np

from hpcmoe.placement.search.layer_data import EMPTY, LayerData, LayerState
from hpcmoe.placement.search.moves import compiled, holds, inlined


@compiled
def draw_integer(random: np.ndarray, below: int) -> np.int64:
    """Draw an integer from 0 to below - 1, by xorshift64* (Vigna 2016, doi:10.1145/2845077); random is [1] uint64."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    high = x * np.uint64(2685821657736338717) >> np.uint64(32)
    return np.int64(high * np.uint64(below) >> np.uint64(32))


@inlined
def _draw_rank(t, random, node):
    """Draw one of a node's ranks; of all ranks where the node is EMPTY or has none."""
    if node != EMPTY:
        first, end = t.first_of_node[node], t.first_of_node[node + 1]
        if end > first:
            return t.rank_by_node[first + draw_integer(random, end - first)]
    return draw_integer(random, len(t.node_of_rank))


@inlined
def _draw_demanded(t, random, node):
    """Draw an expert, preferably one that the node's tokens are routed to: the best of a few."""
    demand = t.demand
    best = draw_integer(random, demand.shape[1])
    for _ in range(draw_integer(random, 4)):
        other = draw_integer(random, demand.shape[1])
        if demand[node, other] > demand[node, best]:
            best = other
    return best


@inlined
def _draw_remote(t, s, random, sender, receiver):
    """Draw an expert that the receiver holds and the sender lacks, preferably one that it sends many tokens for."""
    best, most = EMPTY, 0.0
    for _ in range(3):
        rank = _draw_rank(t, random, receiver)
        expert = s.expert_at[rank, draw_integer(random, t.most_of_rank[rank])]
        if expert != EMPTY and s.replicas[sender, expert] == 0:
            share = t.demand[sender, expert] / s.num_replicas[expert]
            if share > most:
                best, most = expert, share
    return best


@compiled
def _draw_slot(t, s, random, rank):
    """Draw one of a rank's slots: of a few, that of the expert with least demand, of its node or of all a replica."""
    node, best, least = t.node_of_rank[rank], 0, np.inf
    here, tries = draw_integer(random, 2) == 0, 1 + draw_integer(random, 3)
    for _ in range(tries):
        slot = draw_integer(random, t.most_of_rank[rank])
        expert, demand = s.expert_at[rank, slot], -1.0
        if expert != EMPTY:
            demand = t.demand[node, expert] if here else t.tokens[expert] / s.num_replicas[expert]
        if demand < least:
            best, least = slot, demand
    return best


@compiled
def _find_endpoints(t, random, k):
    """Find what resource k joins -> (sending node, receiving node, rank), EMPTY where it has none."""
    num_nodes, num_racks = len(t.rack_of_node), len(t.uplink_cost)
    if k < t.first_egress:
        return k // num_nodes, k % num_nodes, EMPTY
    if k >= t.first_rank:
        return EMPTY, EMPTY, k - t.first_rank
    if k < t.first_uplink:
        node, outwards = (k - t.first_egress) % num_nodes, k < t.first_ingress
    else:
        node, outwards = draw_integer(random, num_nodes), k < t.first_uplink + num_racks
        for _ in range(num_nodes):  # a rack may be without nodes
            if t.rack_of_node[node] == (k - t.first_uplink) % num_racks:
                break
            node = (node + 1) % num_nodes
    return (node, EMPTY, EMPTY) if outwards else (EMPTY, node, EMPTY)


@compiled
def _choose_rank(t, s, random, busiest):
    """Choose a rank whose contents to change, and perhaps an expert that it should get -> (rank, expert)."""
    # Look at the busiest resource, or at none.
    sender, receiver, rank = EMPTY, EMPTY, EMPTY
    if draw_integer(random, 4) > 0:
        sender, receiver, rank = _find_endpoints(t, random, busiest)

    # Relieve a rank: change it, or replicate one of its experts on another.
    if rank != EMPTY:
        if t.replicate and draw_integer(random, 2) == 0:
            return _draw_rank(t, random, EMPTY), s.expert_at[rank, draw_integer(random, t.most_of_rank[rank])]
        return rank, EMPTY

    # Relieve a port or a link: bring experts to the sender, or change the receiver.
    if sender != EMPTY and receiver == EMPTY:
        return _draw_rank(t, random, sender), _draw_demanded(t, random, sender)
    if sender != EMPTY and draw_integer(random, 2) == 0:
        target = _draw_rank(t, random, sender if draw_integer(random, 2) == 0 else EMPTY)
        return target, _draw_remote(t, s, random, sender, receiver)
    return _draw_rank(t, random, receiver), EMPTY


@compiled
def propose_move(t: LayerData, s: LayerState, random: np.ndarray, busiest: int) -> tuple[int, int, int, int]:
    """Draw a move -> (rank a, its slot, rank b, its slot); b is EMPTY, and its slot an expert, to replace a's."""
    a, wish = _choose_rank(t, s, random, busiest)
    slot = _draw_slot(t, s, random, a)

    # Replace what is there: by the chosen expert, else by one of demand on the node, else by nothing.
    if t.replicate and draw_integer(random, 2) == 0:
        if wish == EMPTY and draw_integer(random, 16) > 0:
            wish = _draw_demanded(t, random, t.node_of_rank[a])
        return a, slot, EMPTY, wish

    # Swap it: for the chosen expert, else for any.
    b = _draw_rank(t, random, EMPTY)
    if wish != EMPTY:
        b = s.ranks_of_expert[wish, draw_integer(random, s.num_replicas[wish])]
        for other in range(s.expert_at.shape[1]):
            if s.expert_at[b, other] == wish:
                return a, slot, b, other
    return a, slot, b, draw_integer(random, t.most_of_rank[b])


@inlined
def _count_new_moves(t, e, a, f, b):
    """Count the replicas that a move adds where they were not, with f on rank a instead of b, and e on b."""
    more = 0
    for expert, source, target in ((e, a, b), (f, b, a)):
        if expert != EMPTY and source != EMPTY and not t.already_held[source, expert]:
            more -= 1
        if expert != EMPTY and target != EMPTY and not t.already_held[target, expert]:
            more += 1
    return more


@compiled
def may_move(t: LayerData, s: LayerState, e: int, a: int, f: int, b: int) -> bool:
    """Return True if f may come from rank b to a, and e go from a to b, in slots, memory and number of replicas."""
    # Check that it is a move, and one more is allowed.
    if e == f or a == b or (f != EMPTY and holds(s, a, f)):
        return False
    if t.most_moves != EMPTY and s.num_moved[0] + _count_new_moves(t, e, a, f, b) > t.most_moves:
        return False
    node_of_rank = t.node_of_rank

    # Check a replacement: f is added, e removed.
    if b == EMPTY:
        if e != EMPTY:
            return s.num_replicas[e] > 1
        return s.count_of_node[node_of_rank[a]] < t.most_of_node[node_of_rank[a]]

    # Check a swap, or a move to an empty slot.
    if e != EMPTY and holds(s, b, e):
        return False
    here, there = node_of_rank[a], node_of_rank[b]
    if here == there and t.rank_cost == 0.0:
        return False
    if e != EMPTY and f != EMPTY:
        return True
    giver = a if f == EMPTY else b
    taker = there if f == EMPTY else here
    return s.count_of_rank[giver] > t.fewest_of_rank[giver] and (
        here == there or s.count_of_node[taker] < t.most_of_node[taker]
    )
