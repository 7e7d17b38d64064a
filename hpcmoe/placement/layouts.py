"""Layouts of one layer, as experts at [P, s] in the search and in slots [S] elsewhere: limits, shapes and memory."""

import numpy as np

from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.quotas import usable_of_node
from hpcmoe.placement.search.layer_data import EMPTY, LayerData


def fits(data: LayerData, expert_at: np.ndarray) -> bool:
    """Return True if a layout [P, s] keeps to the limits and has every expert, on no rank twice."""
    held = expert_at != EMPTY
    count, ordered = held.sum(axis=1), np.sort(expert_at, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)
    of_node = np.bincount(data.node_of_rank, count, len(data.most_of_node))
    return bool(
        len(np.unique(expert_at[held])) == len(data.tokens)
        and not twice.any()
        and (count <= data.most_of_rank).all()
        and (count >= data.fewest_of_rank).all()
        and (of_node <= data.most_of_node).all()
    )


def trim_slots(problem: PlacementProblem, data: LayerData, experts: np.ndarray) -> np.ndarray | None:
    """Reshape a layer's slots [S] by rank, without the slots that no rank may use -> [P, s'], or None."""
    expert_at = -np.sort(-experts.reshape(problem.num_ranks, -1), axis=1)  # the empty slots last
    most = data.most_of_rank.max()
    return expert_at[:, :most].copy() if (expert_at[:, most:] == EMPTY).all() else None


def pad_slots(problem: PlacementProblem, expert_at: np.ndarray) -> np.ndarray:
    """Pad every rank with empty slots to all that it has: [P, s'] -> [S]."""
    missing = problem.slots_per_rank - expert_at.shape[1]
    return np.pad(expert_at, ((0, 0), (0, missing)), constant_values=EMPTY).ravel()


def match_memory(problem: PlacementProblem, most_of_node: np.ndarray, start: np.ndarray) -> None:
    """Divide the memory [L, nodes] as a placement [L, S] to start from needs it, where it fits; in place."""
    nodes = problem.node_of_slot
    used = np.stack([np.bincount(nodes[row != EMPTY], minlength=problem.num_nodes) for row in start])
    if (used.sum(axis=0) <= problem.capacity_of_node).all():
        for node in np.flatnonzero((most_of_node < used).any(axis=0)):
            rest = max(most_of_node[:, node].sum() - used[:, node].sum(), 0)
            most = np.cumsum(np.maximum(usable_of_node(problem)[node] - used[:, node], 0))
            most_of_node[:, node] = used[:, node] + np.diff(np.minimum(most, rest), prepend=0)
