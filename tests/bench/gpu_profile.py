"""A step under torch's profiler: which transfers ran beside kernels of the compute stream."""

import pathlib
from collections import Counter

import numpy as np
import torch
from small import BY_BACKEND, open_small_job

from hpcmoe.model.text import draw_starts

LAYERS, SEQUENCES, LENGTH = 2, 64, 1024  # of a rank
SHAPE = {
    "run__mode": "infer", "model__hidden": 2048, "model__feed_forward": 32768, "model__dtype": "bfloat16",
    "model__num_layers": LAYERS, "model__attention": False, "model__sequence_length": LENGTH,
    "pipeline__micro_batches": 4, "pipeline__in_flight": 2, "comm__device": "cuda",
}  # fmt: skip


def profile_step(comm, folder, kind):
    """Profile a forward pass whose rows a all_to_all takes -> figures of this rank; its trace goes to the folder."""
    text = np.random.default_rng(1).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    sizes = {"model__num_experts": comm.size, "data__batch_sequences": SEQUENCES * comm.size}
    with open_small_job(comm, pathlib.Path(folder), text=text, **SHAPE, **BY_BACKEND[kind], **sizes) as (job, _, _):
        starts = draw_starts(len(job.training), SEQUENCES * comm.size, LENGTH, 0, 1)
        load = np.ones((LAYERS, comm.size))
        for _ in range(2):
            job.stepper.run(job.training, starts, load, "infer")
        with torch.profiler.profile() as profile:
            job.stepper.run(job.training, starts, load, "infer")
            job.stepper.network.device.synchronize()
    name = f"{kind}-{comm.size}-{comm.rank}"
    profile.export_chrome_trace(str(pathlib.Path(folder, f"trace-{name}.json.gz")))
    kernels = find_kernels(profile)
    draw(kernels, pathlib.Path(folder, f"profile-{name}.png"))
    return weigh(kernels)


def find_kernels(profile):
    """List what ran on the device -> (stream, begin, end) in seconds of each, copies too."""
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.device_resource_id, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def find_compute(kernels):
    """Find the stream of which there is the most -> its number: the host gives one alone the experts' work."""
    return Counter(stream for stream, _, _ in kernels).most_common(1)[0][0]


def weigh(kernels):
    """Tell how long the other streams moved rows, and for which share of it the compute stream worked -> figures."""
    compute = find_compute(kernels)
    moving, working = (
        merge([(begin, end) for stream, begin, end in kernels if (stream == compute) == computes])
        for computes in (False, True)
    )
    both = sum(max(0.0, min(e, end) - max(b, begin)) for b, e in moving for begin, end in working)
    total = sum(e - b for b, e in moving)
    return {
        "transfers": total,
        "hidden": both / total if total else 0.0,
        "working": sum(e - b for b, e in working),
        "span": max(end for _, _, end in kernels) - min(begin for _, begin, _ in kernels),
    }


def draw(kernels, path):
    """Draw when each stream was at work, the compute stream at the top."""
    from matplotlib.figure import Figure

    compute, first = find_compute(kernels), min(begin for _, begin, _ in kernels)
    streams = sorted({stream for stream, _, _ in kernels}, key=lambda stream: stream != compute)
    figure = Figure(figsize=(12, 1 + 0.5 * len(streams)), layout="constrained")
    axes = figure.subplots()
    for row, stream in enumerate(streams):
        spans = [(1e3 * (begin - first), 1e3 * (end - begin)) for own, begin, end in kernels if own == stream]
        axes.broken_barh(spans, (row - 0.4, 0.8), color="C0" if stream == compute else "C1")
    axes.set_yticks(range(len(streams)), ["compute", *(f"stream {stream}" for stream in streams[1:])])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.savefig(path, dpi=100)


def merge(spans):
    """Join spans that touch or overlap: [(begin, end)] -> the same, ascending and apart."""
    joined = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
