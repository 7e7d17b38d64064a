"""Which way an assignment takes to each slot: through the window to a local peer, or in a message to another node.

Local peers are the ranks of one node. A message serves the slots of one rank of another node, which receives it itself.
Where a token goes to a node only once, it serves those of all ranks there: one of them receives it for all, and each
home has its own receiver, so that a node's messages are shared out over its ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The ways from and to one rank of an expert-parallel group of P ranks with s slots each."""

    rank: int
    num_slots: int  # s, of a rank
    local_peers: np.ndarray  # [local peers] int64, the ranks of this node, ascending; this one too
    receivers: np.ndarray  # [receivers] int64, the ranks of other nodes that receive this rank's messages
    place_of_slot: np.ndarray  # [P * s] int64, the order of assignments: to the local peers, then by receiver
    edges: np.ndarray  # [receivers + 1] int64, the first place of each receiver, and the end
    peers_by_node: tuple[np.ndarray, ...]  # all ranks [P] in the order in which their rows are worked on, node by node
    same_order: bool  # that order is the same at all ranks: an expert meets the same rows wherever it is
    senders: tuple[int, ...]  # the ranks whose messages this rank receives, in that order of the nodes
    max_senders: int  # such ranks of any local peer
    most_served: int  # slots that any message between any two nodes serves
    min_local_peers: int  # ranks of the smallest node
    served: tuple[np.ndarray, ...]  # for each sender the indices of the local peers that its messages serve
    publishers: np.ndarray  # [P] int64, index of the local peer that announces each peer's rows to this rank
    once: np.ndarray  # [P] bool, whether a peer's tokens come to this node once for all local peers
    inbound_index: np.ndarray  # [P] int64, the peer's index among the publisher's senders; -1: a local peer's own rows

    @property
    def local_index(self) -> int:
        """Return this rank's index among its local peers."""
        return int(np.searchsorted(self.local_peers, self.rank))

    @property
    def num_places(self) -> int:
        """Return the number of slots that the window leads to."""
        return len(self.local_peers) * self.num_slots


def make_routes(
    node_of_rank: Sequence[int] | np.ndarray, rank: int, num_slots: int, once: np.ndarray, same_order: bool = False
) -> Routes:
    """Return the ways of a rank: node_of_rank [P], and once[a, b], whether tokens of node a go to node b only once.

    Peers come in an order that begins at each rank with itself and its local peers, which wait for nobody; with
    same_order in the one order that is the same at all ranks.
    """
    node_of_rank = np.asarray(node_of_rank)
    here = node_of_rank[rank]
    local_peers = np.flatnonzero(node_of_rank == here)

    # Order the slots by way: own node first, then each receiver's.
    receivers, order = list[int](), [local_peers]
    for node in np.unique(node_of_rank[node_of_rank != here]):
        ranks = np.flatnonzero(node_of_rank == node)
        receivers += [receiver_of(rank, node_of_rank, node)] if once[here, node] else ranks.tolist()
        order += list([ranks] if once[here, node] else ranks[:, None])
    slots = [(ranks[:, None] * num_slots + np.arange(num_slots)).ravel() for ranks in order]
    place_of_slot = np.empty(len(node_of_rank) * num_slots, np.int64)
    place_of_slot[np.concatenate(slots)] = np.arange(len(place_of_slot))

    # Find whose messages this rank receives, and who announces those that serve it.
    peers = order_of_nodes(node_of_rank, 0 if same_order else here)
    others = [ranks for ranks in peers if node_of_rank[ranks[0]] != here]
    if not same_order:
        peers = [np.roll(local_peers, -int(np.searchsorted(local_peers, rank))), *others]
    senders = {peer: senders_to(peer, node_of_rank, once, others) for peer in local_peers.tolist()}
    publishers, inbound_index = np.zeros(len(node_of_rank), np.int64), np.full(len(node_of_rank), -1)
    for number, peer in enumerate(local_peers.tolist()):
        publishers[peer] = number
        for index, sender in enumerate(senders[peer]):
            if peer == rank or once[node_of_rank[sender], here]:
                publishers[sender], inbound_index[sender] = number, index

    # Count what the sizes of buffers depend on.
    num_local_peers = np.bincount(node_of_rank, minlength=len(once))
    between = np.where(once, num_local_peers, 1)[~np.eye(len(once), dtype=bool)]  # ranks that a message serves
    everyone, self_alone = np.arange(len(local_peers)), np.flatnonzero(local_peers == rank)
    return Routes(
        rank=rank,
        num_slots=num_slots,
        local_peers=local_peers,
        receivers=np.array(receivers, np.int64),
        place_of_slot=place_of_slot,
        edges=np.cumsum([len(of_way) for of_way in slots]),
        same_order=same_order,
        peers_by_node=tuple(peers),
        senders=tuple(senders[rank]),
        max_senders=max(map(len, senders.values())),
        served=tuple(everyone if once[node_of_rank[sender], here] else self_alone for sender in senders[rank]),
        most_served=int(max(between, default=0)) * num_slots,
        min_local_peers=int(num_local_peers[num_local_peers > 0].min()),
        publishers=publishers,
        once=once[node_of_rank, here],
        inbound_index=inbound_index,
    )


def receiver_of(rank: int, node_of_rank: np.ndarray, node: int) -> int:
    """Return the rank of another node that receives for all ranks there what this rank sends."""
    ranks = np.flatnonzero(node_of_rank == node)
    number = np.searchsorted(np.flatnonzero(node_of_rank == node_of_rank[rank]), rank)
    return int(ranks[number % len(ranks)])


def order_of_nodes(node_of_rank: np.ndarray, first: int) -> list[np.ndarray]:
    """List the ranks of all nodes, node by node, beginning with the first, or the one after it."""
    nodes = np.unique(node_of_rank)
    return [np.flatnonzero(node_of_rank == node) for node in np.roll(nodes, -int(np.searchsorted(nodes, first)))]


def senders_to(rank: int, node_of_rank: np.ndarray, once: np.ndarray, others: Iterable[np.ndarray]) -> list[int]:
    """List the ranks of other nodes whose messages a rank receives, in the order of others (arrays of ranks)."""
    here = node_of_rank[rank]
    return [
        sender
        for ranks in others
        for sender in ranks.tolist()
        if not once[node_of_rank[sender], here] or receiver_of(sender, node_of_rank, here) == rank
    ]
