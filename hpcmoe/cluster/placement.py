"""Which rank holds which expert: replicas laid on ranks so that the busiest link between nodes is least busy.

Pure: arrays in, arrays out, run on rank 0. The numbered steps of make_placement are in this file and in packing.py.
"""

from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.packing import add_replicas, contiguous_ranks, node_levels, packed_ranks
from hpcmoe.errors import PlacementError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """What there is to place, where it can go, and how many tokens will ask for it from where.

    A node may be without ranks, when another expert-parallel group has all of them.
    """

    num_layers: int
    num_experts: int
    slots_per_rank: int  # experts of one layer that a rank has room for
    replicate: bool  # may spare slots hold second copies?
    node_of_rank: np.ndarray  # [P] int64
    rack_of_node: np.ndarray  # [nodes] int64
    bytes_per_second: np.ndarray  # [nodes, nodes]; the diagonal is not used
    latency_seconds: np.ndarray  # [nodes, nodes]
    memory_bytes: np.ndarray  # [nodes] int64, what is there for experts
    expert_bytes: int  # one expert of one layer
    bytes_per_token: int
    tokens_of_rank: np.ndarray  # [P] token copies of a layer and step whose home is that rank
    probability: np.ndarray  # [L, nodes, E] of each expert for tokens of that node; sums to 1 over E
    node_names: tuple[str, ...] = ()  # for messages alone

    @property
    def ranks_of_node(self):
        """Count the ranks on each node -> [nodes] int64."""
        return np.bincount(self.node_of_rank, minlength=len(self.rack_of_node))

    @property
    def room_of_node(self):
        """Count the replicas of one layer that fit on each node, by slots and by memory -> [nodes] int64."""
        by_memory = self.memory_bytes // max(self.num_layers * self.expert_bytes, 1)
        return np.minimum(self.ranks_of_node * self.slots_per_rank, by_memory).astype(np.int64)

    @property
    def seconds_per_token(self):
        """Find what one token costs on each link -> [nodes, nodes], 0 within a node."""
        return np.where(np.eye(len(self.rack_of_node)), 0.0, self.bytes_per_token / self.bytes_per_second)

    @property
    def distance(self):
        """Tell how far two nodes are: 0 the same node, 1 the same rack, 2 farther -> [nodes, nodes]."""
        other_rack = self.rack_of_node[:, None] != self.rack_of_node
        return 1 - np.eye(len(self.rack_of_node), dtype=np.int64) + other_rack

    def demand(self, layer):
        """Count the tokens of each node that ask for each expert of a layer -> [nodes, E]."""
        tokens = np.bincount(self.node_of_rank, self.tokens_of_rank, minlength=len(self.rack_of_node))
        return tokens[:, None] * self.probability[layer]

    def nearest(self, copies):
        """Find the nearest tier with a copy, for copies [nodes, E] -> its distance and its copies, both [nodes, E]."""
        within = np.stack([(self.distance <= reach).astype(np.float64) @ copies for reach in range(3)])  # [3, nodes, E]
        tier = np.argmax(within > 0, axis=0)
        return tier, np.take_along_axis(within, tier[None], axis=0)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where every replica is and who sends it what; replica slot j is on rank j // slots_per_rank."""

    expert_of_replica: np.ndarray  # [L, S] int64, -1 in an empty slot
    rank_of_replica: np.ndarray  # [S] int64
    replica_count: np.ndarray  # [L, E] int64
    share_of_replica: np.ndarray  # [L, nodes, S] of that node's tokens for the slot's expert; sums to 1 over its slots
    node_of_rank: np.ndarray  # [P] int64
    objective_seconds: float  # sum over layers of the busiest link's seconds, one way
    lower_bound_seconds: float  # no placement costs less
    cross_node_share: float  # of all token copies
    method: str  # packed or contiguous

    @property
    def num_ranks(self):
        """Number of ranks, P."""
        return len(self.node_of_rank)

    @property
    def slots_per_rank(self):
        """Number of replica slots on each rank, s."""
        return len(self.rank_of_replica) // self.num_ranks

    def experts_of_rank(self, layer, rank):
        """Find what is in a rank's slots -> [s] int64, -1 where empty."""
        return self.expert_of_replica[layer].reshape(self.num_ranks, -1)[rank]


