"""Memory that two layers trade: one holds a copy more on a node, the other one less, where both together gain."""

import time
from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.quotas import limit_ranks
from hpcmoe.placement.search.anneal import Budget, improve
from hpcmoe.placement.search.layer_data import HOLE, Measure, make_layout, make_terms
from hpcmoe.placement.search.moves import compiled, holds, most_seconds, move, rebuild, undo

MOST_NODES = 32  # every pair of nodes is weighed in every layer
PROPOSALS_AFTER = 3000  # to settle a layer after a trade
LEAST_GAIN = 1e-9  # of the cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Shifts:
    """What moving one copy from node to node would change in a layer; the last index is nowhere."""

    cost: float  # seconds of the layer now
    change: np.ndarray  # [nodes + 1, nodes + 1] seconds, from row to column; inf where nothing can move
    how: np.ndarray  # [nodes + 1, nodes + 1, 3]: the expert, its rank before, its rank after
    used: np.ndarray  # [nodes] copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """The taker moves a copy from source to node, whose memory it gets from the giver, who moves one on to target."""

    taker: int  # layer
    giver: int  # layer
    source: int  # node, or nowhere
    node: int
    target: int | None  # node, or nowhere; None: the giver has room to spare on the node
    returns: bool  # does the giver get the memory that the taker leaves on the source?

    @property
    def moves(self):
        """List what moves as (layer, from, to)."""
        giving = [] if self.target is None else [(self.giver, self.node, self.target)]
        return [(self.taker, self.source, self.node), *giving]


def shift_memory(problem, most_of_node, layouts, deadline, seed):
    """Trade memory between layers while that lowers their cost, until the deadline -> layouts [P, s] of the layers.

    most_of_node [L, nodes] is changed in place.
    """
    layouts, shifts = list(layouts), [weigh_shifts(problem, k, expert_at) for k, expert_at in enumerate(layouts)]
    while time.perf_counter() < deadline:
        trade = find_trade(most_of_node, shifts)
        if trade is None:
            break
        most_of_node[[trade.taker, trade.giver], trade.node] += (1, -1)
        if trade.returns:
            most_of_node[[trade.taker, trade.giver], trade.source] += (-1, 1)
        for layer, source, target in trade.moves:
            expert_at = carry_out(layouts[layer], shifts[layer].how[source, target])
            terms = make_terms(problem, layer, limit_ranks(problem, most_of_node[layer]))
            layouts[layer] = improve(terms, expert_at, (seed, layer), Budget(proposals=PROPOSALS_AFTER)).expert_at
            shifts[layer] = weigh_shifts(problem, layer, layouts[layer])
    return layouts


def find_trade(most_of_node, shifts):
    """Find the trade that lowers the cost most -> Trade, or None where none does."""
    least, best = -LEAST_GAIN * sum(of_layer.cost for of_layer in shifts), None
    for taker, giver in np.argwhere(~np.eye(len(shifts), dtype=bool)).tolist():
        spare = most_of_node[giver] > shifts[giver].used
        free = np.append(spare, True)  # where the giver may move a copy without more memory; nowhere is always free
        for node in np.flatnonzero(most_of_node[giver] > 0).tolist():
            takes, gives = shifts[taker].change[:, node], shifts[giver].change[node]
            freely = np.where(free, gives, np.inf)
            onward = int(np.argmin(freely))
            total = takes + (0.0 if spare[node] else np.minimum(gives, freely[onward]))
            source = int(np.argmin(total))
            if total[source] < least:
                returns = bool(not spare[node] and gives[source] < freely[onward])
                target = None if spare[node] else source if returns else onward
                least = total[source]
                best = Trade(taker=taker, giver=giver, source=source, node=node, target=target, returns=returns)
    return best


def carry_out(expert_at, how):
    """Make one move of a table -> a new layout [P, s]."""
    expert, before, after = how
    moved = expert_at.copy()
    if before != HOLE:
        moved[before, np.argmax(moved[before] == expert)] = HOLE
    if after != HOLE:
        moved[after, np.argmax(moved[after] == HOLE)] = expert
    return moved


def weigh_shifts(problem, layer, expert_at):
    """Weigh every move of one copy in a layer as though memory were free -> Shifts."""
    terms = make_terms(problem, layer, limit_ranks(problem, problem.slots_of_node))
    layout, log = make_layout(terms, expert_at)
    measure = Measure(1.0, 0)
    rebuild(terms, layout, log, measure)
    cost = most_seconds(terms, layout, log, False)
    change = np.full((problem.num_nodes + 1,) * 2, np.inf)
    how = np.full((*change.shape, 3), HOLE)
    weigh_all(terms, layout, log, measure, change, how)
    return Shifts(cost=cost, change=change - cost, how=how, used=layout.count_of_node)


@compiled
def weigh_all(t, s, log, measure, seconds, how):
    """Fill in the seconds [nodes + 1, nodes + 1] that the layer takes after the best move of a copy, and its way."""
    num_ranks, num_experts = len(t.node_of_rank), t.demand.shape[1]
    nowhere = len(t.rack_of_node)
    for expert in range(num_experts):
        for c in range(s.num_copies[expert] + t.replicate - 1, -1, -1):  # backwards: undoing a loss appends the copy
            before = s.rank_of_copy[expert, c] if c < s.num_copies[expert] else HOLE
            source = nowhere if before == HOLE else t.node_of_rank[before]
            if before != HOLE and s.count_of_rank[before] <= t.fewest_of_rank[before]:
                continue
            for after in range(HOLE, num_ranks):
                target = nowhere if after == HOLE else t.node_of_rank[after]
                if source == target or (after == HOLE and s.num_copies[expert] < 2):
                    continue
                if after != HOLE and (s.count_of_rank[after] >= t.most_of_rank[after] or holds(s, after, expert)):
                    continue
                move(t, s, log, measure, expert, before, HOLE, after)
                taken = most_seconds(t, s, log, False)
                undo(t, s, log, expert, before, HOLE, after)
                if taken < seconds[source, target]:
                    seconds[source, target] = taken
                    how[source, target, 0], how[source, target, 1], how[source, target, 2] = expert, before, after
