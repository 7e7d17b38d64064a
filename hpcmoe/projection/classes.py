"""Ranks that do the same as one class: who sends whom how many rows, over which ports, links and uplinks.

Few ranks are a class each. Of many, those of one kind of nodes are a class that stands for their mean, and the busiest
rank is one of its own, so that thousands cost no more than a few.
"""

from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.topology import Topology
from hpcmoe.projection.flows import Fabric

EACH_RANK = 8  # ranks up to which each is a class
_COPIES = 3  # classes of a kind of nodes, for rows come in pieces, and experts begin with the first


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClasses:
    """Classes of ranks, and what goes from one to another in each layer. C classes, L layers."""

    ranks: np.ndarray  # [C] how many
    node: np.ndarray  # [C] of the first of them
    served: np.ndarray  # [L, C] rows that a rank's experts get of a micro-batch
    near: np.ndarray  # [L, C, C] rows that a rank there gets from ranks here on its node
    far: np.ndarray  # [L, C, C] rows from all ranks here to all there, on other nodes
    crossing: np.ndarray  # [C, C] part of the far rows that leaves its rack


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedRanks:
    """The ranks of a shape, in groups that hold the network once."""

    node_of_rank: np.ndarray  # [P]
    of_group: int  # ranks, expert- and tensor-parallel

    @property
    def group_of_rank(self) -> np.ndarray:
        """Return the number of each rank's group -> [P]."""
        return np.arange(len(self.node_of_rank)) // self.of_group


def class_each(grouped: GroupedRanks, topology: Topology, shares: np.ndarray, rows: float) -> RankClasses:
    """Make each rank a class; shares [L, nodes or 1, ranks of a group] by the tokens' home, rows that a rank sends."""
    node, group = grouped.node_of_rank, grouped.group_of_rank
    homes = node if shares.shape[1] > 1 else np.zeros(len(node), np.int64)
    sent = rows * shares[:, homes][:, :, np.arange(len(node)) % grouped.of_group]
    sent = sent * np.equal.outer(group, group)
    same = np.equal.outer(node, node)
    racks = topology.rack_of_node[node]
    return RankClasses(
        ranks=np.ones(len(node)),
        node=node,
        served=sent.sum(axis=1),
        near=sent * same,
        far=sent * ~same,
        crossing=np.not_equal.outer(racks, racks).astype(np.float64),
    )


def class_kinds(
    grouped: GroupedRanks, topology: Topology, shares: np.ndarray, rows: float, kind_of_node: np.ndarray
) -> RankClasses:
    """Make the ranks of each kind of node a class, and the busiest rank one of its own.

    shares [L, ranks of a group]; kind_of_node [nodes].
    """
    node, size = grouped.node_of_rank, grouped.of_group
    kinds, first, counts = np.unique(kind_of_node[node], return_index=True, return_counts=True)
    kinds, first, counts = (np.repeat(of_kind, _COPIES) for of_kind in (kinds, first, counts / _COPIES))
    most = int(counts.argmax())
    ranks, of_node = np.append(counts, 1.0), np.append(node[first], node[first[most]])
    ranks[:-1][kinds == kinds[most]] -= 1 / _COPIES

    # Where the others of a rank's group lie: on its node, in its rack, beyond.
    begin = np.append(first, first[most]) // size * size
    members = [node[at : at + size] for at in begin]
    here = np.array([np.mean(of_group == own) for of_group, own in zip(members, of_node, strict=True)])
    racks = topology.rack_of_node
    beyond = np.array([np.mean(racks[of_group] != racks[own]) for of_group, own in zip(members, of_node, strict=True)])

    # The busiest has the largest share, the others the mean of what is left.
    busiest = shares.max(axis=1)  # [L]
    rest = (1 - busiest) / max(size - 1, 1)
    served = np.stack([*[rest] * len(kinds), busiest], axis=1) * rows * size
    total = rows * ranks[None, :, None] * (served / (rows * size))[:, None, :] * ranks[None, None, :] * size / len(node)
    near_part = np.broadcast_to(here[None, :], (len(ranks), len(ranks)))
    return RankClasses(
        ranks=ranks,
        node=of_node,
        served=served,
        near=total * near_part / ranks,
        far=total * (1 - near_part),
        crossing=np.broadcast_to((beyond / np.maximum(1 - here, 1e-12))[None, :], near_part.shape),
    )


