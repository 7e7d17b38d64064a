"""The order of a rank's ops as data: the lanes of hpcmoe.pipeline.lanes, without threads.

An op is a stage of a layer and micro-batch. A rank takes a lane's ops in their order. Where the schedule fixes that of
all lanes together, as "serial" and "overlap" do, they are one list.
"""

from dataclasses import dataclass

_FORWARD = ("dense", "route", "dispatch", "compute", "combine")
_BACKWARD = ("combine_backward", "compute_backward", "route_backward", "dense_backward")
_ENDS_TURN = ("dispatch", "compute", "combine_backward", "compute_backward")  # then another lane goes on
HEAVY = ("compute", "compute_backward")  # what "arrival" does last
SENDS = ("dispatch", "combine_backward")  # rows to their experts
RETURN_OF = {"compute": "combine", "compute_backward": "route_backward"}  # what fetches an op's results
COMPUTE_OF = dict(zip(SENDS, HEAVY, strict=True))


@dataclass(frozen=True, slots=True)
class Op:
    """What a rank does at one time."""

    stage: str
    layer: int  # -1: of no layer
    micro_batch: int


def order_lanes(kind: str, num_layers: int, num_micro_batches: int, in_flight: int, trains: bool) -> list[list[Op]]:
    """List the ops of each lane in their order, of which a rank takes up the first that it can."""
    in_flight = 1 if kind == "serial" else min(in_flight, num_micro_batches)
    lanes = [
        [op for number in range(lane, num_micro_batches, in_flight) for op in list_ops(num_layers, number, trains)]
        for lane in range(in_flight)
    ]
    return [merge_in_circle(lanes)] if kind == "overlap" else lanes


def list_ops(num_layers: int, micro_batch: int, trains: bool) -> list[Op]:
    """List the ops of one micro-batch: forward, head, and backward."""
    ops = [Op(stage, layer, micro_batch) for layer in range(num_layers) for stage in _FORWARD]
    if trains:
        ops.append(Op("head", -1, micro_batch))
        ops += [Op(stage, layer, micro_batch) for layer in reversed(range(num_layers)) for stage in _BACKWARD]
    return ops


def merge_in_circle(lanes: list[list[Op]]) -> list[Op]:
    """Merge lanes that take turns in a fixed circle, a stage at a time -> one list."""
    turns = [split_turns(lane) for lane in lanes]
    longest = max(map(len, turns))
    return [
        op for number in range(longest) for of_lane in turns for turn in of_lane[number : number + 1] for op in turn
    ]


def split_turns(ops: list[Op]) -> list[list[Op]]:
    """Split a lane's ops where its turn ends."""
    turns: list[list[Op]] = [[]]
    for op in ops:
        turns[-1].append(op)
        if op.stage in _ENDS_TURN:
            turns.append([])
    return turns
