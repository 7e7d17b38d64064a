"""Memory that layers trade: one holds a replica more on a node and another one less, where they gain together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import make_limits
from hpcmoe.placement.search.anneal import Budget, open_layout, search_layout
from hpcmoe.placement.search.layer_data import EMPTY, SmoothMax, make_layer_data
from hpcmoe.placement.search.moves import compiled, holds, max_seconds, move, undo

MOST_TRADING_NODES = 32  # every pair of nodes is evaluated in every layer
_PROPOSALS_AFTER = 3000  # to settle a layer after a trade
_LEAST_GAIN = 1e-9  # of the cost


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveTable:
    """The change of a layer's cost by each move of one replica from node to node; the last index is nowhere."""

    cost: float  # seconds of the layer now
    change: np.ndarray  # [nodes + 1, nodes + 1] seconds, from row to column; inf where nothing can move
    best_move: np.ndarray  # [nodes + 1, nodes + 1, 3]: the expert, its rank before, its rank after
    used: np.ndarray  # [nodes] replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """A move of the taker's replica from source to node, in memory that the giver frees by one to target."""

    taker: int  # layer
    giver: int  # layer
    source: int  # node, or nowhere
    node: int
    target: int | None  # node, or nowhere; None: the giver has room to spare on the node
    returns: bool  # does the giver get the memory that the taker leaves on the source?

    @property
    def moves(self) -> list[tuple[int, int, int]]:
        """List the moves as (layer, from, to)."""
        giving = [] if self.target is None else [(self.giver, self.node, self.target)]
        return [(self.taker, self.source, self.node), *giving]


def trade_memory(
    problem: PlacementProblem, most_of_node: np.ndarray, layouts: Sequence[np.ndarray], deadline: float, seed: int
) -> list[np.ndarray]:
    """Trade memory between layers while that lowers their cost, until the deadline -> layouts [P, s] of the layers.

    most_of_node [L, nodes] is changed in place.
    """
    layouts, tables = list(layouts), [evaluate_moves(problem, k, expert_at) for k, expert_at in enumerate(layouts)]
    while time.perf_counter() < deadline and (trade := find_trade(most_of_node, tables)) is not None:
        # Move the memory.
        most_of_node[[trade.taker, trade.giver], trade.node] += (1, -1)
        if trade.returns:
            most_of_node[[trade.taker, trade.giver], trade.source] += (-1, 1)

        # Move the replicas, and search on from there.
        for layer, source, target in trade.moves:
            expert_at = apply_move(layouts[layer], tables[layer].best_move[source, target])
            data = make_layer_data(problem, layer, make_limits(problem, most_of_node[layer]))
            layouts[layer] = search_layout(data, expert_at, (seed, layer), Budget(proposals=_PROPOSALS_AFTER)).expert_at
            tables[layer] = evaluate_moves(problem, layer, layouts[layer])
    return layouts


def find_trade(most_of_node: np.ndarray, tables: Sequence[MoveTable]) -> Trade | None:
    """Find the trade that lowers the cost of the layers most, or None where none does."""
    least, best = -_LEAST_GAIN * sum(table.cost for table in tables), None
    for taker, giver in np.argwhere(~np.eye(len(tables), dtype=bool)).tolist():
        spare = most_of_node[giver] > tables[giver].used
        free = np.append(spare, True)  # where the giver may move a replica without more memory; nowhere is always free
        for node in np.flatnonzero(most_of_node[giver] > 0).tolist():
            # Choose where the taker's replica comes from, and where the giver's goes.
            takes, gives = tables[taker].change[:, node], tables[giver].change[node]
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


def apply_move(expert_at: np.ndarray, step: Sequence[int] | np.ndarray) -> np.ndarray:
    """Apply a move (expert, rank before, rank after) to a layout -> a new one [P, s]."""
    expert, before, after = step
    moved = expert_at.copy()
    if before != EMPTY:
        moved[before, np.argmax(moved[before] == expert)] = EMPTY
    if after != EMPTY:
        moved[after, np.argmax(moved[after] == EMPTY)] = expert
    return moved


def evaluate_moves(problem: PlacementProblem, layer: int, expert_at: np.ndarray) -> MoveTable:
    """Evaluate every move of one replica in a layer's layout [P, s] as if memory were free."""
    data = make_layer_data(problem, layer, make_limits(problem, problem.slots_of_node))
    state, log, cost = open_layout(data, expert_at)
    seconds = np.full((problem.num_nodes + 1,) * 2, np.inf)
    best_move = np.full((*seconds.shape, 3), EMPTY)
    _evaluate_all(data, state, log, SmoothMax(1.0, 0), seconds, best_move)
    return MoveTable(cost=cost, change=seconds - cost, best_move=best_move, used=state.count_of_node)


@compiled
def _evaluate_all(t, s, log, smooth_max, seconds, best_move):
    """Compute the layer's seconds [nodes + 1, nodes + 1] after the best move from node to node, and that move."""
    num_ranks, num_experts = len(t.node_of_rank), t.demand.shape[1]
    nowhere = len(t.rack_of_node)
    for expert in range(num_experts):
        # Go through its replicas, and a new one, backwards: undoing a loss appends the replica.
        for c in range(s.num_replicas[expert] + t.replicate - 1, -1, -1):
            before = s.ranks_of_expert[expert, c] if c < s.num_replicas[expert] else EMPTY
            source = nowhere if before == EMPTY else t.node_of_rank[before]
            if before != EMPTY and s.count_of_rank[before] <= t.fewest_of_rank[before]:
                continue

            # Try each rank to move it to, and the loss of it.
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
                    best_move[source, target, 0] = expert
                    best_move[source, target, 1], best_move[source, target, 2] = before, after