@dataclass(slots=True)
class _Resources:
    """Resources as they are met, each with its number, name and rate."""

    names: list[str]
    rates: list[float]
    number: dict[tuple, int]

    def use(self, key: tuple, name: str, rate: float) -> int:
        """Return the number of a resource."""
        if key not in self.number:
            self.number[key] = len(self.names)
            self.names.append(name)
            self.rates.append(float(rate))
        return self.number[key]


def make_fabric(
    classes: RankClasses, topology: Topology, kind_of_node: np.ndarray, node_of_rank: np.ndarray, pairs: bool
) -> Fabric:
    """Make the fabric on which the classes' rows flow; pairs: each rank is a class, links between nodes limit too."""
    met, uses, latency = _Resources([], [], {}), {}, {}
    ports = {"out": topology.egress_bytes_per_second, "in": topology.ingress_bytes_per_second}
    num_racks = len(np.unique(topology.rack_of_node[np.unique(node_of_rank)]))
    parts = port_parts(classes, kind_of_node, node_of_rank)
    for own, peer in np.argwhere(classes.far.any(axis=0)).tolist():
        ends = {"out": own, "in": peer}
        taken = []
        for way, rates in ports.items():
            held = {(0, int(classes.node[ends[way]])): 1.0} if pairs else parts[ends[way]]
            taken += [(met.use((way, *key), "port", rates[key[1]]), part) for key, part in held.items()]
        sender, receiver = int(classes.node[own]), int(classes.node[peer])
        if pairs:
            link = topology.bytes_per_second[sender, receiver]
            taken.append((met.use(("link", sender, receiver), "link", link), 1.0))
        crossing = float(classes.crossing[own, peer])
        if crossing and num_racks > 1:
            for way, node in (("up", sender), ("down", receiver)):
                rack = int(topology.rack_of_node[node])
                key = met.use((way, rack), "uplink", topology.uplink_bytes_per_second[rack])
                taken.append((key, crossing if pairs else crossing / num_racks))
        uses[own, peer] = [(resource, part) for resource, part in taken if np.isfinite(met.rates[resource])]
        latency[own, peer] = find_latency(topology, sender, receiver, crossing)
    return Fabric(names=met.names, rates=met.rates, uses=uses, latency=latency)


def port_parts(
    classes: RankClasses, kind_of_node: np.ndarray, node_of_rank: np.ndarray
) -> list[dict[tuple[int, int], float]]:
    """Return what part of a class's bytes passes the port of a mean node, and of the busiest: (0 or 1, node).

    The busiest rank, the last class, shares its node with others of the class that is on that kind of nodes.
    """
    nodes = np.bincount(kind_of_node[np.unique(node_of_rank)], minlength=int(kind_of_node.max()) + 1)
    last = len(classes.ranks) - 1
    shared = int(classes.node[last])
    of_node = float(np.bincount(node_of_rank)[shared])
    found = []
    for own, node in enumerate(classes.node.tolist()):
        if own == last:
            found.append({(1, shared): 1.0})
            continue
        parts = {(0, node): 1.0 / float(nodes[kind_of_node[node]])}
        if kind_of_node[node] == kind_of_node[shared] and of_node > 1:
            parts[1, shared] = (of_node - 1) / float(classes.ranks[:-1][classes.node[:-1] == node].sum())
        found.append(parts)
    return found


def find_latency(topology: Topology, sender: int, receiver: int, crossing: float) -> float:
    """Return the latency between two nodes; of classes on one node the usual one of its links."""
    if sender != receiver:
        return float(topology.latency_seconds[sender, receiver])
    others = np.delete(topology.latency_seconds[sender], sender)
    return float(np.max(others) if crossing > 0 else np.min(others)) if len(others) else 0.0
