"""What is to be placed: experts with their demand, ranks with their slots, nodes with their memory, links and ports."""

from dataclasses import dataclass

import numpy as np

from hpcmoe.errors import PlacementError

OBJECTIVES = ("links", "ports", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """What there is to place, where it can go, and how many tokens will ask for it from where.

    A node may be without ranks, when another expert-parallel group has all of them.
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
    bytes_per_token: int
    seconds_per_token: float = 0.0  # that a rank computes on one assignment
    tokens_of_rank: np.ndarray  # [P] assignments of a layer and step whose home is that rank
    probability: np.ndarray  # [L, nodes, E] of each expert for tokens of that node; sums to 1 over E
    objective: str = "links"  # one of OBJECTIVES
    count_latency: bool = False  # does a link in use cost its latency too?
    node_names: tuple[str, ...] = ()  # for messages alone

    @property
    def num_nodes(self):
        """Number of nodes."""
        return len(self.rack_of_node)

    @property
    def num_ranks(self):
        """Number of ranks, P."""
        return len(self.node_of_rank)

    @property
    def ranks_of_node(self):
        """Count the ranks on each node -> [nodes] int64."""
        return np.bincount(self.node_of_rank, minlength=self.num_nodes)

    @property
    def slots_of_node(self):
        """Count the slots of one layer on each node -> [nodes] int64."""
        return self.ranks_of_node * self.slots_per_rank

    @property
    def node_of_slot(self):
        """The node of each slot of a layer -> [S] int64."""
        return np.repeat(self.node_of_rank, self.slots_per_rank)

    @property
    def memory_replicas(self):
        """Count the replicas, of all layers together, that fit into each node's memory -> [nodes] int64."""
        return self.memory_bytes // max(self.expert_bytes, 1)

    @property
    def distance(self):
        """Tell how far two nodes are: 0 the same node, 1 the same rack, 2 farther -> [nodes, nodes]."""
        other_rack = self.rack_of_node[:, None] != self.rack_of_node
        return 1 - np.eye(self.num_nodes, dtype=np.int64) + other_rack

    @property
    def link_cost(self):
        """Find what one token costs on each link -> seconds [nodes, nodes], 0 within a node."""
        return np.where(np.eye(self.num_nodes), 0.0, self.bytes_per_token / self.bytes_per_second)

    @property
    def link_latency(self):
        """Find what a link in use costs besides -> seconds [nodes, nodes], 0 where latency does not count."""
        counts = self.count_latency * (1 - np.eye(self.num_nodes))
        return np.where(counts > 0, self.latency_seconds, 0.0)

    @property
    def tokens_of_node(self):
        """Count the assignments whose home is on each node -> [nodes]."""
        return np.bincount(self.node_of_rank, self.tokens_of_rank, minlength=self.num_nodes)

    def demand(self, layer):
        """Count the tokens of each node that ask for each expert of a layer -> [nodes, E]."""
        return self.tokens_of_node[:, None] * self.probability[layer]


def count_slots_per_rank(num_experts, num_ranks, spare):
    """Count the slots a rank needs: one where every expert can have a rank, else enough for all, and the spare ones."""
    return -(-num_experts // num_ranks) + spare


def check_problem(problem):
    """Raise PlacementError unless every layer's experts fit into the slots, and all layers' into the memory."""
    experts, layers, slots = problem.num_experts, problem.num_layers, problem.slots_per_rank
    if experts > problem.num_ranks * slots:
        raise PlacementError(
            f"{experts} experts do not fit into {problem.num_ranks} ranks x {slots} slots = "
            f"{problem.num_ranks * slots}; [model] num_experts, [placement] spare_slots_per_rank"
        )

    # A node's memory beyond what its slots of all layers can hold is of no use.
    by_slots = problem.slots_of_node * layers
    holds = np.minimum(by_slots, problem.memory_replicas)
    if experts * layers > holds.sum():
        tightest = np.argmax(by_slots - holds)
        name = problem.node_names[tightest] if problem.node_names else tightest
        raise PlacementError(
            f"{experts} experts x {layers} layers x {format_size(problem.expert_bytes)} = "
            f"{format_size(experts * layers * problem.expert_bytes)} do not fit: "
            f"node {name} with {format_size(problem.memory_bytes[tightest])} and {by_slots[tightest]} slots holds "
            f"{holds[tightest]} of {experts * layers}, all {len(holds)} nodes {holds.sum()}; "
            "[model] num_experts, [cluster] memory_bytes_per_node"
        )


def format_size(num_bytes):
    """Write a number of bytes with the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
