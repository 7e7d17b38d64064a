"""What joins the nodes: each link's bandwidth and latency, found by ping-pong in rounds of disjoint pairs.

Pairs that cross one uplink at the same time would halve each other's figures, so as few pairs run at once as the
time allows: one at a time up to nine nodes in two seconds, half as many pairs as nodes on a large cluster.
"""

import time

import numpy as np

from hpcmoe.errors import ClusterError
from hpcmoe.wait import barrier, gather_to_all, wait_all

SIZES = tuple(2**power for power in range(16, 24))  # bytes, 64 KiB to 8 MiB
LATENCY_TRIPS = 20
BANDWIDTH_TRIPS = 5
SHARE_SECONDS = 0.05  # the least that a pair should have to itself
TAG = 1


def measure_links(comm, node_of_rank, seconds):
    """Measure all links in about `seconds` -> bytes_per_second, latency_seconds, both [nodes, nodes].

    Collective over comm. A round trip cannot tell its two directions apart: both matrices are symmetric. The diagonal
    is a trip between a node's first two ranks, or a copy within its only rank.
    """
    num_nodes = max(node_of_rank) + 1
    ends = [np.flatnonzero(node_of_rank == node)[:2] for node in range(num_nodes)]
    rounds = [[(node, node) for node in range(num_nodes)], *make_rounds(num_nodes, seconds)]

    # The lower node's first rank asks; the other node's first, or the same node's last of two, answers.
    figure_of_link, deadline = {}, time.perf_counter() + seconds
    for turn, pairs in enumerate(rounds):
        barrier(comm)
        share = (deadline - time.perf_counter()) / (len(rounds) - turn)  # what one round leaves goes to the next
        for i, j in pairs:
            asker, answerer = ends[i][0], ends[j][-1 if i == j else 0]
            if comm.rank == asker:
                figure_of_link[i, j] = measure_link(comm, answerer, share)
            elif comm.rank == answerer:
                answer_link(comm, asker)

    # Spread each pair's figures to both of its entries, on every rank.
    matrices = np.zeros((2, num_nodes, num_nodes))
    for figures in gather_to_all(comm, figure_of_link):
        for (i, j), figure in figures.items():
            matrices[:, i, j] = matrices[:, j, i] = figure
    return matrices[0], matrices[1]


