"""The order of stages over micro-batches and layers, as plain data: the same on every rank, so nothing deadlocks."""

from itertools import zip_longest
from typing import NamedTuple


class Op(NamedTuple):
    """One stage of one micro-batch; layer is 0 for the stages that belong to no layer."""

    stage: str
    layer: int
    micro_batch: int


FORWARD = ("route", "dispatch", "compute", "combine")
BACKWARD = ("combine_backward", "compute_backward", "route_backward")


def make_schedule(num_layers, num_micro_batches, in_flight, training):
    """Put all stages of a step in order -> tuple of Op.

    One micro-batch in flight is the serial schedule. More take turns stage by stage, so that between a stage that
    starts a transfer and the stage that needs it, the others compute.
    """
    ops = []
    for first in range(0, num_micro_batches, in_flight):
        group = range(first, min(first + in_flight, num_micro_batches))
        paths = [make_path(num_layers, micro_batch, training) for micro_batch in group]
        ops.extend(op for turn in zip_longest(*paths) for op in turn if op is not None)
    return tuple(ops)


def make_path(num_layers, micro_batch, training):
    """List the stages of one micro-batch: up through the layers, and down again when training."""
    path = [Op("embed", 0, micro_batch)]
    path += [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in FORWARD]
    path.append(Op("head", 0, micro_batch))
    if training:
        path += [Op(stage, layer, micro_batch) for layer in reversed(range(num_layers)) for stage in BACKWARD]
        path.append(Op("embed_backward", 0, micro_batch))
    return path
