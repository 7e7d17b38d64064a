"""The placement problem: experts with their demand, ranks with their slots, nodes with memory, links and ports."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.messages import format_index, format_size

OBJECTIVES = ("links", "ports", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """The experts to place, the slots and memory for them, and the tokens that each node routes to them.

    A node may have no ranks, where another expert-parallel group has all of them.
    """

    num_layers: int
    num_experts: int
    slots_per_rank: int  # experts of one layer that a rank has room for
    replicate: bool  # may spare slots hold second replicas?
    even: bool = True  # without replicas: all ranks hold as many experts as any other, to within one, if memory allows
    node_of_rank: np.ndarray  # [P] int64
    rack_of_node: np.ndarray  # [nodes] int64
    bytes_per_second: np.ndarray  # [nodes, nodes]; the diagonal is not used
    latency_seconds: np.ndarray  # [nodes, nodes]
    egress_bytes_per_second: np.ndarray  # [nodes], what a node's port sends in all
    ingress_bytes_per_second: np.ndarray  # [nodes], what it receives
    uplink_bytes_per_second: np.ndarray  # [racks], what leaves a rack, and as much what enters; inf: no limit
    memory_bytes: np.ndarray  # [nodes] int64, what is there for experts of all layers
    expert_bytes: int  # one expert of one layer
    bytes_per_token: float
    seconds_per_token: float = 0.0  # that a rank computes on one assignment
    tokens_of_rank: np.ndarray  # [P] assignments of a layer and step whose home is that rank
    probability: np.ndarray  # [L, nodes, E] of each expert for tokens of that node; sums to 1 over E
    objective: str = "links"  # one of OBJECTIVES
    count_latency: bool = False  # does a link in use cost its latency too?
    node_names: tuple[str, ...] = ()  # for messages alone

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes."""
        return len(self.rack_of_node)

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks, P."""
        return len(self.node_of_rank)

    @property
    def ranks_of_node(self) -> np.ndarray:
        """Count the ranks of each node -> [nodes] int64."""
        return np.bincount(self.node_of_rank, minlength=self.num_nodes)

    @property
    def slots_of_node(self) -> np.ndarray:
        """Count the slots of one layer on each node -> [nodes] int64."""
        return self.ranks_of_node * self.slots_per_rank

    @property
    def node_of_slot(self) -> np.ndarray:
        """Return the node of each slot of a layer -> [S] int64."""
        return np.repeat(self.node_of_rank, self.slots_per_rank)

    @property
    def memory_replicas(self) -> np.ndarray:
        """Count the replicas, of all layers together, that fit each node's memory -> [nodes] int64."""
        return self.memory_bytes // max(self.expert_bytes, 1)

    @property
    def capacity_of_node(self) -> np.ndarray:
        """Count the replicas, of all layers together, that fit each node's memory and slots -> [nodes] int64."""
        return np.minimum(self.slots_of_node * self.num_layers, self.memory_replicas)

    @property
    def distance(self) -> np.ndarray:
        """Return the distance of two nodes: 0 the same node, 1 the same rack, 2 farther -> [nodes, nodes]."""
        other_rack = self.rack_of_node[:, None] != self.rack_of_node
        return 1 - np.eye(self.num_nodes, dtype=np.int64) + other_rack

    @property
    def link_cost(self) -> np.ndarray:
        """Return the seconds of a token on each link, 0 within a node -> [nodes, nodes]."""
        return np.where(np.eye(self.num_nodes), 0.0, self.bytes_per_token / self.bytes_per_second)

    @property
    def link_latency(self) -> np.ndarray:
        """Return the seconds of each link in use besides, 0 where latency does not count -> [nodes, nodes]."""
        counts = self.count_latency * (1 - np.eye(self.num_nodes))
        return np.where(counts > 0, self.latency_seconds, 0.0)

    @property
    def tokens_of_node(self) -> np.ndarray:
        """Count the assignments whose home is each node -> [nodes]."""
        return np.bincount(self.node_of_rank, self.tokens_of_rank, minlength=self.num_nodes)

    def demand(self, layer: int) -> np.ndarray:
        """Count the tokens of each node that are routed to each expert of a layer -> [nodes, E]."""
        return self.tokens_of_node[:, None] * self.probability[layer]

    def name_node(self, node: int) -> str:
        """Return a node's name, its number where nodes have none."""
        return self.node_names[node] if self.node_names else str(node)


