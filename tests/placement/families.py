"""Cases to place: every family of the placement engine's table, at three sizes, as many as there are seeds."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.placement.problem import PlacementProblem

SIZES = {"16 x 16": (16, 8), "64 x 64": (64, 8), "256 x 1024": (1024, 128)}  # (ranks, nodes)
TOKEN_COPIES = 4096 * 2  # tokens of a rank, top-2
BYTES_PER_TOKEN = 8192  # 4096 numbers of two bytes
EXPERT_BYTES = 3 * 4096 * 14336 * 2
SECONDS_PER_TOKEN = 6 * 4096 * 14336 / 4e14
NIC = 25e9  # bytes a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The properties of one family of cases."""

    num_experts: tuple[int, int, int]  # at each size
    spare_slots: int = 0  # of a rank, beyond those that hold every expert once
    replicate: bool = False
    num_racks: int = 1
    rack_share: float = 0.5  # of its nodes' ports together, that a rack's uplink carries
    slow_rack: bool = False  # the last rack's links at a third of the others'
    uneven: bool = False  # the links differ by up to four times
    by_node: bool = False  # tokens prefer experts by node
    tight: bool = False  # memory for hardly more than every expert once


FAMILIES = {
    "slow rack": Family(num_experts=(16, 64, 256), num_racks=2, slow_rack=True),
    "uneven links": Family(num_experts=(16, 64, 256), uneven=True),
    "tokens prefer experts by node": Family(num_experts=(16, 64, 256), by_node=True),
    "memory tight, E = 12": Family(num_experts=(12, 48, 192), replicate=True, by_node=True, tight=True),
    "E = 64 no spare slot": Family(num_experts=(64, 256, 1024), uneven=True),
    "E = 64 one spare slot a GPU": Family(num_experts=(64, 256, 1024), spare_slots=1, replicate=True),
    "E = 8 spare GPUs, preference by node": Family(num_experts=(8, 32, 256), replicate=True, by_node=True),
    "all of it together, 32 experts": Family(
        num_experts=(32, 128, 256),
        spare_slots=1,
        replicate=True,
        num_racks=4,
        slow_rack=True,
        uneven=True,
        by_node=True,
        tight=True,
    ),
}


def make_family(name, size, seed, objective):
    """Make one case of a family: its name, a size of SIZES, a seed, "links", "ports" or "step" -> PlacementProblem."""
    family, (num_ranks, num_nodes) = FAMILIES[name], SIZES[size]
    num_experts = family.num_experts[list(SIZES).index(size)]
    rng = np.random.default_rng([seed, list(FAMILIES).index(name), num_ranks])
    num_layers = 1 + seed % 4
    rack_of_node = np.arange(num_nodes) * family.num_racks // num_nodes
    slots_per_rank = -(-num_experts // num_ranks) + family.spare_slots
    return PlacementProblem(
        num_layers=num_layers,
        num_experts=num_experts,
        slots_per_rank=slots_per_rank,
        replicate=family.replicate,
        node_of_rank=np.repeat(np.arange(num_nodes), num_ranks // num_nodes),
        rack_of_node=rack_of_node,
        memory_bytes=make_memory(rng, family, num_nodes, num_ranks * slots_per_rank, num_layers, num_experts),
        expert_bytes=EXPERT_BYTES,
        bytes_per_token=BYTES_PER_TOKEN * int(rng.integers(1, 3)),
        seconds_per_token=SECONDS_PER_TOKEN,
        tokens_of_rank=np.full(num_ranks, TOKEN_COPIES),
        probability=make_probability(rng, family, num_layers, num_nodes, num_experts),
        objective=objective,
        node_names=tuple(f"node{node}" for node in range(num_nodes)),
        **make_network(rng, family, rack_of_node),
    )


def make_network(rng, family, rack_of_node):
    """Draw links, latencies, ports and uplinks -> dict of PlacementProblem's fields."""
    num_nodes = len(rack_of_node)
    other_rack = rack_of_node[:, None] != rack_of_node
    port = NIC * (rng.uniform(0.5, 2.0, num_nodes) if family.uneven else np.ones(num_nodes))
    if family.slow_rack:
        port[rack_of_node == rack_of_node[-1]] /= 3

    # A link is as fast as the slower of its ports, less in between racks, and by chance.
    link = np.minimum(port[:, None], port) * np.where(other_rack, 0.5, 1.0)
    if family.uneven:
        link = link * rng.uniform(0.5, 1.0, link.shape)
    np.fill_diagonal(link, 10 * NIC)
    uplink = np.bincount(rack_of_node, port) * family.rack_share
    return {
        "bytes_per_second": link,
        "latency_seconds": np.where(other_rack, 5e-6, 2e-6) * (1 - np.eye(num_nodes)),
        "egress_bytes_per_second": port,
        "ingress_bytes_per_second": port,
        "uplink_bytes_per_second": uplink if family.num_racks > 1 else np.full(1, np.inf),
    }


def make_memory(rng, family, num_nodes, num_slots, num_layers, num_experts):
    """Draw each node's memory: room for all its slots, or tight and uneven -> [nodes] int64 bytes."""
    node_of_slot = np.repeat(np.arange(num_nodes), num_slots // num_nodes)
    if not family.tight:
        return np.bincount(node_of_slot) * num_layers * EXPERT_BYTES

    # Every layer's experts and a sixteenth more, by chance on the nodes; what is left over no layer alone can use.
    kept = rng.permutation(node_of_slot)[: num_experts + num_experts // 16]
    room = np.bincount(kept, minlength=num_nodes) * num_layers + rng.integers(0, num_layers, num_nodes)
    return room * EXPERT_BYTES


def make_probability(rng, family, num_layers, num_nodes, num_experts):
    """Draw each layer's routing probabilities, Zipf-like or Dirichlet, mixed of domains -> [L, nodes, E]."""
    num_domains = 4 if family.by_node else 1
    weight = rng.dirichlet(np.full(num_domains, 0.5), num_nodes)  # [nodes, domains]
    zipf = np.arange(1, num_experts + 1) ** -rng.uniform(0.5, 0.9, (num_layers, num_domains, 1))
    zipf = rng.permuted(zipf, axis=2)
    drawn = rng.dirichlet(np.full(num_experts, 1.5), (num_layers, num_domains))
    of_domain = np.where(np.arange(num_layers)[:, None, None] % 2 == 0, zipf, drawn)
    of_domain = of_domain / of_domain.sum(axis=2, keepdims=True)
    return np.einsum("nd,lde->lne", weight, of_domain)