def make_rounds(num_nodes, seconds):
    """Split all pairs of nodes into rounds of disjoint pairs, as few at once as time allows -> lists of (i, j)."""
    circle = make_circle(num_nodes)
    for width in range(1, num_nodes // 2 + 1):
        rounds = [pairs[k : k + width] for pairs in circle for k in range(0, len(pairs), width)]
        if len(rounds) * SHARE_SECONDS <= seconds:
            return rounds
    return circle


def make_circle(num_nodes):
    """Pair all nodes by the circle method: N - 1 rounds, N when N is odd and one node rests in each."""
    size = num_nodes + num_nodes % 2
    rounds = []
    for turn in range(size - 1):
        circle = [0, *((k + turn) % (size - 1) + 1 for k in range(size - 1))]
        pairs = [sorted((circle[k], circle[size - 1 - k])) for k in range(size // 2)]
        rounds.append([(i, j) for i, j in pairs if j < num_nodes])
    return rounds


def measure_link(comm, peer, seconds):
    """Measure the link to peer, who runs answer_link, or this rank's memory -> (bytes_per_second, latency_seconds)."""
    if peer == comm.rank:
        return ramp(time_copies, seconds)
    figures = ramp(lambda num_bytes, repeats: time_trips(comm, peer, num_bytes, repeats), seconds)
    tell(comm, peer, 0, 0)
    return figures


def ramp(time_messages, seconds):
    """Time ever larger messages until the seconds are spent -> (bytes_per_second, latency_seconds).

    time_messages(num_bytes, repeats) -> the seconds of each, one way.
    """
    deadline = time.perf_counter() + seconds
    time_messages(1, 2)  # the first message opens the connection
    latency = min(time_messages(1, LATENCY_TRIPS))

    # Double the message while the time lasts, once each.
    seconds_of_bytes = {0: latency}
    for num_bytes in SIZES:
        [seconds_of_bytes[num_bytes]] = time_messages(num_bytes, 1)
        expected = 2 * seconds_of_bytes[num_bytes]  # of the next size, one way
        if time.perf_counter() + 2 * expected > deadline:
            break

    # Repeat the two sizes that tell the bandwidth; the fastest of each is the least disturbed.
    sizes = [size for size in slope_sizes(seconds_of_bytes) if size > 0]
    for _ in range(BANDWIDTH_TRIPS):
        if time.perf_counter() + 2 * sum(seconds_of_bytes[size] for size in sizes) > deadline:
            break
        for size in sizes:
            seconds_of_bytes[size] = min(seconds_of_bytes[size], *time_messages(size, 1))
    return estimate_bandwidth(seconds_of_bytes), latency


def slope_sizes(seconds_of_bytes):
    """Choose the sizes between which to take the slope: the largest and a quarter of it, or else nothing."""
    largest = max(seconds_of_bytes)
    return (largest // 4 if largest // 4 in seconds_of_bytes else 0), largest


def estimate_bandwidth(seconds_of_bytes):
    """Take the slope of the seconds over the bytes: free of latency and, at the upper sizes, of a shaper's burst."""
    base, largest = slope_sizes(seconds_of_bytes)
    slope_seconds = seconds_of_bytes[largest] - seconds_of_bytes[base]
    if slope_seconds <= 0:  # noise ate the difference
        return largest / seconds_of_bytes[largest]
    return (largest - base) / slope_seconds


def time_copies(num_bytes, repeats):
    """Copy num_bytes within this rank's memory, which is what a message to itself costs -> seconds of each copy."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - begin)
    return seconds


def time_trips(comm, peer, num_bytes, repeats):
    """Send num_bytes to peer and back, `repeats` times -> seconds one way, each."""
    outbox, inbox = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    tell(comm, peer, num_bytes, repeats)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        wait_all([comm.Irecv(inbox, peer, TAG), comm.Isend(outbox, peer, TAG)])
        seconds.append((time.perf_counter() - begin) / 2)
    return seconds


def tell(comm, peer, num_bytes, repeats):
    """Announce to peer how many messages of which size come next."""
    wait_all([comm.Isend(np.array([num_bytes, repeats], np.int64), peer, TAG)])


def answer_link(comm, peer):
    """Send back whatever peer's measure_link sends, until it announces zero bytes."""
    announced = np.empty(2, np.int64)
    while True:
        wait_all([comm.Irecv(announced, peer, TAG)])
        num_bytes, repeats = announced
        if num_bytes == 0:
            return
        box = np.ones(num_bytes, np.uint8)
        for _ in range(repeats):
            wait_all([comm.Irecv(box, peer, TAG)])
            wait_all([comm.Isend(box, peer, TAG)])


def find_links(cluster, names, measured, saved):
    """Take the links as measured, of the config, or of a saved topology -> (bytes_per_second, latency_seconds, source).

    Raises ClusterError that names the key or file, and the entry, where they do not fit the nodes called names.
    """
    match cluster.links:
        case "measure":
            return *measured, "measured"
        case "config":
            given, source, where = (cluster.bytes_per_second, cluster.latency_seconds), "config", "[cluster]"
        case "file":
            path = cluster.links_file
            given, source, where = pick_links(saved, names, path), f"file {path}", path
        case _:
            raise ValueError(cluster.links)

    bandwidth = check_matrix(given[0], names, f"{where} bytes_per_second", "above 0", lambda m: m > 0)
    if len(given[1]) == 0:
        return bandwidth, np.zeros_like(bandwidth), f"{source}; latency not given, taken as 0"
    return bandwidth, check_matrix(given[1], names, f"{where} latency_seconds", "0 or above", lambda m: m >= 0), source


def pick_links(saved, names, path):
    """Pick this run's nodes by name from an earlier run's topology -> (bytes_per_second, latency_seconds)."""
    missing = [name for name in names if name not in saved.node_names]
    if missing:
        raise ClusterError(
            f"[cluster] links_file = {path}: has no links of {', '.join(missing)}; "
            f"the run's nodes are {', '.join(names)}, the file's {', '.join(saved.node_names)}"
        )
    rows = [saved.node_names.index(name) for name in names]
    return saved.bytes_per_second[np.ix_(rows, rows)], saved.latency_seconds[np.ix_(rows, rows)]


def check_matrix(rows, names, what, allowed, fits):
    """Check that rows are nodes x nodes finite numbers that fit -> [nodes, nodes] float64, or ClusterError."""
    widths = sorted({len(row) for row in rows})
    if len(rows) != len(names) or widths != [len(names)]:
        raise ClusterError(f"{what} is {len(rows)} x {' or '.join(map(str, widths))}, the run has {len(names)} nodes")
    matrix = np.array(rows, np.float64)
    for i, j in np.argwhere(~(np.isfinite(matrix) & fits(matrix))):
        raise ClusterError(f"{what}: entry [{i}][{j}] = {matrix[i, j]:g}, {names[i]} to {names[j]}, must be {allowed}")
    return matrix
