"""The measurement of a cluster: pairs of nodes one by one, then several at once, then again what stands far below."""

import math
import time
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from hpcmoe.cluster.measure.flows import infer_ports, infer_uplinks, measure_flows
from hpcmoe.cluster.measure.pairs import SIZES, measure_pairs
from hpcmoe.cluster.measure.rounds import (
    SHARE_SECONDS,
    make_pair_rounds,
    make_port_rounds,
    make_uplink_rounds,
    split_greedily,
    uplinks_of,
)
from hpcmoe.cluster.topology import ClusterLinks
from hpcmoe.config import ClusterConfig
from hpcmoe.errors import ClusterError, on_root
from hpcmoe.wait import broadcast

# Shares of the seconds and of each node's bytes; what a part leaves of its seconds goes to the next.
_PAIRS, _PORTS, _UPLINKS, _AGAIN = 0.5, 0.2, 0.15, 0.15
_MAX_REPEATED = 300  # links
_DOUBTFUL, _SLOW = 0.85, 0.7  # of the median of its kind: a link below it is measured again, or named


def measure_links(
    comm: MPI.Comm, node_of_rank: np.ndarray, rack_of_node: np.ndarray, cluster: ClusterConfig
) -> ClusterLinks:
    """Measure what joins the nodes, within [cluster] measure_seconds and measure_bytes.

    Collective over comm. Raises ClusterError on all ranks when measure_bytes is too few for a message to each node.
    """
    num_nodes, seconds, num_bytes = len(rack_of_node), cluster.measure_seconds, cluster.measure_bytes
    on_root(comm, lambda: check_bytes(num_bytes, num_nodes))
    left = TimeLeft(comm, seconds)

    # Each pair alone, or as near to it as time allows; a node's own memory first.
    within = np.repeat(np.arange(num_nodes), 2).reshape(-1, 2)
    rounds = [within, *make_pair_rounds(rack_of_node, _PAIRS * seconds)]
    bytes_of_pair = int(_PAIRS * num_bytes) // max(num_nodes - 1, 1)
    rates, latency = measure_pairs(comm, node_of_rank, rounds, left.share(_PAIRS), bytes_of_pair)

    # Several at once: what a port carries in all, and an uplink.
    def run(flows: Sequence[np.ndarray], part: float) -> tuple[np.ndarray, np.ndarray]:
        return measure_flows(comm, node_of_rank, flows, rates, left.share(part), int(part * num_bytes))

    through_ports = run(make_port_rounds(rack_of_node, _PORTS * seconds), _PORTS)
    crossings = make_uplink_rounds(rack_of_node, _UPLINKS * seconds)
    through_uplinks = run(crossings, _UPLINKS)

    # Other work on a machine can only slow a link: the better of two figures is the link's.
    seconds, num_bytes = left.share(_AGAIN), int(_AGAIN * num_bytes)
    rounds = make_repeats(rates, rack_of_node)[: min(int(seconds / SHARE_SECONDS), num_bytes // SIZES[0])]
    again = measure_pairs(comm, node_of_rank, rounds, seconds, num_bytes // max(len(rounds), 1))
    rates = np.maximum(rates, again[0])
    ports = infer_ports(rates, *through_ports)
    return ClusterLinks(
        bytes_per_second=rates,
        latency_seconds=np.where(again[1] > 0, np.minimum(latency, again[1]), latency),
        egress_bytes_per_second=ports[0],
        ingress_bytes_per_second=ports[1],
        uplink_bytes_per_second=infer_uplinks(crossings, rack_of_node, rates, ports, through_uplinks),
    )


def check_bytes(num_bytes: int, num_nodes: int) -> None:
    """Raise ClusterError unless the bytes are enough for the smallest message from a node to each other."""
    least = math.ceil((num_nodes - 1) * SIZES[0] / _PAIRS)
    if num_bytes < least:
        raise ClusterError(
            f"[cluster] measure_bytes = {num_bytes}: must be at least {num_nodes - 1} other nodes x {SIZES[0]} / "
            f"{_PAIRS:g} of all = {least}"
        )


class TimeLeft:
    """The seconds that are left, shared out to the parts of a measurement by rank 0's clock."""

    def __init__(self, comm: MPI.Comm, seconds: float) -> None:
        self.comm, self.deadline, self.unshared = comm, time.perf_counter() + seconds, 1.0

    def share(self, part: float) -> float:
        """Return a part's share of what is left, the same seconds on all ranks. Collective over comm."""
        seconds = (self.deadline - time.perf_counter()) * part / self.unshared
        self.unshared -= part
        return max(broadcast(self.comm, seconds), 0.0)


def make_repeats(rates: np.ndarray, rack_of_node: np.ndarray) -> list[np.ndarray]:
    """Return rounds of the pairs of nodes whose link is slow for its kind, the slowest first -> list of [pairs, 2].

    In a round no two pairs share a node or uplink. rates [nodes, nodes] bytes a second.
    """
    slow = find_slow_links(rates, rack_of_node, _DOUBTFUL)[:_MAX_REPEATED]
    if not slow:
        return []
    pairs = np.array(list(dict.fromkeys((min(i, j), max(i, j)) for i, j, _ in slow)))
    uplinks = uplinks_of(pairs, rack_of_node)
    return split_greedily(pairs, np.hstack([pairs, np.where(uplinks < 0, -1, uplinks + len(rates))]), 1)


def find_slow_links(rates: np.ndarray, rack_of_node: np.ndarray, below: float = _SLOW) -> list[tuple[int, int, float]]:
    """Find links far below the median of their kind, within racks or between -> list of (from, to, share of median).

    The slowest first. rates [nodes, nodes] bytes a second. A kind may truly be uneven: this is a question, no verdict.
    """
    same_rack = np.equal.outer(rack_of_node, rack_of_node)
    between_nodes = ~np.eye(len(rates), dtype=bool)
    slow: list[tuple[int, int, float]] = []
    for kind in (same_rack & between_nodes, ~same_rack):
        shares = rates / np.median(rates[kind]) if kind.any() else np.ones_like(rates)
        slow += [(int(i), int(j), float(shares[i, j])) for i, j in np.argwhere(kind & (shares < below))]
    return sorted(slow, key=lambda link: link[2])
