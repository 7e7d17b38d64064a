"""What ports and uplinks carry: flows between several nodes at once, and what follows from their sums."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.topology import find_port_maxima
from hpcmoe.wait import Backoff, barrier, wait_all

_CHANNELS = 2  # messages of a flow that are under way at once
_MESSAGES = 32  # of a flow in a round, were it alone
_MIN_SIZE, _MAX_SIZE = 2**12, 2**20  # bytes of a message
_BUSY_SHARE = 0.8  # of a round's time and bytes; the rest is for opening connections and for the last messages
_WARM_SHARE = 0.25  # of the busy time that does not count: queues fill, shapers spend their bursts
_WELL_BELOW = 0.8  # of what links and ports would let through: less shows the uplink
_TAG = 3


def measure_flows(
    comm: MPI.Comm,
    node_of_rank: np.ndarray,
    rounds: Sequence[np.ndarray],
    own_rates: np.ndarray,
    seconds: float,
    num_bytes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the flows of each round at once -> (sent, received), [rounds, nodes] each, bytes a second.

    Collective over comm. rounds: list of [flows, 2] nodes, from and to; own_rates [nodes, nodes]: of each pair alone.
    A node's ranks take its flows in turn. No node sends more than num_bytes; messages of one byte aside.
    """
    rates = np.zeros((2, len(rounds), len(own_rates)))
    bytes_of_flow = share_bytes(rounds, num_bytes)
    for turn, flows in enumerate(rounds):
        own = own_rates[flows[:, 0], flows[:, 1]]
        busy = _BUSY_SHARE * min(seconds / len(rounds), bytes_of_flow / own.max())
        sizes = choose_sizes(own * busy, bytes_of_flow)

        # Each rank counts what it receives.
        ranks = ranks_of_flows(flows, node_of_rank)
        for flow, arrivals in run_flows(comm, ranks, sizes, busy, bytes_of_flow).items():
            rate = rate_within(arrivals, sizes[flow], _WARM_SHARE * busy, busy)
            rates[0, turn, flows[flow, 0]] += rate
            rates[1, turn, flows[flow, 1]] += rate

    wait_all([comm.Iallreduce(MPI.IN_PLACE, rates, MPI.SUM)])
    return rates[0], rates[1]


def share_bytes(rounds: Sequence[np.ndarray], num_bytes: int) -> int:
    """Return the bytes of a flow: a node's, divided over the flows that it sends in all rounds."""
    senders = [node for flows in rounds for node in flows[:, 0].tolist()]
    return num_bytes // max(Counter(senders).values(), default=1)


