"""Which way an assignment takes to each slot: through the window to a local_peer, or by a message that some rank there lands.

Ranks of one node are local_peers. A message serves the slots of one rank of another node, which lands it itself; or, where a
token goes there only once, those of all ranks of that node: then one of them lands it for all, and each home has its
own, so that the receivers of a node are shared out over its ranks.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The ways from and to one rank of an expert-parallel group of P ranks with s slots each."""

    rank: int
    num_slots: int  # s, of a rank
    local_peers: np.ndarray  # [local_peers] int64, the ranks of this node, ascending
    receivers: np.ndarray  # [messages] int64, the ranks that land this rank's messages
    place_of_slot: (
        np.ndarray
    )  # [P * s] int64, the order in which assignments are laid: to the local_peers, then message by message
    edges: np.ndarray  # [messages + 1] int64, the first place of each message, and the end
    peers_by_node: tuple  # all ranks [P] in the order in which their rows are worked on, node by node
    same_order: bool  # that order is the same at all ranks: an expert meets the same rows wherever it is
    senders: tuple  # the ranks whose messages this rank lands, in that order of the nodes
    max_senders: int  # such ranks of any local_peer
    most_served: int  # slots that any message between any two nodes serves
    min_local_peers: int  # ranks of the smallest node
    served: tuple  # for each of them the numbers of the local_peers that it serves
    publishers: (
        np.ndarray
    )  # [P] int64, the local_peer on whose descriptor table each peer's rows are announced to this rank
    once: np.ndarray  # [P] bool, whether a peer's tokens come to this node once for all local_peers
    inbound_index: (
        np.ndarray
    )  # [P] int64, the peer's number among those that the publisher lands; -1: a local_peer's own rows

    @property
    def local_index(self):
        """This rank's number among its local_peers."""
        return int(np.searchsorted(self.local_peers, self.rank))

    @property
    def num_places(self):
        """Slots that the window leads to."""
        return len(self.local_peers) * self.num_slots


def make_routes(node_of_rank, rank, num_slots, once, same_order=False):
    """Find the ways of a rank: node_of_rank [P], and once[a, b], whether tokens of node a go to node b only once.

    Peers come in an order that begins at each rank with itself and its local_peers, which wait for nobody; with same_order in
    the one order that is the same at all ranks.
    """
    node_of_rank = np.asarray(node_of_rank)
    here = node_of_rank[rank]
    local_peers = np.flatnonzero(node_of_rank == here)

    # Lay slots in order of the ways: own node first, then each message's.
    receivers, order = [], [local_peers]
    for node in np.unique(node_of_rank[node_of_rank != here]):
        ranks = np.flatnonzero(node_of_rank == node)
        served = [ranks] if once[here, node] else ranks[:, None]
        receivers += [receiver_of(rank, node_of_rank, node)] if once[here, node] else ranks.tolist()
        order += list(served)
    slots = [(ranks[:, None] * num_slots + np.arange(num_slots)).ravel() for ranks in order]
    place_of_slot = np.empty(len(node_of_rank) * num_slots, np.int64)
    place_of_slot[np.concatenate(slots)] = np.arange(len(place_of_slot))

    # Find whose messages land here, and where those are announced that serve this rank.
    peers = order_of_nodes(node_of_rank, 0 if same_order else here)
    others = [ranks for ranks in peers if node_of_rank[ranks[0]] != here]
    if not same_order:
        peers = [np.roll(local_peers, -int(np.searchsorted(local_peers, rank))), *others]
    landed = {local_peer: senders_to(local_peer, node_of_rank, once, others) for local_peer in local_peers.tolist()}
    publishers, inbound_index = np.zeros(len(node_of_rank), np.int64), np.full(len(node_of_rank), -1)
    for number, local_peer in enumerate(local_peers.tolist()):
        publishers[local_peer] = number
        for index, sender in enumerate(landed[local_peer]):
            if local_peer == rank or once[node_of_rank[sender], here]:
                publishers[sender], inbound_index[sender] = number, index
    num_local_peers = np.bincount(node_of_rank, minlength=len(once))
    between = np.where(once, num_local_peers, 1)[
        ~np.eye(len(once), dtype=bool)
    ]  # [pairs of nodes] ranks that a message serves
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
        senders=tuple(landed[rank]),
        max_senders=max(map(len, landed.values())),
        served=tuple(everyone if once[node_of_rank[sender], here] else self_alone for sender in landed[rank]),
        most_served=int(max(between, default=0)) * num_slots,
        min_local_peers=int(num_local_peers[num_local_peers > 0].min()),
        publishers=publishers,
        once=once[node_of_rank, here],
        inbound_index=inbound_index,
    )


def receiver_of(rank, node_of_rank, node):
    """Find the rank of another node that lands for all ranks there what this rank sends."""
    ranks = np.flatnonzero(node_of_rank == node)
    number = np.searchsorted(np.flatnonzero(node_of_rank == node_of_rank[rank]), rank)
    return int(ranks[number % len(ranks)])


def order_of_nodes(node_of_rank, first):
    """List the ranks of all nodes, node by node, beginning with the first, or the one after it."""
    nodes = np.unique(node_of_rank)
    return [np.flatnonzero(node_of_rank == node) for node in np.roll(nodes, -int(np.searchsorted(nodes, first)))]


def senders_to(rank, node_of_rank, once, others):
    """List the ranks of other nodes whose messages a rank lands, in the order of others (lists of ranks)."""
    here = node_of_rank[rank]
    return [
        sender
        for sender in (sender for ranks in others for sender in ranks.tolist())
        if not once[node_of_rank[sender], here] or receiver_of(sender, node_of_rank, here) == rank
    ]
