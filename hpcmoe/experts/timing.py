"""How long an expert takes for one assignment: timed before anything runs, for the placement's cost model."""

import statistics
import time

import torch

from hpcmoe.experts.feed_forward import Expert
from hpcmoe.experts.shapes import MATRICES, split_axis, weight_shape

FIRST_SLICE = 256  # of feed_forward; a larger expert is timed by slices, for its work grows as they do
ENOUGH_SECONDS = 0.002  # a pass that takes so long suffices
MOST_ROWS = 512  # more rows hardly change the time of each
PASSES = 3


def time_row(spec, tensor_parallel, rows, torch_device):
    """Time an expert's forward pass on some rows -> seconds of one row: its shapes, precision and shard."""
    inner = spec.model.feed_forward // tensor_parallel
    rows, part = max(min(rows, MOST_ROWS), 1), min(inner, FIRST_SLICE)
    while True:
        seconds = time_passes(spec, part, rows, torch_device)
        if part == inner or seconds >= ENOUGH_SECONDS:
            return seconds / rows * inner / part
        part = min(4 * part, inner)


def time_passes(spec, inner, rows, torch_device):
    """Time a few passes of an expert `inner` wide on rows of zeros -> the seconds of the middle one."""
    dtype = getattr(torch, spec.model.dtype)
    weights = {}
    for name in MATRICES[spec.experts.kind]:
        shape = [*weight_shape(spec.model, name)]
        shape[split_axis(name)] = inner
        weights[name] = torch.zeros(shape, dtype=dtype)
    expert = Expert(spec.experts.kind, weights, packed=not spec.trains).to(torch_device)
    x = torch.zeros(rows, spec.model.hidden, dtype=dtype, device=torch_device)

    taken = []
    with torch.no_grad():
        for _ in range(1 + PASSES):
            begin = time.perf_counter()
            expert(x)[0, 0].item()  # host waits for the device here
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])  # the first warms up
