"""The demand for experts, node by node: the tokens of each, and the probabilities that they give."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcmoe.cluster.names import format_ambiguous, match_names

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The tokens routed to each expert, in any unit, by the node that was their home."""

    tokens: np.ndarray  # [L, nodes, E]
    node_names: tuple[str, ...]  # [nodes]; empty with one row for every node alike


def make_probability(loads: Loads, node_names: Sequence[str]) -> np.ndarray:
    """Compute each node's probabilities from its loads -> [L, nodes, E], each row's sum 1.

    A node that the loads do not name, or name without a token, gets those of all their nodes together.
    """
    everywhere = loads.tokens.sum(axis=1, keepdims=True)  # [L, 1, E]
    found, ambiguous = match_names(node_names, loads.node_names)
    if ambiguous:
        log.warning("loads of nodes by name: %s: the loads of all are taken for it", format_ambiguous(ambiguous))
    if not found:
        probability = everywhere / everywhere.sum(axis=2, keepdims=True)
        return np.broadcast_to(probability, (len(probability), len(node_names), probability.shape[2]))

    # Take each of this run's nodes its row.
    known = {name: row for row, name in enumerate(loads.node_names)}
    rows = [loads.tokens[:, [known[found[name]]]] if name in found else everywhere for name in node_names]
    tokens = np.concatenate(rows, axis=1).astype(np.float64)
    tokens = np.where(tokens.sum(axis=2, keepdims=True) > 0, tokens, everywhere)
    return tokens / tokens.sum(axis=2, keepdims=True)
