"""A layer as one choice for each expert: the nodes that hold its replicas, which by the routing rule fix its traffic."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, diags_array, vstack

from hpcmoe.placement.cost import list_resources

_MOST_ENTRIES = 1_000_000  # of choices x nodes x nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The ways to lay an expert's replicas on the nodes.

    First those whose tokens split evenly over the replicas of the nearest tier. Where they do not hold all ways to put
    several replicas on a node, then come sets of nodes with one replica more than nodes, whose tokens split at will within
    the nearest tier: no worse than any such layout.
    """

    replicas: np.ndarray  # [C, nodes]
    shares: np.ndarray  # [C, nodes, nodes] of the sender's tokens for each node
    sets_at_will: np.ndarray  # [A, nodes] bool
    within_at_will: np.ndarray  # [A, nodes, nodes] bool: does the sender's nearest tier hold a replica there?

    @property
    def num_single(self):
        """Number of choices of one replica: the first ones."""
        return int((self.replicas.sum(axis=1) == 1).sum())

    @property
    def is_single(self):
        """Whether every expert has one replica."""
        return self.num_single == len(self.replicas)


def make_choices(problem, room, spare):
    """List the ways to lay an expert's replicas, with spare replicas in all -> Choices, or None: there are too many."""
    most, num_entries = np.minimum(problem.ranks_of_node, room), problem.num_nodes**2
    if count_ways(most, spare + 1) * num_entries <= _MOST_ENTRIES:
        replicas, at_will = list_ways(most, spare + 1), np.zeros((0, problem.num_nodes), bool)
    elif count_ways(np.minimum(most, 1), spare + 1) * num_entries <= _MOST_ENTRIES:
        replicas = list_ways(np.minimum(most, 1), spare + 1)
        num = replicas.sum(axis=1)

        # A second replica on the only node changes no traffic, but what its ranks have to do.
        fewest = 1 if "rank" in list_resources(problem.objective) else 2
        at_will = replicas[(num >= fewest) & (num <= spare) & (replicas & (most > 1)).any(axis=1)] > 0
    else:
        return None

    within = find_nearest(problem, replicas > 0)
    weight = within * replicas[:, None, :]
    return Choices(
        replicas=replicas,
        shares=weight / weight.sum(axis=2, keepdims=True),
        sets_at_will=at_will,
        within_at_will=find_nearest(problem, at_will),
    )


def count_ways(most, total):
    """Count the ways to lay 1 to `total` replicas with at most `most` [nodes] on each node."""
    ways = np.ones(1)
    for limit in most:
        ways = np.convolve(ways, np.ones(limit + 1))[: total + 1]
    return int(ways[1:].sum())


def list_ways(most, total):
    """List the ways to lay 1 to `total` replicas with at most `most` [nodes] on each, fewest first -> [C, nodes]."""
    ways = np.zeros((1, 0), np.int64)
    for limit in most:
        longer = np.repeat(ways, limit + 1, axis=0)
        ways = np.column_stack([longer, np.tile(np.arange(limit + 1), len(ways))])
        ways = ways[ways.sum(axis=1) <= total]
    num = ways.sum(axis=1)
    return ways[np.argsort(num, kind="stable")][1:]


def find_nearest(problem, sets):
    """Find which replicas are in each sender's nearest tier, for sets [C, nodes] -> [C, nodes, nodes] bool."""
    reached = [(problem.distance <= reach)[None] & sets[:, None, :] for reach in range(3)]
    own, near = (tier.any(axis=2, keepdims=True) for tier in reached[:2])
    return np.where(own, reached[0], np.where(near, reached[1], reached[2]))


def make_rates(problem):
    """Find what a token from node to node costs each resource -> sparse [resources, nodes * nodes] seconds.

    Links first, then ports and uplinks, then a node's ranks as if they shared its tokens evenly.
    """
    num, rack, token = problem.num_nodes, problem.rack_of_node, problem.bytes_per_token
    names, away = list_resources(problem.objective), 1.0 - np.eye(problem.num_nodes)
    blocks = [csr_array(diags_array(problem.link_cost.ravel()))[np.flatnonzero(away)]]
    one = np.eye(num)
    if "egress" in names:
        blocks.append(csr_array((one[:, :, None] * away).reshape(num, -1) / problem.egress_bytes_per_second[:, None]))
        blocks.append(csr_array((one[:, None] * away).reshape(num, -1) / problem.ingress_bytes_per_second[:, None]))
        for number, uplink in enumerate(problem.uplink_bytes_per_second):
            inside = (rack == number).astype(np.float64)
            blocks += [csr_array(np.outer(*pair).reshape(1, -1) / uplink) for pair in ends(inside)]
        blocks[1:] = [block * token for block in blocks[1:]]
    if "rank" in names:
        of_node = problem.seconds_per_token / np.maximum(problem.ranks_of_node, 1)
        blocks.append(csr_array(np.repeat(one[:, None], num, axis=1).reshape(num, -1) * of_node[:, None]))
    return csr_array(vstack(blocks))


def ends(inside):
    """Pair what is inside a rack with what is not, for what leaves and for what enters."""
    return (inside, 1 - inside), (1 - inside, inside)


def cost_alone(problem, demand, choices, rates):
    """Find what each choice of each expert costs with nothing beside it, for demand [nodes, E] -> seconds [C, E]."""
    shares, replicas, num = choices.shares, choices.replicas, problem.num_nodes
    seconds = np.zeros((len(shares), demand.shape[1]))
    for row in range(rates.shape[0]):
        cells = slice(rates.indptr[row], rates.indptr[row + 1])
        sender, receiver = np.divmod(rates.indices[cells], num)
        if len(sender):
            np.maximum(seconds, (shares[:, sender, receiver] * rates.data[cells]) @ demand[sender], out=seconds)
    if "rank" in list_resources(problem.objective):
        of_replica = shares.transpose(0, 2, 1) / np.maximum(replicas, 1)[:, :, None]  # [C, to, from]
        np.maximum(seconds, (of_replica @ demand).max(axis=1) * problem.seconds_per_token, out=seconds)
    return seconds


def cost_at_will(problem, demand, choices):
    """Find what each choice that splits at will costs on links at least, if over all at once -> seconds [A, E]."""
    rate = np.divide(1.0, problem.link_cost, out=np.full(problem.link_cost.shape, np.inf), where=problem.link_cost > 0)
    together = np.where(choices.within_at_will, rate, 0.0).sum(axis=2)  # [A, senders] tokens a second
    seconds = np.zeros((len(together), demand.shape[1]))
    for sender, tokens in enumerate(demand):
        np.maximum(seconds, tokens / together[:, sender, None], out=seconds)
    return seconds
