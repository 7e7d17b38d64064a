"""Seconds of an expert for one row: timed before anything runs, for the placement's cost model."""

import statistics
import time

import torch

from hpcmoe.experts.feed_forward import Expert
from hpcmoe.experts.shapes import MATRICES, ExpertShape, weight_shape

MOST_ROWS = 512  # more rows hardly change the time of each
_FIRST_SLICE = 256  # of feed_forward; a larger expert is timed by slices, for its work grows as they do
_ENOUGH_SECONDS = 0.002  # of a pass
_PASSES = 3


def time_row(
    shape: ExpertShape, tensor_parallel: int, rows: int, torch_device: torch.device, packed: bool = False
) -> float:
    """Time an expert's forward pass, of its shapes, precision and shard, on some rows -> seconds of one row.

    packed: its weights are packed, as in inference.
    """
    inner = shape.feed_forward // tensor_parallel
    rows, part = max(min(rows, MOST_ROWS), 1), min(inner, _FIRST_SLICE)
    while True:
        seconds = time_passes(shape, part, rows, torch_device, packed)
        if part == inner or seconds >= _ENOUGH_SECONDS:
            return seconds / rows * inner / part
        part = min(4 * part, inner)


def time_passes(shape: ExpertShape, inner: int, rows: int, torch_device: torch.device, packed: bool = False) -> float:
    """Time a few passes of an expert `inner` wide on rows of zeros -> their median seconds."""
    # Build the expert and its rows.
    dtype, names = getattr(torch, shape.dtype), MATRICES[shape.kind]
    weights = {name: torch.zeros(weight_shape(shape, name, inner), dtype=dtype) for name in names}
    expert = Expert(shape.kind, weights, packed).to(torch_device)
    x = torch.zeros(rows, shape.hidden, dtype=dtype, device=torch_device)

    # Time the passes; the first warms up.
    times = []
    for _ in range(1 + _PASSES):
        begin = time.perf_counter()
        expert(x)[0, 0].item()  # host waits for the device here
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
