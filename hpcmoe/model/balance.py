"""Load balancing between steps: the load that the routers feel next, and the biases that it moves.

The load of an expert is lambda_e = its tokens / the tokens it would have if all had the same, a moving average over
steps. Its mean over the experts is 1 whatever the batch, so alpha x lambda pushes alike at any batch size. The bias:
Wang et al. 2024 (arXiv:2408.15664), algorithm 1, here on the logits, where it acts alike at any number of experts.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from hpcmoe.dispatch.router import Router
from hpcmoe.experts.moe import MoE


class Routed(Protocol):
    """A layer with a router."""

    router: Router


def even_load(num_layers: int, num_experts: int) -> np.ndarray:
    """Return the load before anything is measured, float64 [L, E]."""
    return np.ones((num_layers, num_experts))


def update_load(load: np.ndarray, utilisation: np.ndarray, window_steps: int) -> np.ndarray:
    """Average a step's utilisation U_e [L, E] into the load [L, E], exponentially over a window of steps."""
    return load + (utilisation - load) / window_steps


def update_biases(layers: Iterable[Routed], utilisation: np.ndarray, speed: float) -> None:
    """Lower the bias of each expert with more tokens than expected by speed, raise that of each with fewer.

    utilisation U_e [L, E] is of all ranks, so their biases stay equal bit for bit.
    """
    if speed > 0:
        write_biases(layers, read_biases(layers) + np.float32(speed) * np.sign(1 - utilisation).astype(np.float32))


def update_routers(layers: Iterable[MoE], counts_of_layer: Sequence[np.ndarray]) -> None:
    """Move load and biases of a library's layers by the tokens [E] of each, by number, where it has had any."""
    for moe in layers:
        if (counts := counts_of_layer[moe.experts.number]).any():
            utilisation = counts / counts.mean()
            load = update_load(moe.load.numpy(force=True), utilisation, moe.settings.load_window_steps)
            moe.load.copy_(torch.from_numpy(load))
            update_biases([moe], utilisation[None], moe.settings.bias_update_speed)


def read_biases(layers: Iterable[Routed]) -> np.ndarray:
    """Collect the biases of all layers' routers -> float32 [L, E]."""
    return np.stack([layer.router.bias.numpy(force=True) for layer in layers])


def write_biases(layers: Iterable[Routed], biases: np.ndarray) -> None:
    """Set the biases of all layers' routers from [L, E]."""
    for layer, bias in zip(layers, biases, strict=True):
        layer.router.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
