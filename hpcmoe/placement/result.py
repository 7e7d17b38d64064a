"""A placement: where every replica of every expert is, who sends it what, what that costs and which resources bind."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.cost import (
    count_replicas,
    layer_seconds,
    make_nearest_shares,
    meets_bound,
    resource_seconds,
    share_nearest,
    tokens_on_experts,
    tokens_on_links,
    tokens_on_ranks,
)
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import list_resources

_BINDING_RATIO = 1 - 1e-9  # a resource this near to the busiest binds too


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStats:
    """The time and the proposals that a search took."""

    seconds: float = 0.0
    num_proposals: int = 0
    cut_short: bool = False  # did the clock end it before its proposals were made?


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The rank of every replica and its shares of tokens; replica slot j is on rank j // slots_per_rank."""

    expert_of_replica: np.ndarray  # [L, S] int64, -1 in an empty slot
    rank_of_replica: np.ndarray  # [S] int64
    replica_count: np.ndarray  # [L, E] int64
    node_of_rank: np.ndarray  # [P] int64
    distance: np.ndarray  # [nodes, nodes] int64: 0 the same node, 1 the same rack, 2 farther
    split: np.ndarray | None = None  # [L, nodes, S] of a node's tokens for the slot's expert; None: nearest first
    objective: str  # links, ports or step
    objective_seconds: float  # sum over layers of the busiest resource's seconds, one way
    lower_bound_seconds: float  # no placement costs less
    cross_node_share: float  # of all assignments
    link_sigma: float  # std / mean of tokens per link between nodes, all layers together
    method: str  # packed, contiguous or eplb
    search_stats: SearchStats

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks, P."""
        return len(self.node_of_rank)

    @property
    def slots_per_rank(self) -> int:
        """Return the number of replica slots on each rank, s."""
        return len(self.rank_of_replica) // self.num_ranks

    @property
    def is_optimal(self) -> bool:
        """Return True if no placement costs less."""
        return meets_bound(self.objective_seconds, self.lower_bound_seconds)

    def experts_of_rank(self, layer: int, rank: int) -> np.ndarray:
        """Return the experts in a rank's slots -> [s] int64, -1 where empty."""
        return self.expert_of_replica[layer].reshape(self.num_ranks, -1)[rank]

    def shares_of_node(self, layer: int, node: int) -> np.ndarray:
        """Return each slot's share of a node's tokens for its expert -> [S]; sums to 1 over an expert's slots."""
        if self.split is not None:
            return self.split[layer, node]
        distance = self.distance[node, self.node_of_rank[self.rank_of_replica]]  # [S]
        return share_nearest(distance[None], self.expert_of_replica[layer])[0]


def evaluate(
    problem: PlacementProblem,
    expert_of_replica: np.ndarray,
    bounds: list[float],
    method: str,
    search_stats: SearchStats,
    split: np.ndarray | None = None,
) -> Placement:
    """Compute what a layout [L, S] costs -> Placement; bounds [L] are seconds below which no layer can come."""
    # Sum the traffic of all layers.
    layers = list_layers(problem, expert_of_replica, split)
    tokens = np.sum([tokens_on_links(problem, *layer) for layer in layers], axis=0)  # [nodes, nodes]
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
        objective_seconds=float(sum(layer_seconds(problem, *layer) for layer in layers)),
        lower_bound_seconds=float(sum(bounds)),
        cross_node_share=float(crossing.sum() / tokens.sum()) if tokens.any() else 0.0,
        link_sigma=float(crossing.std() / crossing.mean()) if crossing.any() else 0.0,
        method=method,
        search_stats=search_stats,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The traffic and the work of one placement in a step, one way."""

    seconds: dict[str, np.ndarray]  # [L, ...] by kind of resource that the objective counts, as traffic_seconds has it
    tokens: np.ndarray  # [L, nodes, nodes] from node to node; those that stay are on the diagonal
    served: np.ndarray  # [L, P] tokens that each rank's replicas compute on
    replicas: np.ndarray  # [L, nodes, E]
    tokens_of_expert: np.ndarray  # [L, nodes, E] that these replicas serve together

    @property
    def layer_seconds(self) -> np.ndarray:
        """Return each layer's cost, its busiest resource -> seconds [L]."""
        return np.max([busy.reshape(len(busy), -1).max(axis=1, initial=0.0) for busy in self.seconds.values()], axis=0)

    def list_binding(self, layer: int) -> list[tuple[str, tuple[int, ...]]]:
        """List the resources as busy as a layer's busiest, as (kind, index); none in an idle layer."""
        longest = self.layer_seconds[layer]
        busy = [(name, np.argwhere(array[layer] >= longest * _BINDING_RATIO)) for name, array in self.seconds.items()]
        return [(name, tuple(index.tolist())) for name, rows in busy for index in rows] if longest > 0 else []


def compute_usage(problem: PlacementProblem, placement: Placement) -> Usage:
    """Compute what a placement asks of every resource."""
    layers = list_layers(problem, placement.expert_of_replica, placement.split)
    seconds = [resource_seconds(problem, *layer) for layer in layers]
    return Usage(
        seconds={name: np.stack([of[name] for of in seconds]) for name in list_resources(problem.objective)},
        tokens=np.stack([tokens_on_links(problem, *layer) for layer in layers]),
        served=np.stack([tokens_on_ranks(problem, *layer) for layer in layers]),
        replicas=np.stack([count_replicas(problem, experts) for experts in placement.expert_of_replica]),
        tokens_of_expert=np.stack([tokens_on_experts(problem, *layer) for layer in layers]),
    )


def list_layers(
    problem: PlacementProblem, expert_of_replica: np.ndarray, split: np.ndarray | None
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """List each layer's number, experts [S] and shares [nodes, S]: those of split, else the nearest."""
    shares = [make_nearest_shares(problem, experts) for experts in expert_of_replica] if split is None else split
    return list(zip(range(problem.num_layers), expert_of_replica, shares, strict=True))