_SHAPES = {  # of a problem's arrays
    "node_of_rank": ("ranks",), "tokens_of_rank": ("ranks",), "rack_of_node": ("nodes",), "memory_bytes": ("nodes",),
    "egress_bytes_per_second": ("nodes",), "ingress_bytes_per_second": ("nodes",),
    "bytes_per_second": ("nodes", "nodes"), "latency_seconds": ("nodes", "nodes"),
    "uplink_bytes_per_second": ("racks",), "probability": ("layers", "nodes", "experts"),
}  # fmt: skip
_SUM_TOLERANCE = 1e-6  # of a row of probabilities


def check_problem_arrays(problem: PlacementProblem) -> None:
    """Raise PlacementError unless a problem's arrays have the shapes that they should, and numbers that can be."""
    sizes = {
        "ranks": problem.num_ranks,
        "nodes": problem.num_nodes,
        "racks": len(problem.uplink_bytes_per_second),
        "layers": problem.num_layers,
        "experts": problem.num_experts,
    }
    for name, dimensions in _SHAPES.items():
        has, wants = np.shape(getattr(problem, name)), tuple(sizes[dimension] for dimension in dimensions)
        if has != wants:
            raise PlacementError(f"{name} has shape {list(has)}: must be [{', '.join(dimensions)}] = {list(wants)}")

    # Compare the numbers with their ranges; a node has no link to itself.
    links = ~np.eye(problem.num_nodes, dtype=bool)
    for name, fits, must in (
        ("node_of_rank", np.isin(problem.node_of_rank, np.arange(sizes["nodes"])), f"from 0 to {sizes['nodes'] - 1}"),
        ("rack_of_node", np.isin(problem.rack_of_node, np.arange(sizes["racks"])), f"from 0 to {sizes['racks'] - 1}"),
        ("bytes_per_second", (problem.bytes_per_second > 0) | ~links, "> 0"),
        ("latency_seconds", (problem.latency_seconds >= 0) | ~links, ">= 0"),
        ("egress_bytes_per_second", problem.egress_bytes_per_second > 0, "> 0"),
        ("ingress_bytes_per_second", problem.ingress_bytes_per_second > 0, "> 0"),
        ("uplink_bytes_per_second", problem.uplink_bytes_per_second > 0, "> 0"),
        ("memory_bytes", problem.memory_bytes >= 0, ">= 0"),
        ("tokens_of_rank", problem.tokens_of_rank >= 0, ">= 0"),
        ("probability", problem.probability >= 0, ">= 0"),
    ):
        if not fits.all():
            index = tuple(np.argwhere(~fits)[0].tolist())
            raise PlacementError(f"{name}{format_index(index)} = {getattr(problem, name)[index]:g}: must be {must}")
    wrong = np.argwhere(np.abs(problem.probability.sum(axis=2) - 1) > _SUM_TOLERANCE)
    if len(wrong):
        raise PlacementError(f"probability{format_index(wrong[0].tolist())}: must sum to 1 over the experts")


def count_slots_per_rank(num_experts: int, num_ranks: int, spare: int) -> int:
    """Count the slots a rank needs: one where every expert can have a rank, else enough for all, and the spare ones."""
    return -(-num_experts // num_ranks) + spare


def check_problem(
    problem: PlacementProblem,
    slot_keys: str = "[model] num_experts, [placement] spare_slots_per_rank",
    memory_keys: str = "[model] num_experts, [cluster] memory_bytes_per_node",
) -> None:
    """Raise PlacementError unless every layer's experts fit into the slots, and all layers' into the memory.

    The message ends with the keys by which the user can change that.
    """
    experts, layers, slots = problem.num_experts, problem.num_layers, problem.slots_per_rank
    if experts > problem.num_ranks * slots:
        raise PlacementError(
            f"{experts} experts do not fit into {problem.num_ranks} ranks x {slots} slots = "
            f"{problem.num_ranks * slots}; {slot_keys}"
        )

    # A node's memory beyond what its slots of all layers can hold is of no use.
    by_slots, holds = problem.slots_of_node * layers, problem.capacity_of_node
    if experts * layers > holds.sum():
        tightest = int(np.argmax(by_slots - holds))
        raise PlacementError(
            f"{experts} experts x {layers} layers x {format_size(problem.expert_bytes)} = "
            f"{format_size(experts * layers * problem.expert_bytes)} do not fit: node {problem.name_node(tightest)} "
            f"with {format_size(problem.memory_bytes[tightest])} and {by_slots[tightest]} slots holds "
            f"{holds[tightest]} of {experts * layers}, all {len(holds)} nodes {holds.sum()}; {memory_keys}"
        )
