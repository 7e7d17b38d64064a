"""Definitions of a run's figures, computed from what was counted."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from hpcmoe.placement.result import Placement

SIGMA_AIM = 0.2  # a dispatch that spreads its tokens well has less


class Recorder(Protocol):
    """Where a run's figures are recorded."""

    def append(self, step: int, chapter: str, name: str, value: Any, unit: str = "") -> None:
        """Record a figure of a step."""

    def sample(self, step: int, chapter: str, name: str, value: np.ndarray, unit: str = "") -> None:
        """Record an array of a step, of fewer and fewer steps of a long run."""

    def describe(self, chapter: str, name: str, value: Any, unit: str = "") -> None:
        """Record a figure of the whole run."""

    def flush_if_due(self) -> None:
        """Write what has been recorded, now and then."""


def compute_link_balance(total: float, total_of_squares: float, count: float) -> tuple[float, float]:
    """Compute the mean of the tokens over the links, the ordered pairs of different ranks, and sigma = std / mean.

    total and total_of_squares are sums over the links.
    """
    if count == 0 or total == 0:
        return 0.0, 0.0
    mean = total / count
    return mean, math.sqrt(max(total_of_squares / count - mean**2, 0.0)) / mean


def sum_own_links(tokens_to_peer: np.ndarray, rank: int) -> np.ndarray:
    """Return this rank's part of the sums: tokens to each peer [P] -> [sum, sum of squares, count], itself left out."""
    others = np.delete(tokens_to_peer.astype(np.float64), rank)
    return np.array([others.sum(), np.square(others).sum(), len(others)])


def compute_balancedness(served: np.ndarray) -> tuple[np.ndarray, float]:
    """Compute mean / max of the tokens that ranks serve, [L, ranks] -> (of each layer [L], of the whole step).

    The step's is the sum of the means over the sum of the maxima, since in each layer all wait for its busiest rank. It
    is the share of time that ranks work, were there nothing but experts. Where nothing is served it is 1.
    """
    mean, most = served.mean(axis=1), served.max(axis=1)
    of_layer = np.divide(mean, most, out=np.ones(len(most)), where=most > 0)
    return of_layer, float(mean.sum() / most.sum()) if most.any() else 1.0


def compute_sampling_floor(
    placement: Placement, tokens_of_rank: np.ndarray, top_k: int, num_experts: int, layers: Iterable[int]
) -> float:
    """Compute the root mean square of an even router's sigma over some layers: it draws finitely many tokens.

    A token's K distinct experts are a draw without replacement from E. A rank that serves shares w_e of the experts
    gets from T tokens T K / E sum(w) assignments in the mean, with variance T (K / E) (1 - K / E) (E sum(w^2) -
    sum(w)^2) / (E - 1). Layers are drawn independently and summed. Sigma is about the step's own mean over the links,
    so the variance of that mean is subtracted: it varies as what a rank does not serve itself. An uneven placement
    raises the floor. tokens_of_rank may have several ranks for each of the placement's; they share its experts'
    matrices and each gets all assignments.
    """
    # Sum mean and variance of each link's tokens over the layers.
    num_ranks = len(tokens_of_rank)
    shards = np.ones((num_ranks // len(placement.node_of_rank),) * 2)
    mean, variance = np.zeros((num_ranks, num_ranks)), np.zeros((num_ranks, num_ranks))
    for layer in layers:
        served, squares = (np.kron(each, shards) for each in served_by_rank(placement, layer))  # source, destination
        chance, spread = top_k / num_experts, num_experts * squares - served**2
        mean += tokens_of_rank[:, None] * chance * served
        variance += tokens_of_rank[:, None] * chance * (1 - chance) * spread / max(num_experts - 1, 1)

    # Take the root mean square about the step's own mean over the links.
    links = ~np.eye(num_ranks, dtype=bool)
    if num_ranks == 1 or mean[links].sum() == 0:
        return 0.0
    variance_of_mean = variance.trace() / links.sum() ** 2  # sources draw independently
    about_mean = max(variance[links].mean() + mean[links].var() - variance_of_mean, 0.0)
    return float(np.sqrt(about_mean) / mean[links].mean())


def served_by_rank(placement: Placement, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum the shares of experts that each rank serves for each other, and their squares -> two arrays [P, P]."""
    held = placement.expert_of_replica[layer] >= 0
    nodes, node_of_rank = np.unique(placement.node_of_rank, return_inverse=True)
    shares = np.stack([placement.shares_of_node(layer, node) * held for node in nodes])[node_of_rank]  # [P, S]
    of_ranks = shares.reshape(len(shares), -1, placement.slots_per_rank)
    return of_ranks.sum(axis=2), np.square(of_ranks).sum(axis=2)


def sum_links_by_node(of_ranks: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """Sum a matrix over ranks [P, P] by node -> [nodes, nodes]."""
    num_nodes = int(max(node_of_rank)) + 1
    member = np.zeros((num_nodes, len(node_of_rank)))
    member[node_of_rank, np.arange(len(node_of_rank))] = 1
    return member @ of_ranks @ member.T
