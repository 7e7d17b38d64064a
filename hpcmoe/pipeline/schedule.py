"""The order of stages over micro-batches and layers, as plain data: lanes of ops.

A lane is done op by op. Lanes go on side by side, each as far as it can without waiting, so that a lane's wait for rows
is hidden behind another's work. A schedule of one lane is the same sequence on every rank at every run.
"""

from itertools import zip_longest
from typing import NamedTuple

from hpcmoe.clock import Stage


class Op(NamedTuple):
    """One stage of one micro-batch; layer is 0 for the stages that belong to no layer."""

    stage: Stage
    layer: int
    micro_batch: int


FORWARD = (Stage.ROUTE, Stage.DISPATCH, Stage.COMPUTE, Stage.COMBINE)
BACKWARD = (Stage.COMBINE_BACKWARD, Stage.COMPUTE_BACKWARD, Stage.ROUTE_BACKWARD)


def make_schedule(
    kind: str, num_layers: int, num_micro_batches: int, in_flight: int, training: bool
) -> tuple[tuple[Op, ...], ...]:
    """Return the lanes of a step, with at most in_flight micro-batches under way.

    "serial": one micro-batch after the other. "overlap": in_flight take turns, so that others compute between a stage
    that starts a transfer and the stage that needs it. "arrival": in_flight lanes, whoever has rows goes on.
    """
    paths = [make_path(num_layers, micro_batch, training) for micro_batch in range(num_micro_batches)]
    match kind:
        case "serial":
            lanes = [[op for path in paths for op in path]]
        case "overlap":
            lanes = [[op for first in range(0, len(paths), in_flight) for op in interleave(paths[first:][:in_flight])]]
        case "arrival":
            lanes = [[op for path in paths[lane::in_flight] for op in path] for lane in range(in_flight)]
        case _:
            raise ValueError(f"unknown schedule {kind}")
    return tuple(tuple(lane) for lane in lanes if lane)


def interleave(paths: list[list[Op]]) -> list[Op]:
    """Return the ops of several paths in turns."""
    return [op for turn in zip_longest(*paths) for op in turn if op is not None]


def make_path(num_layers: int, micro_batch: int, training: bool) -> list[Op]:
    """Return the ops of one micro-batch: up through the layers, and down again when training."""
    path = [Op(Stage.EMBED, 0, micro_batch)]
    path += [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in FORWARD]
    path.append(Op(Stage.HEAD, 0, micro_batch))
    if training:
        path += [Op(stage, layer, micro_batch) for layer in reversed(range(num_layers)) for stage in BACKWARD]
        path.append(Op(Stage.EMBED_BACKWARD, 0, micro_batch))
    return path