def slots_for(num_experts, num_ranks, spare):
    """Count the slots a rank needs: one where every expert can have a rank, else enough for all, and the spare ones."""
    return -(-num_experts // num_ranks) + spare


def make_placement(problem, method="packed"):
    """Lay all layers' experts on the ranks -> Placement; PlacementError when they do not fit.

    1 check that they fit, 2 find how many each node holds; in each layer 3 lay them contiguously or packed, 4 add
    replicas, 5 share the tokens out, 6 weigh: "packed" takes the better of packed and contiguous.
    """
    check(problem)
    levels = node_levels(problem)
    expert_of_replica = np.empty((problem.num_layers, len(problem.node_of_rank) * problem.slots_per_rank), np.int64)
    for layer in range(problem.num_layers):
        if layer > 0 and np.array_equal(problem.probability[layer], problem.probability[layer - 1]):
            expert_of_replica[layer] = expert_of_replica[layer - 1]
        else:
            expert_of_replica[layer] = place_layer(problem, problem.demand(layer), levels, method)
    return weigh(problem, expert_of_replica, method)


def check(problem):
    """Raise PlacementError unless every layer's experts fit into the slots and the memory."""
    experts, slots, num_ranks = problem.num_experts, problem.slots_per_rank, len(problem.node_of_rank)
    if experts > num_ranks * slots:
        raise PlacementError(
            f"{experts} experts do not fit into {num_ranks} ranks x {slots} slots = {num_ranks * slots}; "
            "[model] num_experts, [cluster] spare_slots_per_rank"
        )

    room = problem.room_of_node
    if experts > room.sum():
        tightest = np.argmax(problem.ranks_of_node * slots - room)
        name = problem.node_names[tightest] if problem.node_names else tightest
        raise PlacementError(
            f"{experts} experts x {problem.num_layers} layers x {in_units(problem.expert_bytes)} = "
            f"{in_units(experts * problem.num_layers * problem.expert_bytes)} do not fit: "
            f"node {name} with {in_units(problem.memory_bytes[tightest])} holds {room[tightest]} experts a layer, "
            f"all {len(room)} nodes {room.sum()}; [model] num_experts, [cluster] memory_bytes_per_node"
        )


def in_units(num_bytes):
    """Write a number of bytes with the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def place_layer(problem, demand, levels, method):
    """Place one layer whose demand is [nodes, E] -> expert_of_replica [S]."""
    layouts = [contiguous_ranks(problem, *levels)]
    match method:
        case "packed":
            layouts.insert(0, packed_ranks(problem, demand, *levels))
        case "contiguous":
            pass
        case _:
            raise ValueError(method)
    candidates = [fill_slots(problem, demand, rank_of_expert) for rank_of_expert in layouts]
    return min(candidates, key=lambda expert_of_replica: merit(problem, demand, expert_of_replica))


def fill_slots(problem, demand, rank_of_expert):
    """Put each expert on its rank, and replicas into spare slots where they are wanted -> expert_of_replica [S]."""
    holds = np.zeros((len(problem.node_of_rank), problem.num_experts), bool)
    holds[rank_of_expert, np.arange(problem.num_experts)] = True
    if problem.replicate:
        add_replicas(problem, demand, holds)

    expert_of_replica = np.full((len(holds), problem.slots_per_rank), -1, np.int64)
    for slots, held in zip(expert_of_replica, holds, strict=True):
        experts = np.flatnonzero(held)
        slots[: len(experts)] = experts
    return expert_of_replica.ravel()


def share_out(problem, expert_of_replica):
    """Send each node's tokens to the nearest tier with a copy, evenly over its copies: [S] -> shares [nodes, S]."""
    node_of_slot = np.repeat(problem.node_of_rank, problem.slots_per_rank)
    used = np.flatnonzero(expert_of_replica >= 0)
    nodes, experts = node_of_slot[used], expert_of_replica[used]
    copies = np.zeros((len(problem.rack_of_node), problem.num_experts))
    np.add.at(copies, (nodes, experts), 1)

    tier, count = problem.nearest(copies)
    share = np.zeros((len(copies), len(node_of_slot)))
    share[:, used] = (problem.distance[:, nodes] <= tier[:, experts]) / count[:, experts]
    return share


def weigh(problem, expert_of_replica, method):
    """Share out the tokens and find what they cost -> Placement."""
    share_of_replica = np.stack([share_out(problem, experts) for experts in expert_of_replica])
    tokens = tokens_on_links(problem, expert_of_replica, share_of_replica)
    staying = np.trace(tokens, axis1=1, axis2=2).sum()
    return Placement(
        expert_of_replica=expert_of_replica,
        rank_of_replica=np.repeat(np.arange(len(problem.node_of_rank)), problem.slots_per_rank),
        replica_count=np.stack(
            [np.bincount(row[row >= 0], minlength=problem.num_experts) for row in expert_of_replica]
        ),
        share_of_replica=share_of_replica,
        node_of_rank=problem.node_of_rank,
        objective_seconds=objective(problem, tokens),
        lower_bound_seconds=sum(bound_layer(problem, problem.demand(layer)) for layer in range(problem.num_layers)),
        cross_node_share=float(1 - staying / tokens.sum()) if tokens.any() else 0.0,
        method=method,
    )


def link_tokens(problem, placement):
    """Count the tokens that each node sends to each, with those that stay on the diagonal -> [L, nodes, nodes]."""
    return tokens_on_links(problem, placement.expert_of_replica, placement.share_of_replica)


def tokens_on_links(problem, expert_of_replica, share_of_replica):
    """Count link_tokens of replicas [L, S] and their shares [L, nodes, S] -> [L, nodes, nodes]."""
    layers = enumerate(zip(expert_of_replica, share_of_replica, strict=True))
    return np.stack([sum_by_node(problem, problem.demand(k)[:, experts] * share) for k, (experts, share) in layers])


def sum_by_node(problem, tokens):
    """Sum tokens for each slot [nodes, S] over the slots of each node -> [nodes, nodes]."""
    node_of_slot = np.repeat(problem.node_of_rank, problem.slots_per_rank)
    return tokens @ (node_of_slot[:, None] == np.arange(len(problem.rack_of_node))).astype(np.float64)


def objective(problem, tokens):
    """Sum over layers the busiest link's seconds, for tokens [L, nodes, nodes]; what stays on a node costs nothing."""
    return float((tokens * problem.seconds_per_token).max(axis=(1, 2)).sum())


def merit(problem, demand, expert_of_replica):
    """Rank layouts [S] of a layer, less is better: busiest link, then cross-node traffic, then the busiest rank."""
    served = demand[:, expert_of_replica] * share_out(problem, expert_of_replica)  # an empty slot has no share
    sent = sum_by_node(problem, served)
    of_rank = served.sum(axis=0).reshape(-1, problem.slots_per_rank).sum(axis=1)
    figures = ((sent * problem.seconds_per_token).max(), sent.sum() - np.trace(sent), of_rank.max())
    return tuple(float(f"{figure:.9g}") for figure in figures)  # rounding noise decides nothing


def bound_layer(problem, demand):
    """Find seconds below which no placement of one layer can come, for demand [nodes, E]; 0 on one node."""
    room = np.minimum(problem.room_of_node, problem.num_experts)
    cost = problem.seconds_per_token
    if len(room) == 1:
        return 0.0

    # A node serves itself at most its own hottest experts; the rest leaves, at best over all its links at once.
    hottest = -np.sort(-demand, axis=1)
    leaving = np.array([row[most:].sum() for row, most in zip(hottest, room, strict=True)])
    rate = np.where(cost > 0, 1 / np.where(cost > 0, cost, 1), 0).sum(axis=1)
    bounds = [(leaving / rate).max()]

    # Without replicas a node holds at least what the others have no room for, at best each sender's coldest experts,
    if not problem.replicate:
        forced = np.maximum(problem.num_experts - (room.sum() - room), 0)
        coldest = np.pad(np.cumsum(np.sort(demand, axis=1), axis=1), ((0, 0), (1, 0)))
        bounds.append((coldest[:, forced] * cost).max())
        # and each expert is on one node, at best with one less of the coldest beside it.
        beside = coldest[:, np.maximum(forced - 1, 0)]
        of_expert = (demand[:, None, :] + beside[:, :, None]) * cost[:, :, None]  # [from, to, E] seconds
        bounds.append(of_expert.max(axis=0)[room > 0].min(axis=0).max())
    return float(max(bounds))
