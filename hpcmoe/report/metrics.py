"""What the run's figures mean, and how they come of what was counted."""

import math
from dataclasses import dataclass

import numpy as np

SIGMA_AIM = 0.2  # sigma of an exchange that spreads its tokens well


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBalance:
    """How even the links between ranks carry, from sums over all ordered pairs of different ranks."""

    count: int
    mean: float  # a link
    sigma: float  # standard deviation / mean


def compute_link_balance(total, total_of_squares, count):
    """Mean and sigma from the sum over the links and the sum of squares -> LinkBalance."""
    if count == 0 or total == 0:
        return LinkBalance(count=count, mean=0.0, sigma=0.0)
    mean = total / count
    variance = max(total_of_squares / count - mean**2, 0.0)
    return LinkBalance(count=count, mean=mean, sigma=math.sqrt(variance) / mean)


def sum_own_links(tokens_to_peer, rank):
    """This rank's part of the sums: tokens to each peer [P] -> [sum, sum of squares, count] over the other ranks."""
    others = np.delete(tokens_to_peer.astype(np.float64), rank)
    return np.array([others.sum(), np.square(others).sum(), len(others)])


def compute_balancedness(served):
    """Mean / max of the tokens that ranks serve, [L, ranks] -> (of each layer [L], of the whole step).

    The step's is the sum of the means over the sum of the maxima, since in each layer all wait for its busiest rank:
    the share of their time that ranks work, were there nothing but experts. Where nothing is served it is 1.
    """
    mean, most = served.mean(axis=1), served.max(axis=1)
    of_layer = np.divide(mean, most, out=np.ones(len(most)), where=most > 0)
    return of_layer, float(mean.sum() / most.sum()) if most.any() else 1.0


def compute_sampling_floor(placement, tokens_of_rank, top_k, num_experts, layers):
    """Compute the root mean square of an even router's sigma over some layers: it draws finitely many tokens -> float.

    A token's K distinct experts are a draw without replacement from E. A rank that serves shares w_e of the experts
    gets from T tokens T K / E sum(w) assignments in the mean, with variance T (K / E) (1 - K / E) (E sum(w^2) - sum(w)^2)
    / (E - 1). Layers are drawn apart and summed. Sigma is taken about the step's own mean over the links, whose
    variance is subtracted: what all of a source's links carry is what its own rank does not serve, so it varies as that
    does. The placement's own unevenness is part of the floor. Where tokens_of_rank has several ranks for each of the
    placement's, they share its experts' matrices and each gets all.
    """
    num_ranks = len(tokens_of_rank)
    shards = np.ones((num_ranks // len(placement.node_of_rank),) * 2)
    mean, variance = np.zeros((num_ranks, num_ranks)), np.zeros((num_ranks, num_ranks))
    for layer in layers:
        served, squares = (np.kron(each, shards) for each in served_by_rank(placement, layer))  # source, destination
        chance, spread = top_k / num_experts, num_experts * squares - served**2
        mean += tokens_of_rank[:, None] * chance * served
        variance += tokens_of_rank[:, None] * chance * (1 - chance) * spread / max(num_experts - 1, 1)
    links = ~np.eye(num_ranks, dtype=bool)
    if num_ranks == 1 or mean[links].sum() == 0:
        return 0.0
    variance_of_mean = variance.trace() / links.sum() ** 2  # sources draw apart
    about_mean = max(variance[links].mean() + mean[links].var() - variance_of_mean, 0.0)
    return float(np.sqrt(about_mean) / mean[links].mean())


def served_by_rank(placement, layer):
    """Sum the shares of experts that each rank serves for each other, and their squares -> two arrays [P, P]."""
    held = placement.expert_of_replica[layer] >= 0
    nodes, node_of_rank = np.unique(placement.node_of_rank, return_inverse=True)
    shares = np.stack([placement.shares_of_node(layer, node) * held for node in nodes])[node_of_rank]  # [P, S]
    of_ranks = shares.reshape(len(shares), -1, placement.slots_per_rank)
    return of_ranks.sum(axis=2), np.square(of_ranks).sum(axis=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """What the links must carry at this pace, and what they carried. Bytes a second and link."""

    num_links: int  # ordered pairs of different ranks, or of different nodes
    plain: float  # tokens per second x token bytes / links
    counted: float  # the same times assignments K, transfers there and back, and layers
    achieved: float  # bytes that crossed these links / seconds / links
    busiest: float  # the same for the link that carried most


def compare_bandwidth(bytes_of_link, tokens_per_second, token_bytes, transfers_per_token, seconds):
    """Hold required against achieved bandwidth: bytes_of_link [n] in so many seconds -> Bandwidth, or None.

    BW_min = tokens per second x token bytes / links is the plain formula; transfers_per_token is K x layers x
    (dispatch and combine: 2 forward, 2 more backward). There is none where there is no link.
    """
    if len(bytes_of_link) == 0:
        return None
    plain = tokens_per_second * token_bytes / len(bytes_of_link)
    carried = bytes_of_link / seconds
    return Bandwidth(
        num_links=len(bytes_of_link),
        plain=plain,
        counted=plain * transfers_per_token,
        achieved=float(carried.mean()),
        busiest=float(carried.max()),
    )


def sum_links_by_node(of_ranks, node_of_rank):
    """Add up a matrix over ranks [P, P] by node -> [nodes, nodes]."""
    num_nodes = int(max(node_of_rank)) + 1
    member = np.zeros((num_nodes, len(node_of_rank)))
    member[node_of_rank, np.arange(len(node_of_rank))] = 1
    return member @ of_ranks @ member.T
