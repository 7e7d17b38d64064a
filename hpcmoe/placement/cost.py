"""What a layout of one layer costs: tokens to the nearest replicas, seconds on links, ports, uplinks and ranks.

The reference: plain array arithmetic from the definitions, against which the compiled search is held.
"""

import numpy as np

_BOUND_TOLERANCE = 1e-5  # a layout this near to its bound is optimal, as far as solvers can tell


def count_replicas(problem, expert_of_replica):
    """Count the replicas of each expert on each node, for slots [S] -> [nodes, E]."""
    used = np.flatnonzero(expert_of_replica >= 0)
    nodes = problem.node_of_slot[used]
    replicas = np.zeros((problem.num_nodes, problem.num_experts), np.int64)
    np.add.at(replicas, (nodes, expert_of_replica[used]), 1)
    return replicas


def nearest(problem, replicas):
    """Find the nearest tier with a replica, for replicas [nodes, E] -> its distance and its replicas, both [nodes, E]."""
    in_rack = np.zeros((problem.rack_of_node.max() + 1, replicas.shape[1]), replicas.dtype)
    np.add.at(in_rack, problem.rack_of_node, replicas)
    near, everywhere = in_rack[problem.rack_of_node], np.broadcast_to(replicas.sum(axis=0), replicas.shape)
    tier = np.where(replicas > 0, 0, np.where(near > 0, 1, 2))
    return tier, np.choose(tier, (replicas, near, everywhere))


def make_nearest_shares(problem, expert_of_replica):
    """Send each node's tokens to the nearest tier with a replica, evenly over its replicas: [S] -> shares [nodes, S]."""
    used = np.flatnonzero(expert_of_replica >= 0)
    nodes, experts = problem.node_of_slot[used], expert_of_replica[used]
    tier, count = (array[:, experts] for array in nearest(problem, count_replicas(problem, expert_of_replica)))
    share = np.zeros((len(tier), len(expert_of_replica)))
    share[:, used] = (problem.distance[:, nodes] <= tier) / count
    return share


def sum_slots_by_node(problem, tokens):
    """Sum tokens for each slot [nodes, S] over the slots of each node -> [nodes, nodes]."""
    order = np.argsort(problem.node_of_slot, kind="stable")
    nodes, first = np.unique(problem.node_of_slot[order], return_index=True)  # a node may be without ranks
    summed = np.zeros((len(tokens), problem.num_nodes))
    summed[:, nodes] = np.add.reduceat(tokens[:, order], first, axis=1)
    return summed


def tokens_on_links(problem, layer, expert_of_replica, share):
    """Count the tokens from each node to each, those that stay on the diagonal: [S], [nodes, S] -> [nodes, nodes]."""
    return sum_slots_by_node(problem, problem.demand(layer)[:, expert_of_replica] * share)  # an empty slot has no share


def tokens_on_ranks(problem, layer, expert_of_replica, share):
    """Count the tokens that each rank's replicas serve: [S], [nodes, S] -> [P]."""
    served = (problem.demand(layer)[:, expert_of_replica] * share).sum(axis=0)
    return served.reshape(-1, problem.slots_per_rank).sum(axis=1)


def resource_seconds(problem, layer, expert_of_replica, share=None):
    """Find how long each resource is busy with one layer, one way -> dict of arrays, whatever the objective.

    "link" [nodes, nodes], "egress" and "ingress" [nodes], "uplink_out" and "uplink_in" [racks], "rank" [P].
    """
    share = make_nearest_shares(problem, expert_of_replica) if share is None else share
    sent = tokens_on_links(problem, layer, expert_of_replica, share)
    crossing = np.where(np.eye(len(sent)), 0.0, sent) * problem.bytes_per_token
    racks = problem.rack_of_node[:, None] == np.arange(len(problem.uplink_bytes_per_second))
    between = racks.T.astype(np.float64) @ crossing @ racks
    np.fill_diagonal(between, 0.0)
    return {
        "link": sent * problem.link_cost + np.where(crossing > 0, problem.link_latency, 0.0),
        "egress": crossing.sum(axis=1) / problem.egress_bytes_per_second,
        "ingress": crossing.sum(axis=0) / problem.ingress_bytes_per_second,
        "uplink_out": between.sum(axis=1) / problem.uplink_bytes_per_second,
        "uplink_in": between.sum(axis=0) / problem.uplink_bytes_per_second,
        "rank": tokens_on_ranks(problem, layer, expert_of_replica, share) * problem.seconds_per_token,
    }


def list_resources(objective):
    """Name the resources that an objective counts."""
    match objective:
        case "links":
            return ("link",)
        case "ports":
            return ("link", "egress", "ingress", "uplink_out", "uplink_in")
        case "step":
            return ("link", "egress", "ingress", "uplink_out", "uplink_in", "rank")
        case _:
            raise ValueError(objective)


def layer_seconds(problem, layer, expert_of_replica, share=None):
    """Find a layer's cost: the seconds of the busiest resource that the objective counts."""
    seconds = resource_seconds(problem, layer, expert_of_replica, share)
    return max(float(seconds[name].max(initial=0.0)) for name in list_resources(problem.objective))


def merit(problem, layer, expert_of_replica):
    """Rank layouts [S] of a layer, less is better: its cost, then cross-node tokens, then the busiest rank's."""
    share = make_nearest_shares(problem, expert_of_replica)
    sent = tokens_on_links(problem, layer, expert_of_replica, share)
    busiest = tokens_on_ranks(problem, layer, expert_of_replica, share).max()
    figures = (layer_seconds(problem, layer, expert_of_replica, share), sent.sum() - np.trace(sent), busiest)
    return tuple(float(f"{figure:.9g}") for figure in figures)  # rounding noise decides nothing


def meets_bound(cost, bound):
    """Tell whether a cost meets its bound, both in seconds."""
    return bool(bound >= cost * (1 - _BOUND_TOLERANCE))