def choose_sizes(bytes_alone: np.ndarray, bytes_of_flow: int) -> np.ndarray:
    """Choose the size of each flow's messages: _MESSAGES in the bytes it would carry alone -> [flows] int64."""
    most = max(min(_MAX_SIZE, bytes_of_flow // (2 * _CHANNELS)), 1)
    return np.clip(bytes_alone / _MESSAGES, min(_MIN_SIZE, most), most).astype(np.int64)


def ranks_of_flows(flows: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """Assign the flows of each node to its ranks, at either end -> ranks [flows, 2]."""
    ranks = np.empty_like(flows)
    for end in (0, 1):
        for node in np.unique(flows[:, end]):
            ours, here = np.flatnonzero(flows[:, end] == node), np.flatnonzero(node_of_rank == node)
            ranks[ours, end] = here[np.arange(len(ours)) % len(here)]
    return ranks


def run_flows(
    comm: MPI.Comm, ranks: np.ndarray, sizes: np.ndarray, seconds: float, num_bytes: int
) -> dict[int, list[float]]:
    """Run flows between ranks [flows, 2] at once -> the seconds at which its messages were complete here, by flow.

    Collective over comm. Each flow takes about the seconds, and num_bytes at most, in messages of its size.
    """
    # A flow is several channels, half of each here.
    channels = [(flow, channel) for flow in range(len(ranks)) for channel in range(_CHANNELS)]
    senders = [
        FlowSender(comm, ranks[flow, 1], channel, sizes[flow], seconds, num_bytes // _CHANNELS)
        for flow, channel in channels
        if ranks[flow, 0] == comm.rank
    ]
    receivers = {
        (flow, channel): FlowReceiver(comm, ranks[flow, 0], channel, sizes[flow])
        for flow, channel in channels
        if ranks[flow, 1] == comm.rank
    }

    # Run them, and put the arrivals of a flow's channels together.
    open_connections(comm, senders, receivers.values())
    run_channels([*receivers.values(), *senders])
    arrivals_of_flow: dict[int, list[float]] = {}
    for (flow, _), receiver in receivers.items():
        arrivals_of_flow.setdefault(flow, []).extend(receiver.arrivals)
    return arrivals_of_flow


class FlowSender:
    """Half of a channel: sends one message after another until its time or bytes are spent."""

    def __init__(self, comm: MPI.Comm, peer: int, channel: int, size: int, seconds: float, num_bytes: int) -> None:
        self.comm, self.peer, self.tag = comm, peer, _TAG + channel
        self.seconds, self.messages_left = seconds, num_bytes // size
        self.message = np.zeros(size, np.uint8)
        self.ended = False

    def step(self, now: float) -> MPI.Request:
        """Start to send the next message, or the last, which begins with a 1."""
        if self.ended:
            return MPI.REQUEST_NULL
        self.messages_left -= 1
        self.ended = now >= self.seconds or self.messages_left == 0
        self.message[0] = self.ended
        return self.comm.Issend(self.message, self.peer, self.tag)  # no buffering: it is done when it is received


class FlowReceiver:
    """The other half: receives one message after another, and records when."""

    def __init__(self, comm: MPI.Comm, peer: int, channel: int, size: int) -> None:
        self.comm, self.peer, self.tag = comm, peer, _TAG + channel
        self.message = np.zeros(size, np.uint8)
        self.arrivals: list[float] = []  # seconds since the round began

    def step(self, now: float) -> MPI.Request:
        """Record an arrival, unless this is the beginning, and start to receive the next message."""
        if now > 0:
            self.arrivals.append(now)
        if self.message[0]:
            return MPI.REQUEST_NULL
        return self.comm.Irecv(self.message, self.peer, self.tag)


def open_connections(comm: MPI.Comm, senders: Sequence[FlowSender], receivers: Iterable[FlowReceiver]) -> None:
    """Send a byte through each channel, so that none opens while the others are timed. Collective over comm."""
    byte = np.zeros(1, np.uint8)
    requests = [comm.Irecv(np.zeros(1, np.uint8), half.peer, half.tag) for half in receivers]
    wait_all(requests + [comm.Isend(byte, half.peer, half.tag) for half in senders])
    barrier(comm)


def run_channels(halves: Sequence[FlowSender | FlowReceiver]) -> None:
    """Run this rank's halves of channels until all have ended."""
    backoff, begin = Backoff(), time.perf_counter()
    requests = [half.step(0.0) for half in halves]
    while (done := MPI.Request.Testsome(requests)) is not None:
        now = time.perf_counter() - begin
        for k in done:
            requests[k] = halves[k].step(now)
        if done:
            backoff.reset()
        else:
            backoff.pause()


def rate_within(arrivals: Sequence[float], size: int, begin: float, end: float) -> float:
    """Return a flow's bytes a second from begin to end, or to its last arrival when the sender's clock was ahead.

    arrivals: the seconds at which its messages, all of one size, were complete. Between them the bytes come evenly.
    """
    end = min(end, max(arrivals))
    if end <= begin:
        begin, end = 0.0, max(arrivals)
    bytes_by_then = size * np.arange(len(arrivals) + 1)
    first, last = np.interp([begin, end], [0.0, *sorted(arrivals)], bytes_by_then)
    return (last - first) / (end - begin)


def infer_ports(own_rates: np.ndarray, sent: np.ndarray, received: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most that a node was seen to send, and to receive, in all -> (egress, ingress), [nodes] each.

    Where that is less than its links carry one by one, it is the port's rate; else the port carries at least that.
    own_rates [nodes, nodes]: of each pair alone; sent, received [rounds, nodes]: with several at once.
    """
    egress, ingress = find_port_maxima(own_rates)
    return np.vstack([sent, egress]).max(axis=0), np.vstack([received, ingress]).max(axis=0)


def infer_uplinks(
    rounds: Sequence[np.ndarray],
    rack_of_node: np.ndarray,
    own_rates: np.ndarray,
    ports: tuple[np.ndarray, np.ndarray],
    carried: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the rate of each rack's uplink, inf where nothing shows one -> [racks].

    An uplink shows where the flows over it carry well below what their links alone and their nodes' ports let through.
    rounds: list of flows [flows, 2] between racks; ports: (egress, ingress) [nodes]; carried: (sent, received)
    [rounds, nodes].
    """
    uplinks = np.full((2, max(rack_of_node) + 1), np.inf)
    if not rounds:
        return uplinks[0]
    able = np.stack([able_to_carry(flows, rack_of_node, own_rates, ports) for flows in rounds], axis=1)
    for end in (0, 1):  # leaving, entering
        did = np.stack([np.bincount(rack_of_node, of_round, uplinks.shape[1]) for of_round in carried[end]])
        most = did.max(axis=0)
        shows = (most > 0) & (most < _WELL_BELOW * able[end].max(axis=0))
        uplinks[end, shows] = most[shows]
    return uplinks.min(axis=0)


def able_to_carry(
    flows: np.ndarray, rack_of_node: np.ndarray, own_rates: np.ndarray, ports: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return what could leave and enter each rack in a round were there no uplinks -> [2, racks].

    It is 0 where a rack's peers have flows with other racks too, so that it is unknown.
    """
    num_nodes, racks, own = len(own_rates), rack_of_node[flows], own_rates[flows[:, 0], flows[:, 1]]
    able = np.zeros((2, max(rack_of_node) + 1))
    for end, rack in {(side, int(rack)) for side in (0, 1) for rack in racks[:, side]}:
        ours = racks[:, end] == rack
        if not np.isin(flows[~ours, 1 - end], flows[ours, 1 - end]).any():
            sums = [np.bincount(flows[ours, side], own[ours], num_nodes) for side in (0, 1)]
            able[end, rack] = min(np.minimum(sums[side], ports[side]).sum() for side in (0, 1))
    return able
