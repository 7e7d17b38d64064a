"""The load that routers feel: each expert's tokens over expected tokens, averaged over recent steps."""

import numpy as np


def even_load(num_layers, num_experts):
    """The load before anything was measured. [L, E]"""
    return np.ones((num_layers, num_experts))


def update_load(load, utilisation, window_steps):
    """Average a step's utilisation U_e [L, E] into the load [L, E], exponentially over a window of steps -> [L, E]."""
    return load + (utilisation - load) / window_steps
