"""The order of stages over micro-batches and layers, as plain data: lanes of ops.

A lane is done op by op. Lanes go on side by side, each as far as it can without waiting, so what waits for rows in one
lane is hidden behind the work of another; a schedule of one lane is the same sequence on every rank at every run.
"""

from itertools import zip_longest
from typing import NamedTuple


class Op(NamedTuple):
    """One stage of one micro-batch; layer is 0 for the stages that belong to no layer."""

    stage: str
    layer: int
    micro_batch: int


FORWARD = ("route", "dispatch", "compute", "combine")
BACKWARD = ("combine_backward", "compute_backward", "route_backward")


def make_schedule(kind, num_layers, num_micro_batches, in_flight, training):
    """Put all stages of a step in order -> tuple of lanes, each a tuple of Op. At most in_flight micro-batches run.

    "serial": one micro-batch after the other. "overlap": in_flight take turns, so that between a stage that starts a
    transfer and the stage that needs it the others compute. "arrival": in_flight lanes, whoever has rows goes on.
    """
    paths = [make_path(num_layers, micro_batch, training) for micro_batch in range(num_micro_batches)]
    match kind:
        case "serial":
            lanes = [[op for path in paths for op in path]]
        case "overlap":
            lanes = [[op for first in range(0, len(paths), in_flight) for op in take_turns(paths[first:][:in_flight])]]
        case "arrival":
            lanes = [[op for path in paths[lane::in_flight] for op in path] for lane in range(in_flight)]
        case _:
            raise ValueError(f"unknown schedule {kind}")
    return tuple(tuple(lane) for lane in lanes if lane)


def take_turns(paths):
    """Interleave paths op by op, each path a stage pair behind the one before -> list of Op."""
    return [op for turn in zip_longest(*paths) for op in turn if op is not None]


def make_path(num_layers, micro_batch, training):
    """List the stages of one micro-batch: up through the layers, and down again when training."""
    path = [Op("embed", 0, micro_batch)]
    path += [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in FORWARD]
    path.append(Op("head", 0, micro_batch))
    if training:
        path += [Op(stage, layer, micro_batch) for layer in reversed(range(num_layers)) for stage in BACKWARD]
        path.append(Op("embed_backward", 0, micro_batch))
    return path
