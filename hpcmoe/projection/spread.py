"""Where experts lie in a run that is only described: what part of each layer's assignments each rank's experts get."""

import heapq
import math

import numpy as np


def spread_experts(loads: np.ndarray, num_ranks: int, slots: int, by_load: bool, replicate: bool) -> np.ndarray:
    """Place experts over ranks -> the shares of ranks [L, P] of a layer's assignments, each row sums to 1.

    loads [L, E] in any unit. by_load: the heaviest first, each to the rank that has least, as many experts on each;
    else in order of number. replicate: slots left over hold further replicas of the most used experts.
    """
    loads = loads / loads.sum(axis=1, keepdims=True)
    return np.stack([spread_layer(layer, num_ranks, slots, by_load, replicate) for layer in loads])


def spread_layer(loads: np.ndarray, num_ranks: int, slots: int, by_load: bool, replicate: bool) -> np.ndarray:
    """Place one layer's experts, loads [E] -> the shares of ranks [P]."""
    replicas = share_slots(loads, num_ranks * slots) if replicate else np.ones(len(loads), np.int64)
    parts = np.repeat(loads / replicas, replicas)
    shares = np.zeros(num_ranks)
    if not by_load:
        np.add.at(shares, np.arange(len(parts)) * num_ranks // max(len(parts), num_ranks), parts)
        return shares
    most = math.ceil(len(parts) / num_ranks)
    open_ranks = [(0.0, rank, 0) for rank in range(num_ranks)]
    for part in np.sort(parts)[::-1].tolist():
        share, rank, held = heapq.heappop(open_ranks)
        shares[rank] = share + part
        if held + 1 < most:
            heapq.heappush(open_ranks, (share + part, rank, held + 1))
    return shares


def share_slots(loads: np.ndarray, num_slots: int) -> np.ndarray:
    """Count the replicas of each expert where the most loaded one gets each further slot -> [E] (EPLB's rule)."""
    replicas = np.ones(len(loads), np.int64)
    heap = [(-load, expert) for expert, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    for _ in range(num_slots - len(loads)):
        _, expert = heap[0]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-loads[expert] / replicas[expert], expert))
    return replicas


def sample_layers(loads: np.ndarray, most: int) -> np.ndarray:
    """Choose layers that stand for all, from the most even to the least -> their numbers [most or L], ascending."""
    order = np.argsort(loads.max(axis=1) / loads.sum(axis=1), kind="stable")
    middles = (np.arange(most) + 0.5) * len(order) / most
    return np.sort(order[middles.astype(np.int64)]) if len(order) > most else np.arange(len(order))
