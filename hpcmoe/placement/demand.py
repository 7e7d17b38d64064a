"""The demand for experts, node by node: uniform, by probabilities of a file, or as an earlier run routed its tokens."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcmoe.cluster.names import format_ambiguous, match_names
from hpcmoe.config import ModelConfig
from hpcmoe.errors import ConfigError, HpcmoeError
from hpcmoe.messages import show_value
from hpcmoe.reading import is_number, read_json

log = logging.getLogger(__name__)
_SUM_TOLERANCE = 1e-6  # by which a row of probabilities may miss 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The tokens routed to each expert, in any unit, by the node that was their home."""

    tokens: np.ndarray  # [L, nodes, E]
    node_names: tuple[str, ...]  # [nodes]; empty with one row for every node alike


def find_loads(loads: str, model: ModelConfig, read_loads: Callable[[str], Loads]) -> Loads:
    """Return the loads that [placement] loads names; ConfigError when they are not those of [model].

    read_loads(path) -> Loads of a run's record.
    """
    if loads == "uniform":
        return Loads(tokens=np.ones((model.num_layers, 1, model.num_experts)), node_names=())
    is_json = loads.endswith(".json")
    try:
        content = read_json(loads) if is_json else read_loads(loads)
    except HpcmoeError as error:
        raise type(error)(f"[placement] loads = {error}") from None
    if is_json:
        return Loads(tokens=check_rows(content, model, loads), node_names=())
    return check_loads(content, model, loads)


def check_rows(rows: Any, model: ModelConfig, path: str) -> np.ndarray:
    """Check a file's probabilities, a row or one a layer -> [L, 1, E], or ConfigError naming row and sum."""
    what, num_layers, num_experts = f"[placement] loads = {path}", model.num_layers, model.num_experts
    if not (isinstance(rows, list) and all(isinstance(row, list) for row in rows)):
        raise ConfigError(f"{what}: must be a list of rows of numbers")
    if len(rows) not in (1, num_layers):
        raise ConfigError(f"{what}: has {len(rows)} rows, must have 1 or [model] num_layers = {num_layers}")
    for number, row in enumerate(rows):
        if len(row) != num_experts:
            raise ConfigError(f"{what}: row [{number}] has {len(row)} entries, [model] num_experts = {num_experts}")
        for expert, entry in enumerate(row):
            if not is_number(entry):
                raise ConfigError(f"{what}: entry [{number}][{expert}] = {show_value(entry)}, must be a number")
        if min(row) < 0:
            raise ConfigError(f"{what}: entry [{number}][{row.index(min(row))}] = {min(row):g}, must be 0 or above")
        total = sum(map(float, row))  # of whole numbers alone it may be beyond float64
        if not abs(total - 1) <= _SUM_TOLERANCE:
            raise ConfigError(f"{what}: row [{number}] sums to {total:.8g}, must sum to 1")
    return np.broadcast_to(np.array(rows, np.float64)[:, None], (num_layers, 1, num_experts))


def check_loads(loads: Loads, model: ModelConfig, path: str) -> Loads:
    """Check that recorded loads are of this model's layers and experts -> the Loads, or ConfigError."""
    for key, has in zip(("num_layers", "num_experts"), loads.tokens.shape[::2], strict=True):
        if has != (wants := getattr(model, key)):
            raise ConfigError(f"[placement] loads = {path}: its run had {key} = {has}, [model] {key} = {wants}")
    if not (np.isfinite(loads.tokens) & (loads.tokens >= 0)).all() or (loads.tokens.sum(axis=(1, 2)) == 0).any():
        raise ConfigError(f"[placement] loads = {path}: holds a layer without tokens")
    return loads


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
