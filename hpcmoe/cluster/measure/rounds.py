"""Which links are measured at the same time: rounds of disjoint pairs of nodes, of several peers, and of racks."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SHARE_SECONDS = 0.05  # the least that a round should have to itself
_MAX_PEERS = 4  # of a node whose port is measured
_PEERS_OVER_UPLINK = 2  # of a node whose rack's uplink is measured


def make_pair_rounds(rack_of_node: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Split all pairs of nodes into rounds of disjoint pairs -> list of [pairs, 2] int64.

    Pairs that cross one uplink at the same time would halve each other's figures: as few cross it at once as lets
    each round have SHARE_SECONDS; where racks are not known, any two pairs may share one. The shortest is the circle.
    """
    # Keep pairs apart as strictly as the seconds allow.
    circle, most = make_circle(len(rack_of_node)), seconds / SHARE_SECONDS
    for shared, width in widths(rack_of_node):
        loads = [shared(pairs) for pairs in circle]
        if sum(fewest_parts(load, width) for load in loads) <= most:
            rounds = [
                part for pairs, load in zip(circle, loads, strict=True) for part in split_greedily(pairs, load, width)
            ]
            if len(rounds) <= most:
                return rounds
    return circle


def make_circle(num_nodes: int) -> list[np.ndarray]:
    """Pair all nodes by the circle method: N - 1 rounds, N when N is odd and one node rests in each."""
    around = num_nodes - 1 + num_nodes % 2
    positions = np.arange(around)
    rounds = []
    for turn in range(around if num_nodes > 1 else 0):
        facing = (turn - positions) % around
        pairs = np.stack([positions, facing], axis=1)[positions < facing]
        if num_nodes % 2 == 0:  # the node that faces itself meets the last one, which is not in the circle
            pairs = np.append(pairs, [[int(np.flatnonzero(positions == facing)[0]), num_nodes - 1]], axis=0)
        rounds.append(pairs)
    return rounds


def widths(rack_of_node: np.ndarray) -> Iterator[tuple[Callable[[np.ndarray], np.ndarray], int]]:
    """Yield ways to keep pairs apart, the strictest first -> (pairs -> what each crosses [pairs, 2], how many may)."""
    num_racks = int(max(rack_of_node)) + 1
    yield (lambda pairs: np.zeros_like(pairs)), 1
    for power in range(max(len(rack_of_node) // 2, 1).bit_length()):
        if num_racks > 1:
            yield (lambda pairs: uplinks_of(pairs, rack_of_node)), 2**power
        elif power > 0:
            yield (lambda pairs: np.zeros_like(pairs)), 2**power


def uplinks_of(pairs: np.ndarray, rack_of_node: np.ndarray) -> np.ndarray:
    """Return the two uplinks that each pair crosses -> [pairs, 2], -1 for a pair within one rack."""
    racks = rack_of_node[pairs]
    return np.where(racks[:, :1] == racks[:, 1:], -1, racks)


def fewest_parts(shared: np.ndarray, width: int) -> int:
    """Count the parts that a round must at least be split into so that `width` pairs at most share a thing."""
    crossing = shared[shared[:, 0] >= 0]
    if len(crossing) == 0:
        return 1
    load = np.bincount(crossing[:, 0]) if (crossing[:, 0] == crossing[:, 1]).all() else np.bincount(crossing.ravel())
    return -(-int(load.max()) // width)


def split_greedily(pairs: np.ndarray, shared: np.ndarray, width: int) -> list[np.ndarray]:
    """Assign pairs in order to the first part with room; in none do more than `width` share a thing.

    shared [pairs, things], -1 where a pair shares nothing -> list of [pairs, 2].
    """
    parts: list[list[np.ndarray]] = []
    loads: list[Counter] = []
    for pair, things in zip(pairs, shared.tolist(), strict=True):
        things = {thing for thing in things if thing >= 0}
        fits = (k for k, load in enumerate(loads) if all(load[thing] < width for thing in things))
        k = next(fits, len(parts))
        if k == len(parts):
            parts.append([])
            loads.append(Counter())
        parts[k].append(pair)
        loads[k].update(things)
    return [np.array(part) for part in parts]


def make_port_rounds(rack_of_node: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Return rounds in which each node sends to several others, and receives from them -> list of flows [flows, 2].

    Blocks of neighbouring nodes take turns within, one block at a time while that leaves a round SHARE_SECONDS.
    """
    nodes = np.argsort(rack_of_node, kind="stable")
    blocks = np.array_split(nodes, -(-len(nodes) // (_MAX_PEERS + 1)))
    alone = [flows for block in blocks if len(block) > 2 for flows in make_stars(block)]
    if len(alone) * SHARE_SECONDS <= seconds:
        return alone
    together = itertools.zip_longest(*(make_stars(block) for block in blocks if len(block) > 2))
    return [np.concatenate([flows for flows in turn if flows is not None]) for turn in together]


def make_stars(block: np.ndarray) -> list[np.ndarray]:
    """Return rounds in which each node of a block sends to all others, then receives -> list of [flows, 2]."""
    outward = [np.array([(centre, peer) for peer in block if peer != centre]) for centre in block]
    return [flows for star in outward for flows in (star, star[:, ::-1])]


def make_uplink_rounds(rack_of_node: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Return rounds in which all nodes of a rack send over its uplink at once -> list of flows [flows, 2].

    Each rack sends to all others, and receives from them, while that leaves a round SHARE_SECONDS. Else racks meet as
    nodes do in the circle, as many turns as the seconds allow and two at least, each turn both ways.
    """
    racks = [np.flatnonzero(rack_of_node == rack) for rack in range(max(rack_of_node) + 1)]
    if 2 < len(racks) <= seconds / SHARE_SECONDS / 2:
        outward = [make_crossing(rack, deal_out(racks[:k] + racks[k + 1 :])) for k, rack in enumerate(racks)]
        return [flows for star in outward for flows in (star, star[:, ::-1])]
    turns = make_circle(len(racks))[: max(int(seconds / SHARE_SECONDS / 2), 2)]
    return [
        np.concatenate([make_crossing(racks[a], racks[b]) for a, b in pairs])
        for turn in turns
        for pairs in (turn, turn[:, ::-1])
    ]


def deal_out(racks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the nodes of racks, one of each rack in turn -> [nodes]."""
    turns = itertools.zip_longest(*racks)
    return np.array([node for turn in turns for node in turn if node is not None])


def make_crossing(senders: np.ndarray, receivers: np.ndarray) -> np.ndarray:
    """Return flows from each sender to a few receivers, all about equally busy -> [flows, 2]."""
    width = min(_PEERS_OVER_UPLINK, len(receivers))
    return np.array([(s, receivers[(k + q) % len(receivers)]) for k, s in enumerate(senders) for q in range(width)])
