"""A layer as one choice for each expert: the nodes of its replicas, which by the routing rule fix its traffic."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.resources import list_resources, price_flows, token_rates

_MOST_ENTRIES = 1_000_000  # of choices x nodes x nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The ways to put an expert's replicas on the nodes: C even choices, then A free ones.

    Even choices split tokens evenly over the replicas of the nearest tier. Where these do not hold all ways to put
    several replicas on a node, free choices are sets of nodes with one replica more than nodes, whose tokens split
    freely within the nearest tier: no worse than any such layout.
    """

    replicas: np.ndarray  # [C, nodes] of the even choices
    shares: np.ndarray  # [C, nodes, nodes] of the sender's tokens for each node
    free_sets: np.ndarray  # [A, nodes] bool
    free_within: np.ndarray  # [A, nodes, nodes] bool: does the sender's nearest tier hold a replica there?

    @property
    def num_single(self) -> int:
        """Return the number of choices of one replica: the first ones."""
        return int((self.replicas.sum(axis=1) == 1).sum())

    @property
    def is_single(self) -> bool:
        """Return True if every expert has one replica."""
        return self.num_single == len(self.replicas)


def make_choices(problem: PlacementProblem, capacity: np.ndarray, spare: int) -> Choices | None:
    """List the choices with capacity [nodes] replicas a node and spare ones in all; None if there are too many."""
    most, num_entries = np.minimum(problem.ranks_of_node, capacity), problem.num_nodes**2
    if count_combinations(most, spare + 1) * num_entries <= _MOST_ENTRIES:
        replicas, free = list_combinations(most, spare + 1), np.zeros((0, problem.num_nodes), bool)
    elif count_combinations(np.minimum(most, 1), spare + 1) * num_entries <= _MOST_ENTRIES:
        replicas = list_combinations(np.minimum(most, 1), spare + 1)
        num = replicas.sum(axis=1)

        # A second replica on the only node changes no traffic, but the work of its ranks.
        fewest = 1 if "rank" in list_resources(problem.objective) else 2
        free = replicas[(num >= fewest) & (num <= spare) & (replicas & (most > 1)).any(axis=1)] > 0
    else:
        return None

    weight = find_nearest(problem, replicas > 0) * replicas[:, None, :]
    shares = weight / weight.sum(axis=2, keepdims=True)
    return Choices(replicas=replicas, shares=shares, free_sets=free, free_within=find_nearest(problem, free))


def count_combinations(most: np.ndarray, total: int) -> int:
    """Count the ways to put 1 to `total` replicas with at most `most` [nodes] on each node."""
    found = np.ones(1)
    for limit in most:
        found = np.convolve(found, np.ones(limit + 1))[: total + 1]
    return int(found[1:].sum())


def list_combinations(most: np.ndarray, total: int) -> np.ndarray:
    """List the ways to put 1 to `total` replicas with at most `most` [nodes] on each, fewest first -> [C, nodes]."""
    found = np.zeros((1, 0), np.int64)
    for limit in most:
        longer = np.repeat(found, limit + 1, axis=0)
        found = np.column_stack([longer, np.tile(np.arange(limit + 1), len(found))])
        found = found[found.sum(axis=1) <= total]
    return found[np.argsort(found.sum(axis=1), kind="stable")][1:]


def find_nearest(problem: PlacementProblem, sets: np.ndarray) -> np.ndarray:
    """Find which nodes of sets [C, nodes] are in each sender's nearest tier -> [C, nodes, nodes] bool."""
    reached = [(problem.distance <= reach)[None] & sets[:, None, :] for reach in range(3)]
    own, near = (tier.any(axis=2, keepdims=True) for tier in reached[:2])
    return np.where(own, reached[0], np.where(near, reached[1], reached[2]))


def make_rates(problem: PlacementProblem) -> csr_array:
    """Return the seconds of a token from node to node on each counted resource -> sparse [resources, nodes * nodes].

    Links first, then ports and uplinks, then a node's ranks as if they shared its tokens evenly.
    """
    num, names = problem.num_nodes, list_resources(problem.objective)
    sender, receiver = np.divmod(np.arange(num**2), num)
    prices = price_flows(problem, sender, receiver)

    # Leave out the links within nodes, and keep both ways of an uplink together.
    links = make_price_matrix(*prices["link"], num**2)
    blocks = [links[np.flatnonzero(sender != receiver)]]
    if "egress" in names:
        blocks += [make_price_matrix(*prices[name], num) for name in ("egress", "ingress")]
        num_racks = len(problem.uplink_bytes_per_second)
        out, into = (make_price_matrix(*prices[name], num_racks) for name in ("uplink_out", "uplink_in"))
        blocks += [way[[rack]] for rack in range(num_racks) for way in (out, into)]
    if "rank" in names:
        of_node = problem.seconds_per_token / np.maximum(problem.ranks_of_node, 1)
        blocks.append(make_price_matrix(receiver, of_node[receiver], num))
    return csr_array(vstack(blocks))


def make_price_matrix(number: np.ndarray, seconds: np.ndarray, num_resources: int) -> csr_array:
    """Build the sparse [num_resources, n] with the seconds [n] of each flow in the row of its resource's number [n]."""
    used = np.flatnonzero(seconds > 0)
    return csr_array(coo_array((seconds[used], (number[used], used)), shape=(num_resources, len(seconds))))


def evaluate_alone(problem: PlacementProblem, demand: np.ndarray, choices: Choices, rates: csr_array) -> np.ndarray:
    """Compute the seconds of each even choice of each expert with nothing beside it: demand [nodes, E] -> [C, E]."""
    shares, num = choices.shares, problem.num_nodes
    seconds = np.zeros((len(shares), demand.shape[1]))
    for row in range(rates.shape[0]):
        cells = slice(rates.indptr[row], rates.indptr[row + 1])
        sender, receiver = np.divmod(rates.indices[cells], num)
        if len(sender):
            np.maximum(seconds, (shares[:, sender, receiver] * rates.data[cells]) @ demand[sender], out=seconds)
    if "rank" in list_resources(problem.objective):
        of_replica = shares.transpose(0, 2, 1) / np.maximum(choices.replicas, 1)[:, :, None]  # [C, to, from]
        np.maximum(seconds, (of_replica @ demand).max(axis=1) * problem.seconds_per_token, out=seconds)
    return seconds


def bound_free(problem: PlacementProblem, demand: np.ndarray, choices: Choices) -> np.ndarray:
    """Compute a bound of each expert's free choices from all links that its tokens may take at once -> [A, E]."""
    rate = np.where(problem.link_cost > 0, token_rates(problem)["link"], np.inf)
    together = np.where(choices.free_within, rate, 0.0).sum(axis=2)  # [A, senders] tokens a second
    seconds = np.zeros((len(together), demand.shape[1]))
    for sender, tokens in enumerate(demand):
        np.maximum(seconds, tokens / together[:, sender, None], out=seconds)
    return seconds
