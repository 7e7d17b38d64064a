"""The expert-parallel groups of a run folded into one: they share a placement, so a link counts as its slowest group's.

Group g's e-th rank holds the same experts as any other group's e-th. Ranks that lie on one node in every group are
together on one node of the placement. A link, port or uplink that groups share is divided by the ranks on it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcmoe.cluster.topology import Topology

if TYPE_CHECKING:
    from hpcmoe.cluster.mesh import Mesh  # which imports MPI

_MOST_NAMES = 3  # of the nodes, one a group, that a name is made of


def list_groups(mesh: "Mesh") -> np.ndarray:
    """List the ranks of every expert-parallel group, in order of their experts -> [groups, P] int64."""
    data, experts, tensor = mesh.data_parallel, mesh.expert_parallel, mesh.tensor_parallel
    return np.arange(data * experts * tensor).reshape(data, experts, tensor).transpose(0, 2, 1).reshape(-1, experts)


def fold_groups(topology: Topology, ranks_of_group: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Fold the nodes of groups [groups, P] together -> (nodes [groups, folded], fields of PlacementProblem)."""
    # Take for one node the ranks that share a node in every group, and so for racks.
    node_of_rank = topology.node_of_rank[ranks_of_group]  # [groups, P], the topology's numbers
    nodes, folded_of_rank = np.unique(node_of_rank, axis=1, return_inverse=True)
    racks, rack_of_node = np.unique(topology.rack_of_node[nodes], axis=1, return_inverse=True)

    # Divide ports and uplinks by the ranks on them.
    num_ranks = np.bincount(folded_of_rank)  # on each folded node, of one group
    part_of_node = num_ranks / np.bincount(topology.node_of_rank)[nodes]  # [groups, folded]
    ranks_of_rack = np.bincount(topology.rack_of_node[topology.node_of_rank])
    part_of_rack = np.bincount(rack_of_node, num_ranks) / ranks_of_rack[racks]  # [groups, folded racks]
    pair = nodes[:, :, None], nodes[:, None, :]
    return nodes, {
        "node_of_rank": folded_of_rank,
        "rack_of_node": rack_of_node,
        "bytes_per_second": (topology.bytes_per_second[pair] * part_of_links(nodes, num_ranks)).min(axis=0),
        "latency_seconds": topology.latency_seconds[pair].max(axis=0),
        "egress_bytes_per_second": (topology.egress_bytes_per_second[nodes] * part_of_node).min(axis=0),
        "ingress_bytes_per_second": (topology.ingress_bytes_per_second[nodes] * part_of_node).min(axis=0),
        "uplink_bytes_per_second": (topology.uplink_bytes_per_second[racks] * part_of_rack).min(axis=0),
        "node_names": tuple(join_names(topology.node_names[node] for node in column) for column in nodes.T),
    }


def part_of_links(nodes: np.ndarray, num_ranks: np.ndarray) -> np.ndarray:
    """Compute the part of a link that two folded nodes have, by pairs of ranks -> [groups, folded, folded]."""
    pairs = np.multiply.outer(num_ranks, num_ranks).astype(np.float64)
    pairs_of_link = np.zeros((nodes.max() + 1,) * 2)
    for of_group in nodes:
        np.add.at(pairs_of_link, (of_group[:, None], of_group), pairs)
    return pairs / pairs_of_link[nodes[:, :, None], nodes[:, None, :]]


def join_names(names: Iterable[str]) -> str:
    """Return a folded node's name, made of those of its nodes in the groups."""
    different = tuple(dict.fromkeys(names))
    return "+".join(different[:_MOST_NAMES]) + "+..." * (len(different) > _MOST_NAMES)


def fold_memory(
    rank_bytes: np.ndarray, ranks_of_group: np.ndarray, node_of_rank: np.ndarray, tensor_parallel: int
) -> np.ndarray:
    """Sum the bytes for experts of each rank [ranks] over folded nodes -> [folded] int64.

    A tensor-parallel group holds an expert together. Of all groups the one with the least memory counts.
    """
    least = rank_bytes[ranks_of_group].min(axis=0) * tensor_parallel  # [P]
    return np.bincount(node_of_rank, least).astype(np.int64)


def fold_probability(probability: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Average the probabilities of the nodes [groups, folded]: [L, nodes, E] -> [L, folded, E]."""
    if len(nodes) == 1:
        return probability[:, nodes[0]]
    return probability[:, nodes].mean(axis=1)
