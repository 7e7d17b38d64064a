"""The data that a search of one layer looks up, the state that it changes, and the log by which it undoes changes."""

from typing import Any, NamedTuple

import numpy as np

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import Limits
from hpcmoe.placement.resources import RESOURCES, count_resources, list_resources, token_seconds

EMPTY: Any = np.int64(-1)  # an empty slot, or no rank; not a literal, for which numba would compile anew


class LayerData(NamedTuple):
    """The data that a layer's search looks up. Costs are seconds a token, 0 where they do not count."""

    demand: np.ndarray  # [nodes, E] tokens
    tokens: np.ndarray  # [E], of all nodes
    link_cost: np.ndarray  # [nodes, nodes]
    link_latency: np.ndarray  # [nodes * nodes] seconds of a link in use
    egress_cost: np.ndarray  # [nodes]
    ingress_cost: np.ndarray  # [nodes]
    uplink_cost: np.ndarray  # [racks], each way
    rank_cost: float
    first_egress: int  # the number of the first port out among all resources, and so on
    first_ingress: int
    first_uplink: int  # out, followed by uplinks in
    first_rank: int
    node_of_rank: np.ndarray  # [P]
    rack_of_node: np.ndarray  # [nodes]
    rank_by_node: np.ndarray  # [P], the ranks node after node
    first_of_node: np.ndarray  # [nodes + 1], where each node's begin
    fewest_of_rank: np.ndarray  # [P] experts
    most_of_rank: np.ndarray  # [P] experts
    most_of_node: np.ndarray  # [nodes] replicas
    replicate: bool
    already_held: np.ndarray  # [P, E] bool, who holds what already; used where moves are limited
    most_moves: int  # replicas that may be where they were not; EMPTY: any number


class LayerState(NamedTuple):
    """The ranks of all replicas and the seconds of every resource, in the order of RESOURCES; changed in place."""

    expert_at: np.ndarray  # [P, s], EMPTY where empty
    count_of_rank: np.ndarray  # [P]
    count_of_node: np.ndarray  # [nodes]
    replicas: np.ndarray  # [nodes, E]
    replicas_in_rack: np.ndarray  # [racks, E]
    num_replicas: np.ndarray  # [E]
    ranks_of_expert: np.ndarray  # [E, P + 1]
    busy: np.ndarray  # [resources] seconds without latency
    power: np.ndarray  # [resources] (seconds / scale) ** (2 ** doublings)
    stamp: np.ndarray  # [resources] the move that touched it last
    num_moved: np.ndarray  # [1] replicas on ranks that did not hold them, where moves are limited


class UndoLog(NamedTuple):
    """The resources that one move has touched, as they were before, and work space."""

    resource: np.ndarray  # [resources]
    busy: np.ndarray  # [resources]
    power: np.ndarray  # [resources]
    counts: np.ndarray  # [2]: resources touched, moves made
    at: np.ndarray  # [contributions] the resource of each
    by: np.ndarray  # [contributions] its seconds
    served: np.ndarray  # [P + 1] tokens that each replica serves
    entered: np.ndarray  # [P + 1] those from other nodes
    crossed: np.ndarray  # [2, racks] those that leave and enter each rack


class SmoothMax(NamedTuple):
    """The conversion of seconds to powers, whose sum is a smooth maximum."""

    scale: float  # seconds that count as 1
    doublings: int  # the exponent is 2 to this


def make_layer_data(problem: PlacementProblem, layer: int, limits: Limits) -> LayerData:
    """Build the data that a layer's search looks up."""
    # Take prices and numbers from the definition of resources.
    names, sizes = list_resources(problem.objective), count_resources(problem)
    cost = {name: np.ascontiguousarray(price * (name in names)) for name, price in token_seconds(problem).items()}
    first = dict(zip(RESOURCES, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    fewest_of_rank, most_of_rank, most_of_node = (np.asarray(limit, np.int64) for limit in limits)
    demand = np.ascontiguousarray(problem.demand(layer), np.float64)
    return LayerData(
        demand=demand,
        tokens=demand.sum(axis=0),
        link_cost=cost["link"],
        link_latency=np.ascontiguousarray(problem.link_latency, np.float64).ravel(),
        egress_cost=cost["egress"],
        ingress_cost=cost["ingress"],
        uplink_cost=cost["uplink_out"],
        rank_cost=float(problem.seconds_per_token) * ("rank" in names),
        first_egress=first["egress"],
        first_ingress=first["ingress"],
        first_uplink=first["uplink_out"],
        first_rank=first["rank"],
        node_of_rank=np.ascontiguousarray(problem.node_of_rank, np.int64),
        rack_of_node=np.ascontiguousarray(problem.rack_of_node, np.int64),
        rank_by_node=np.argsort(problem.node_of_rank, kind="stable"),
        first_of_node=np.concatenate([[0], np.cumsum(problem.ranks_of_node)]),
        fewest_of_rank=fewest_of_rank,
        most_of_rank=most_of_rank,
        most_of_node=most_of_node,
        replicate=bool(problem.replicate),
        already_held=np.zeros((0, 0), bool),
        most_moves=EMPTY,
    )


def make_state(data: LayerData, expert_at: np.ndarray) -> tuple[LayerState, UndoLog]:
    """Allocate the state and the log of a layout with experts at [P, s]; moves.rebuild fills them."""
    (num_nodes, num_experts), num_ranks = data.demand.shape, len(data.node_of_rank)
    num_racks, num_resources = len(data.uplink_cost), data.first_rank + num_ranks
    most_contributions = num_nodes * (num_ranks + 2) + 2 * (num_ranks + num_racks + 1)
    state = LayerState(
        expert_at=np.array(expert_at, np.int64),
        count_of_rank=np.zeros(num_ranks, np.int64),
        count_of_node=np.zeros(num_nodes, np.int64),
        replicas=np.zeros((num_nodes, num_experts), np.int64),
        replicas_in_rack=np.zeros((num_racks, num_experts), np.int64),
        num_replicas=np.zeros(num_experts, np.int64),
        ranks_of_expert=np.zeros((num_experts, num_ranks + 1), np.int64),
        busy=np.zeros(num_resources),
        power=np.zeros(num_resources),
        stamp=np.zeros(num_resources, np.int64),
        num_moved=np.zeros(1, np.int64),
    )
    log = UndoLog(
        resource=np.zeros(num_resources, np.int64),
        busy=np.zeros(num_resources),
        power=np.zeros(num_resources),
        counts=np.zeros(2, np.int64),
        at=np.zeros(most_contributions, np.int64),
        by=np.zeros(most_contributions),
        served=np.zeros(num_ranks + 1),
        entered=np.zeros(num_ranks + 1),
        crossed=np.zeros((2, num_racks)),
    )
    return state, log
