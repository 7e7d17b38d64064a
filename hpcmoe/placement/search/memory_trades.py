"""Memory that two layers trade: one holds a replica more on a node, the other one less, where both together gain."""

import time
from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.quotas import make_limits
from hpcmoe.placement.search.anneal import Budget, search_layout
from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_layer_data, make_state
from hpcmoe.placement.search.moves import compiled, holds, max_seconds, move, rebuild, undo

MOST_TRADING_NODES = 32  # every pair of nodes is weighed in every layer
PROPOSALS_AFTER = 3000  # to settle a layer after a trade
_LEAST_GAIN = 1e-9  # of the cost


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveTable:
    """What moving one replica from node to node would change in a layer; the last index is nowhere."""

    cost: float  # seconds of the layer now
    change: np.ndarray  # [nodes + 1, nodes + 1] seconds, from row to column; inf where nothing can move
    how: np.ndarray  # [nodes + 1, nodes + 1, 3]: the expert, its rank before, its rank after
    used: np.ndarray  # [nodes] replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """The taker moves a replica from source to node, whose memory it gets from the giver, who moves one on to target."""

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


def trade_memory(problem, most_of_node, layouts, deadline, seed):
    """Trade memory between layers while that lowers their cost, until the deadline -> layouts [P, s] of the layers.

    most_of_node [L, nodes] is changed in place.
    """
    layouts, shifts = list(layouts), [evaluate_moves(problem, k, expert_at) for k, expert_at in enumerate(layouts)]
    while time.perf_counter() < deadline:
        trade = find_trade(most_of_node, shifts)
        if trade is None:
            break
        most_of_node[[trade.taker, trade.giver], trade.node] += (1, -1)
        if trade.returns:
            most_of_node[[trade.taker, trade.giver], trade.source] += (-1, 1)
        for layer, source, target in trade.moves:
            expert_at = apply_move(layouts[layer], shifts[layer].how[source, target])
            layer_data = make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))
            layouts[layer] = search_layout(
                layer_data, expert_at, (seed, layer), Budget(proposals=PROPOSALS_AFTER)
            ).expert_at
            shifts[layer] = evaluate_moves(problem, layer, layouts[layer])
    return layouts


def find_trade(most_of_node, shifts):
    """Find the trade that lowers the cost most -> Trade, or None where none does."""
    least, best = -_LEAST_GAIN * sum(of_layer.cost for of_layer in shifts), None
    for taker, giver in np.argwhere(~np.eye(len(shifts), dtype=bool)).tolist():
        spare = most_of_node[giver] > shifts[giver].used
        free = np.append(spare, True)  # where the giver may move a replica without more memory; nowhere is always free
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


def apply_move(expert_at, how):
    """Make one move of a table -> a new layout [P, s]."""
    expert, before, after = how
    moved = expert_at.copy()
    if before != EMPTY:
        moved[before, np.argmax(moved[before] == expert)] = EMPTY
    if after != EMPTY:
        moved[after, np.argmax(moved[after] == EMPTY)] = expert
    return moved


def evaluate_moves(problem, layer, expert_at):
    """Weigh every move of one replica in a layer as though memory were free -> MoveTable."""
    layer_data = make_layer_data(problem, layer, make_limits(problem, problem.slots_of_node))
    state, log = make_state(layer_data, expert_at)
    smooth_max = SmoothMax(1.0, 0)
    rebuild(layer_data, state, log, smooth_max)
    cost = max_seconds(layer_data, state, log, False)
    change = np.full((problem.num_nodes + 1,) * 2, np.inf)
    how = np.full((*change.shape, 3), EMPTY)
    evaluate_all(layer_data, state, log, smooth_max, change, how)
    return MoveTable(cost=cost, change=change - cost, how=how, used=state.count_of_node)


@compiled
def evaluate_all(t, s, log, smooth_max, seconds, how):
    """Fill in the seconds [nodes + 1, nodes + 1] that the layer takes after the best move of a replica, and its way."""
    num_ranks, num_experts = len(t.node_of_rank), t.demand.shape[1]
    nowhere = len(t.rack_of_node)
    for expert in range(num_experts):
        for c in range(
            s.num_replicas[expert] + t.replicate - 1, -1, -1
        ):  # backwards: undoing a loss appends the replica
            before = s.ranks_of_expert[expert, c] if c < s.num_replicas[expert] else EMPTY
            source = nowhere if before == EMPTY else t.node_of_rank[before]
            if before != EMPTY and s.count_of_rank[before] <= t.fewest_of_rank[before]:
                continue
            for after in range(EMPTY, num_ranks):
                target = nowhere if after == EMPTY else t.node_of_rank[after]
                if source == target or (after == EMPTY and s.num_replicas[expert] < 2):
                    continue
                if after != EMPTY and (s.count_of_rank[after] >= t.most_of_rank[after] or holds(s, after, expert)):
                    continue
                move(t, s, log, smooth_max, expert, before, EMPTY, after)
                taken = max_seconds(t, s, log, False)
                undo(t, s, log, expert, before, EMPTY, after)
                if taken < seconds[source, target]:
                    seconds[source, target] = taken
                    how[source, target, 0], how[source, target, 1], how[source, target, 2] = expert, before, after
