"""What a placement asks of each link, port, uplink and rank, layer by layer, and which of them binds."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.cost import (
    count_replicas,
    list_resources,
    make_nearest_shares,
    resource_seconds,
    tokens_on_links,
    tokens_on_ranks,
)

_BINDING_RATIO = 1 - 1e-9  # a resource this near to the busiest binds too


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one placement makes the cluster do in a step, one way."""

    seconds: dict  # of each resource that the objective counts: its name -> [L, ...], as resource_seconds shapes it
    tokens: np.ndarray  # [L, nodes, nodes] from node to node; those that stay are on the diagonal
    served: np.ndarray  # [L, P] tokens that each rank's replicas compute on
    replicas: np.ndarray  # [L, nodes, E] replicas
    tokens_of_expert: np.ndarray  # [L, nodes, E] that these replicas serve together

    @property
    def layer_seconds(self):
        """Find what each layer costs: its busiest resource -> seconds [L]."""
        return np.max([of_layers(array).max(axis=1, initial=0.0) for array in self.seconds.values()], axis=0)

    def list_binding(self, layer):
        """List the resources as busy as a layer's busiest -> list of (name, index); none in an idle layer."""
        longest = self.layer_seconds[layer]
        busy = [(name, np.argwhere(array[layer] >= longest * _BINDING_RATIO)) for name, array in self.seconds.items()]
        return [(name, tuple(index.tolist())) for name, rows in busy for index in rows] if longest > 0 else []


def of_layers(array):
    """Flatten an array of resources [L, ...] -> [L, n]."""
    return array.reshape(len(array), -1)


def compute_usage(problem, placement):
    """Compute what a placement asks of every resource -> Usage."""
    seconds, tokens, served, replicas, tokens_of_expert = [], [], [], [], []
    for layer, expert_of_replica in enumerate(placement.expert_of_replica):
        share = make_nearest_shares(problem, expert_of_replica) if placement.split is None else placement.split[layer]
        seconds.append(resource_seconds(problem, layer, expert_of_replica, share))
        tokens.append(tokens_on_links(problem, layer, expert_of_replica, share))
        served.append(tokens_on_ranks(problem, layer, expert_of_replica, share))
        replicas.append(count_replicas(problem, expert_of_replica))
        tokens_of_expert.append(tokens_on_experts(problem, layer, expert_of_replica, share))
    return Usage(
        seconds={name: np.stack([of[name] for of in seconds]) for name in list_resources(problem.objective)},
        tokens=np.stack(tokens),
        served=np.stack(served),
        replicas=np.stack(replicas),
        tokens_of_expert=np.stack(tokens_of_expert),
    )


def tokens_on_experts(problem, layer, expert_of_replica, share):
    """Count the tokens that a node's replicas of each expert serve: [S], [nodes, S] -> [nodes, E]."""
    served = (problem.demand(layer)[:, expert_of_replica] * share).sum(axis=0)  # [S], an empty slot has no share
    tokens = np.zeros((problem.num_nodes, problem.num_experts))
    np.add.at(tokens, (problem.node_of_slot, expert_of_replica), served)
    return tokens


def name_resource(problem, name, index):
    """Name a resource for people: `n0 -> n3`, `n3 sends`, `rack 0 receives`, `rank 5 on n1`."""
    first = index[0]
    match name:
        case "link":
            return f"{problem.node_names[first]} -> {problem.node_names[index[1]]}"
        case "egress":
            return f"{problem.node_names[first]} sends"
        case "ingress":
            return f"{problem.node_names[first]} receives"
        case "uplink_out":
            return f"rack {first} sends"
        case "uplink_in":
            return f"rack {first} receives"
        case "rank":
            return f"rank {first} on {problem.node_names[problem.node_of_rank[first]]}"
        case _:
            raise ValueError(name)
