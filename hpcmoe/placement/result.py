"""A placement: where every replica of every expert is, who sends it what, and what that costs."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.cost import layer_seconds, make_nearest_shares, meets_bound, tokens_on_links


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStats:
    """What a search took."""

    seconds: float = 0.0
    num_proposals: int = 0
    cut_short: bool = False  # did the clock end it before its proposals were made?


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where every replica is and who sends it what; replica slot j is on rank j // slots_per_rank."""

    expert_of_replica: np.ndarray  # [L, S] int64, -1 in an empty slot
    rank_of_replica: np.ndarray  # [S] int64
    replica_count: np.ndarray  # [L, E] int64
    node_of_rank: np.ndarray  # [P] int64
    distance: np.ndarray  # [nodes, nodes] int64: 0 the same node, 1 the same rack, 2 farther
    split: np.ndarray | None = (
        None  # [L, nodes, S] shares of a node's tokens for the slot's expert; None: nearest first
    )
    objective: str  # links, ports or step
    objective_seconds: float  # sum over layers of the busiest resource's seconds, one way
    lower_bound_seconds: float  # no placement costs less
    cross_node_share: float  # of all assignments
    link_sigma: float  # std / mean of tokens per link between nodes, all layers together
    method: str  # packed, contiguous or eplb
    search_stats: SearchStats

    @property
    def num_ranks(self):
        """Number of ranks, P."""
        return len(self.node_of_rank)

    @property
    def slots_per_rank(self):
        """Number of replica slots on each rank, s."""
        return len(self.rank_of_replica) // self.num_ranks

    @property
    def is_optimal(self):
        """Whether no placement costs less."""
        return meets_bound(self.objective_seconds, self.lower_bound_seconds)

    def experts_of_rank(self, layer, rank):
        """Find what is in a rank's slots -> [s] int64, -1 where empty."""
        return self.expert_of_replica[layer].reshape(self.num_ranks, -1)[rank]

    def shares_of_node(self, layer, node):
        """Find how a node's tokens for each slot's expert are shared out -> [S]; sums to 1 over an expert's slots."""
        if self.split is not None:
            return self.split[layer, node]
        experts = self.expert_of_replica[layer]
        used = np.flatnonzero(experts >= 0)
        distance = self.distance[node, self.node_of_rank[self.rank_of_replica[used]]]
        nearest = np.full(self.replica_count.shape[1], len(self.distance))
        np.minimum.at(nearest, experts[used], distance)
        chosen = used[distance == nearest[experts[used]]]
        share = np.zeros(len(experts))
        share[chosen] = 1 / np.bincount(experts[chosen], minlength=len(nearest))[experts[chosen]]
        return share


def evaluate(problem, expert_of_replica, bounds, method, search_stats, split=None):
    """Find what a layout [L, S] costs -> Placement; bounds [L] are seconds below which no layer can come."""
    layers = range(problem.num_layers)
    shares = [make_nearest_shares(problem, experts) for experts in expert_of_replica] if split is None else split
    tokens = sum(tokens_on_links(problem, layer, expert_of_replica[layer], shares[layer]) for layer in layers)
    crossing = tokens[~np.eye(len(tokens), dtype=bool)]
    return Placement(
        expert_of_replica=expert_of_replica,
        rank_of_replica=np.repeat(np.arange(problem.num_ranks), problem.slots_per_rank),
        replica_count=np.stack(
            [np.bincount(row[row >= 0], minlength=problem.num_experts) for row in expert_of_replica]
        ),
        node_of_rank=problem.node_of_rank,
        distance=problem.distance,
        split=split,
        objective=problem.objective,
        objective_seconds=sum(
            layer_seconds(problem, layer, expert_of_replica[layer], shares[layer]) for layer in layers
        ),
        lower_bound_seconds=float(sum(bounds)),
        cross_node_share=float(crossing.sum() / tokens.sum()) if tokens.any() else 0.0,
        link_sigma=float(crossing.std() / crossing.mean()) if crossing.any() else 0.0,
        method=method,
        search_stats=search_stats,
    )
