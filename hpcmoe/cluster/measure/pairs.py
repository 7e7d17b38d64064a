"""What joins two nodes: a link's bandwidth, each way, and latency, by ping-pong in rounds of disjoint pairs."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from hpcmoe.wait import barrier, wait_all

SIZES = tuple(2**power for power in range(16, 24))  # bytes, 64 KiB to 8 MiB
_LATENCY_TRIPS = 20
_BANDWIDTH_TRIPS = 5
_LONG_TRIPS = 20  # a message that takes longer than so many empty trips measures its link's bandwidth alone
_STEEPEST = 0.1  # share of a large message's seconds that its last three quarters must take to be believed
_TAG = 1


def measure_pairs(
    comm: MPI.Comm, node_of_rank: np.ndarray, rounds: Sequence[np.ndarray], seconds: float, num_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measure the pairs of nodes in rounds -> (bytes_per_second, latency_seconds), [nodes, nodes] each, 0 elsewhere.

    Collective over comm. A pair (n, n) is a trip between a node's first two ranks, or a copy within its only one.
    Neither node of a pair sends the other more than num_bytes, SIZES[0] at least; a byte's messages aside.
    """
    num_nodes = max(node_of_rank) + 1
    ends = [np.flatnonzero(node_of_rank == node)[:2] for node in range(num_nodes)]
    here = node_of_rank[comm.rank]
    figures, deadline = np.zeros((2, num_nodes, num_nodes)), time.perf_counter() + seconds

    # The lower node's first rank asks; the other node's first, or the same node's last of two, answers.
    for turn, pairs in enumerate(rounds):
        barrier(comm)
        share = (deadline - time.perf_counter()) / (len(rounds) - turn)  # what one round leaves goes to the next
        for i, j in pairs[(pairs == here).any(axis=1)]:
            asker, answerer = ends[i][0], ends[j][-1 if i == j else 0]
            if comm.rank == asker:
                there, back, latency = measure_link(comm, answerer, share, num_bytes)
                figures[:, i, j] = there, latency
                figures[:, j, i] = back, latency
            elif comm.rank == answerer:
                answer_link(comm, asker)

    wait_all([comm.Iallreduce(MPI.IN_PLACE, figures, MPI.SUM)])  # each figure is on one rank alone
    return figures[0], figures[1]


def measure_link(comm: MPI.Comm, peer: int, seconds: float, num_bytes: int) -> tuple[float, float, float]:
    """Measure the link to peer, who runs answer_link, or this rank's memory.

    Returns (bytes_per_second there, and back, latency_seconds one way).
    """
    # Within a rank a message is a copy.
    begin = time.perf_counter()
    if peer == comm.rank:
        latency = min(time_copy(1) for _ in range(_LATENCY_TRIPS))
        bandwidth = ramp(time_copy, latency, begin + seconds, num_bytes)
        return bandwidth, bandwidth, latency

    # Time empty trips, then larger ones, half of the seconds each way.
    boxes = make_boxes()
    for _ in range(2):  # the first messages open the connection
        time_trip(comm, peer, boxes, 1, 1)
    trip = min(time_trip(comm, peer, boxes, 1, 1) for _ in range(_LATENCY_TRIPS))
    middle = (begin + seconds + time.perf_counter()) / 2
    there = ramp(lambda size: time_trip(comm, peer, boxes, size, 1), trip, middle, num_bytes)
    back = ramp(lambda size: time_trip(comm, peer, boxes, 1, size), trip, begin + seconds, num_bytes)
    announce(comm, peer, 0, 0)
    return there, back, trip / 2


def ramp(time_message: Callable[[int], float], empty_seconds: float, deadline: float, num_bytes: int) -> float:
    """Time ever larger messages one way until the time or bytes are spent -> bytes_per_second.

    time_message(size) -> the seconds that a message takes with its acknowledgement, empty_seconds when it is empty.
    """
    bytes_left, seconds_of_bytes = num_bytes, {0: empty_seconds}

    # Double the message while time and bytes last, once each.
    for size in SIZES:
        seconds_of_bytes[size] = time_message(size)
        bytes_left -= size
        late = time.perf_counter() + 2 * seconds_of_bytes[size] > deadline
        if late or 2 * size > bytes_left:
            break

    # Repeat what determines the bandwidth; the fastest is the least disturbed.
    sizes = telling_sizes(seconds_of_bytes)
    for _ in range(_BANDWIDTH_TRIPS):
        expected = sum(seconds_of_bytes[size] for size in sizes)
        if time.perf_counter() + expected > deadline or sum(sizes) > bytes_left:
            break
        for size in sizes:
            seconds_of_bytes[size] = min(seconds_of_bytes[size], time_message(size))
        bytes_left -= sum(sizes)
    return estimate_bandwidth(seconds_of_bytes)


def telling_sizes(seconds_of_bytes: dict[int, float]) -> list[int]:
    """Return the sizes that determine the bandwidth: the largest, and a quarter of it where fixed costs count."""
    largest = max(seconds_of_bytes)
    short = seconds_of_bytes[largest] < _LONG_TRIPS * seconds_of_bytes[0]
    return [largest, largest // 4] if short and largest // 4 in seconds_of_bytes else [largest]


def estimate_bandwidth(seconds_of_bytes: dict[int, float]) -> float:
    """Return the largest message's bytes over its seconds, or where fixed costs count the slope from a quarter of it.

    A slope can be far too steep when something disturbs the smaller message; the plain ratio errs to the slow side.
    """
    largest, *quarter = telling_sizes(seconds_of_bytes)
    base = quarter[0] if quarter else 0
    slope_seconds = seconds_of_bytes[largest] - seconds_of_bytes[base]
    if slope_seconds < _STEEPEST * seconds_of_bytes[largest]:  # noise ate the difference
        return largest / seconds_of_bytes[largest]
    return (largest - base) / slope_seconds


def time_copy(size: int) -> float:
    """Copy `size` bytes within this rank's memory, which is what a message to itself costs -> seconds."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    begin = time.perf_counter()
    target[:] = source
    return time.perf_counter() - begin


def make_boxes() -> np.ndarray:
    """Return buffers for the largest message there and back, touched once so that no message pays for it."""
    return np.ones((2, SIZES[-1]), np.uint8)


def time_trip(comm: MPI.Comm, peer: int, boxes: np.ndarray, size_there: int, size_back: int) -> float:
    """Send a message to peer, who then sends one back; the smaller acknowledges the larger -> seconds of both."""
    announce(comm, peer, size_there, size_back)
    begin = time.perf_counter()
    wait_all([comm.Irecv(boxes[1, :size_back], peer, _TAG), comm.Isend(boxes[0, :size_there], peer, _TAG)])
    return time.perf_counter() - begin


def announce(comm: MPI.Comm, peer: int, *sizes: int) -> None:
    """Send peer the sizes that come next, there and back; zeros end it."""
    wait_all([comm.Isend(np.array(sizes, np.int64), peer, _TAG)])


def answer_link(comm: MPI.Comm, peer: int) -> None:
    """Receive and send back what peer's measure_link announces, until it announces nothing."""
    boxes, announced = make_boxes(), np.empty(2, np.int64)
    while True:
        wait_all([comm.Irecv(announced, peer, _TAG)])
        size_there, size_back = announced
        if size_there == 0:
            return
        wait_all([comm.Irecv(boxes[0, :size_there], peer, _TAG)])
        wait_all([comm.Isend(boxes[1, :size_back], peer, _TAG)])
