"""What a layout of one layer costs: tokens to the nearest replicas, and the seconds of the busiest resource.

The reference: plain array arithmetic from the definitions, against which the compiled search is held.
"""

import numpy as np

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import list_resources, traffic_seconds

_BOUND_TOLERANCE = 1e-5  # a layout this near to its bound is optimal, as far as solvers can tell


def count_replicas(problem: PlacementProblem, expert_of_replica: np.ndarray) -> np.ndarray:
    """Count the replicas of each expert on each node: slots [S] -> [nodes, E] int64."""
    used = np.flatnonzero(expert_of_replica >= 0)
    replicas = np.zeros((problem.num_nodes, problem.num_experts), np.int64)
    np.add.at(replicas, (problem.node_of_slot[used], expert_of_replica[used]), 1)
    return replicas


def make_nearest_shares(problem: PlacementProblem, expert_of_replica: np.ndarray) -> np.ndarray:
    """Share each node's tokens evenly over the replicas of the nearest tier: [S] -> shares [nodes, S]."""
    return share_nearest(problem.distance[:, problem.node_of_slot], expert_of_replica)


def share_nearest(distance: np.ndarray, expert_of_replica: np.ndarray) -> np.ndarray:
    """Share evenly over each expert's nearest slots: distance [n, S] of n senders, [S] -> shares [n, S]."""
    # Group the slots by expert.
    used = np.flatnonzero(expert_of_replica >= 0)
    order = used[np.argsort(expert_of_replica[used], kind="stable")]
    first = np.unique(expert_of_replica[order], return_index=True)[1]
    size = np.diff(np.append(first, len(order)))

    # Choose the nearest of each group, and count them.
    near = distance[:, order] == np.repeat(np.minimum.reduceat(distance[:, order], first, axis=1), size, axis=1)
    count = np.add.reduceat(near, first, axis=1, dtype=np.int64)
    share = np.zeros(distance.shape)
    share[:, order] = near / np.repeat(count, size, axis=1)
    return share


def tokens_on_links(
    problem: PlacementProblem, layer: int, expert_of_replica: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Count the tokens from each node to each, those that stay on the diagonal: [S], [nodes, S] -> [nodes, nodes]."""
    tokens = problem.demand(layer)[:, expert_of_replica] * share  # [nodes, S]; an empty slot has no share
    order = np.argsort(problem.node_of_slot, kind="stable")
    nodes, first = np.unique(problem.node_of_slot[order], return_index=True)  # a node may be without ranks
    sent = np.zeros((len(tokens), problem.num_nodes))
    sent[:, nodes] = np.add.reduceat(tokens[:, order], first, axis=1)
    return sent


def tokens_on_ranks(
    problem: PlacementProblem, layer: int, expert_of_replica: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Count the tokens that each rank's replicas serve: [S], [nodes, S] -> [P]."""
    served = (problem.demand(layer)[:, expert_of_replica] * share).sum(axis=0)
    return served.reshape(-1, problem.slots_per_rank).sum(axis=1)


def tokens_on_experts(
    problem: PlacementProblem, layer: int, expert_of_replica: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Count the tokens that a node's replicas of each expert serve: [S], [nodes, S] -> [nodes, E]."""
    served = (problem.demand(layer)[:, expert_of_replica] * share).sum(axis=0)
    tokens = np.zeros((problem.num_nodes, problem.num_experts))
    np.add.at(tokens, (problem.node_of_slot, expert_of_replica), served)
    return tokens


def resource_seconds(
    problem: PlacementProblem, layer: int, expert_of_replica: np.ndarray, share: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Compute how long each resource is busy with a layer [S] by shares [nodes, S], nearest ones if None.

    Shapes as traffic_seconds returns them.
    """
    share = make_nearest_shares(problem, expert_of_replica) if share is None else share
    sent = tokens_on_links(problem, layer, expert_of_replica, share)
    return traffic_seconds(problem, sent, tokens_on_ranks(problem, layer, expert_of_replica, share))


def layer_seconds(
    problem: PlacementProblem, layer: int, expert_of_replica: np.ndarray, share: np.ndarray | None = None
) -> float:
    """Compute a layer's cost: the seconds of the busiest resource that the objective counts."""
    seconds = resource_seconds(problem, layer, expert_of_replica, share)
    return max(float(seconds[name].max(initial=0.0)) for name in list_resources(problem.objective))


def meets_bound(cost: float, bound: float) -> bool:
    """Return True if a cost meets its bound, both in seconds."""
    return bool(bound >= cost * (1 - _BOUND_TOLERANCE))
