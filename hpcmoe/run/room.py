"""Whether the experts can fit at all: a first look, before torch is imported, that placement makes exact."""

from hpcmoe.errors import PlacementError
from hpcmoe.experts.shapes import reckon_expert


def check_room(config, topology):
    """Raise PlacementError when all experts with their state take more than the memory of all nodes."""
    model, (num_bytes, states) = config.model, reckon_expert(config)
    copies = config.cluster.data_parallel
    needed = copies * model.num_experts * model.num_layers * num_bytes * states
    there = int(topology.memory_bytes.sum())
    if needed > there:
        raise PlacementError(
            f"{copies} x {model.num_experts} experts x {model.num_layers} layers x {num_bytes * states / 1e9:.3g} GB = "
            f"{needed / 1e9:.3g} GB do not fit into the {there / 1e9:.3g} GB of {topology}; "
            "[model] num_experts, [cluster] memory_bytes_per_node"
        )
