"""A step under torch's profiler: which transfers ran beside kernels of the compute stream."""

import pathlib

import numpy as np
import torch
from small import BY_CARRIER, open_small_job

from hpcmoe.run.data import draw_starts

TRANSFERS = ("Memcpy HtoD", "Memcpy DtoH", "Memcpy PtoP", "nccl")
NEITHER = "Memcpy DtoD"  # within a GPU: mostly what a rank sends to itself
LAYERS = 2
SHAPE = {
    "run__mode": "infer", "model__hidden": 1024, "model__feed_forward": 32768, "model__dtype": "bfloat16",
    "model__num_layers": LAYERS, "model__attention": False, "model__sequence_length": 1024,
    "pipeline__micro_batches": 4, "pipeline__in_flight": 2, "comm__device": "cuda",
}  # fmt: skip


def profile_step(comm, folder, kind):
    """Profile a forward pass whose rows a carrier takes -> figures of this rank; its trace goes to the folder."""
    text = np.random.default_rng(1).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    sizes = {"model__num_experts": 2 * comm.size, "data__batch_sequences": 16 * comm.size}
    with open_small_job(comm, pathlib.Path(folder), text=text, **SHAPE, **BY_CARRIER[kind], **sizes) as (job, _, _):
        starts = draw_starts(len(job.training), 16 * comm.size, 1024, 0, 1)
        load = np.ones((LAYERS, 2 * comm.size))
        for _ in range(2):
            job.stepper.run(job.training, starts, load, "infer")
        with torch.profiler.profile() as profile:
            job.stepper.run(job.training, starts, load, "infer")
            job.stepper.network.device.settle()
    profile.export_chrome_trace(str(pathlib.Path(folder, f"trace-{kind}-{comm.size}-{comm.rank}.json.gz")))
    return weigh(find_kernels(profile))


def find_kernels(profile):
    """List what ran on the device -> (name, begin, end) in seconds of each."""
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def weigh(kernels):
    """Tell how long transfers lasted, and which share of it other kernels ran: (name, begin, end) -> figures."""
    kernels = [kernel for kernel in kernels if NEITHER not in kernel[0]]
    is_transfer = [any(mark in name for mark in TRANSFERS) for name, _, _ in kernels]
    moving = merge([(b, e) for (_, b, e), is_one in zip(kernels, is_transfer, strict=True) if is_one])
    working = merge([(b, e) for (_, b, e), is_one in zip(kernels, is_transfer, strict=True) if not is_one])
    both = sum(max(0.0, min(e, end) - max(b, begin)) for b, e in moving for begin, end in working)
    total = sum(e - b for b, e in moving)
    return {"transfers": total, "hidden": both / total if total else 0.0, "kernels": len(kernels)}


def merge(spans):
    """Join spans that touch or overlap: [(begin, end)] -> the same, ascending and apart."""
    joined = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
