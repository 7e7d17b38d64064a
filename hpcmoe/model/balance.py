"""What a step's tokens do to the next step's routers: the load that they feel, and the biases that it moves.

The load of an expert is lambda_e = its tokens / the tokens it would have if all had the same, a moving average over
steps. Its mean over the experts is 1 whatever the batch, so alpha x lambda pushes alike at any batch size. The bias:
Wang et al. 2024 (arXiv:2408.15664), algorithm 1, here on the logits, where it acts alike at any number of experts.
"""

import numpy as np
import torch


def even_load(num_layers, num_experts):
    """The load before anything was measured. [L, E]"""
    return np.ones((num_layers, num_experts))


def update_load(load, utilisation, window_steps):
    """Average a step's utilisation U_e [L, E] into the load [L, E], exponentially over a window of steps -> [L, E]."""
    return load + (utilisation - load) / window_steps


def update_biases(layers, utilisation, speed):
    """Lower the bias of each expert with more tokens than expected by speed, raise that of each with fewer.

    utilisation U_e [L, E] is of all ranks, which so move their biases alike, bit for bit.
    """
    if speed == 0:
        return
    write_biases(layers, read_biases(layers) + np.float32(speed) * np.sign(1 - utilisation).astype(np.float32))


def read_biases(layers):
    """Collect the biases of all layers' routers -> float32 [L, E]."""
    return np.stack([layer.router.bias.numpy(force=True) for layer in layers])


def write_biases(layers, biases):
    """Set the biases of all layers' routers from [L, E]."""
    for layer, bias in zip(layers, biases, strict=True):
        layer.router.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
